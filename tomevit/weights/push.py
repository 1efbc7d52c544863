"""Share models on the Hugging Face hub: one file that describes itself, and a model card made from it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tomevit import zoo
from tomevit.config import RUNTIME, Card, Figure, Source
from tomevit.errors import CheckpointError, UploadError
from tomevit.flops import flops
from tomevit.models import VisionTransformer
from tomevit.schedule import token_counts
from tomevit.weights import checkpoint as native
from tomevit.weights.adapt import ADAPTABLE
from tomevit.weights.convert import finite
from tomevit.weights.rules import enumerate_names

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

#: What the hub calls licences (https://huggingface.co/docs/hub/repositories-licenses).
_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c
mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
LICENCES = frozenset(_LICENCES.split())

IMAGENET = ("imagenet-1k", "ImageNet-1k", 1000)  # on the hub, in words, classes


class Base(NamedTuple):
    """What a model's weights began as."""

    name: str
    hub: str | None  # owner/repo where the hub has it


def push(
    model: VisionTransformer | str | os.PathLike[str],
    repo: str,
    *,
    figures: Sequence[Figure] = (),
    dataset: str | None = None,
    licence: str | None = None,
    class_names: Sequence[str] = (),
    notes: str = "",
    private: bool = False,
    message: str = "Upload model",
) -> str:
    """Upload a model to the hub, for `create(..., pretrained="hf-hub:owner/repo")`.

    One commit brings model.safetensors and README.md, a model card with usage, architecture, preprocessing, merging,
    figures, licence and origin; what else the repository holds stays. The token is huggingface_hub's: HF_TOKEN, or
    that of `hf auth login`.

    The model counts as a work of its own. Its card says what it was made from and keeps that licence, but no tag,
    figures or notes: those are of the published weights, and no longer true once a model is trained.

    Args:
        model: a model, or a file that `save` wrote.
        repo: owner/repo; it is made if there is none.
        figures: what this very model was measured at.
        dataset: what the figures were measured on, as the hub names it; None: ImageNet-1k, for 1000 classes.
        licence: of these weights, as the hub names it ("apache-2.0"), or a name of your own; None: the licence of the
            weights they were made from, which stands if it excludes commercial use.
        class_names: one for each class; none: the card's.
        notes: what else a user should know, in Markdown: data, training, limits.
        private: of a new repository; else its owner's default, public for most.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: an argument does not fit, or the licence is not yours to give; nothing was sent.
        CheckpointError: the file is damaged, or the weights have NaN or infinity; nothing was sent.
        UploadError: the hub cannot be reached or refuses; the repository is as it was, or new and empty.
    """
    _check_name(repo)
    if isinstance(model, VisionTransformer):
        card, tensors = native.card_of(model), dict(model.state_dict())
    else:
        card, tensors = _read(Path(model))
    if bad := [name for name, tensor in tensors.items() if not finite(tensor)]:
        raise CheckpointError(f"the weights have NaN or infinity, in {enumerate_names(bad)}")
    base = find_base(card, repo)
    card = replace(
        card,
        weights=None,
        licence=_licence(card, licence),
        sources=(Source(format="tomevit", hub=repo),),
        figures=_figures(card, figures, dataset),
        class_names=tuple(class_names) or card.class_names,
        notes=notes,
    )
    if card.class_names and len(card.class_names) != card.config.num_classes:
        raise ValueError(f"{len(card.class_names)} class_names for {card.config.num_classes} classes")
    with tempfile.TemporaryDirectory(prefix="tomevit-") as folder:
        native.write(Path(folder) / "model.safetensors", card, tensors)
        (Path(folder) / "README.md").write_text(model_card(card, repo, base, dataset), encoding="utf-8")
        return _upload(Path(folder), repo, private, message)


def find_base(card: Card, repo: str = "") -> Base | None:
    """What a model's weights began as, other than an earlier state of the same repository; None: as noise."""
    for source in card.sources:
        if source.format == "tomevit" and source.hub and source.hub != repo:
            return Base(source.hub, source.hub)
    if (origin := card.origin) is None:
        return None
    for known, source in zoo.published():
        if (origin.hub and origin.hub == source.hub) or (origin.url and origin.url == source.url):
            return Base(known.full_name, origin.hub or next((other.hub for other in known.sources if other.hub), None))
    return Base(origin.hub or origin.url or origin.file or "a file", origin.hub)


# Checks, before anything is sent.


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, if not listed

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name for a repository, which has the form owner/repo: {error}") from error
    if "/" not in repo:
        raise ValueError(f"{repo!r} does not say whose repository it is: it must be owner/repo")


def _read(path: Path) -> tuple[Card, dict[str, Tensor]]:
    card, tensors, recorded = native.read(path)
    digest = native.digest((name, tensor.contiguous()) for name, tensor in native.in_order(tensors))
    if recorded not in (None, digest):  # a new file would record the digest of the damage
        raise CheckpointError(f"{path} was damaged or changed since it was written: tomevit verify has the details")
    return card, tensors


def _licence(card: Card, wanted: str | None) -> str | None:
    # Fresh weights have the card of the published ones by that name, but owe them nothing.
    fresh = card.weights and card.sources and card.origin is None
    given = None if fresh else card.licence
    if given and wanted and _non_commercial(given) and not _non_commercial(wanted):
        raise ValueError(
            f"the licence cannot be {wanted}: the weights were made from such under {given}, which excludes commercial "
            f"use, for what is made from them too; leave licence out to keep it"
        )
    licence = wanted or given
    return licence.lower() if licence and licence.lower() in LICENCES else licence


def _non_commercial(licence: str) -> bool:
    return re.search(r"\bnc\b|non-?commercial", licence.lower()) is not None


def _figures(card: Card, figures: Sequence[Figure], dataset: str | None) -> tuple[Figure, ...]:
    if wrong := [figure.top1 for figure in figures if not 0 <= figure.top1 <= 100]:
        raise ValueError(f"a figure's top1 is {wrong[0]}, and must be in per cent, from 0 to 100")
    if figures and dataset is None and card.config.num_classes != IMAGENET[2]:
        raise ValueError(
            f"figures are of {IMAGENET[1]}, and the model has {card.config.num_classes} classes: "
            f"name the dataset that they are of"
        )
    if dataset is None:
        return tuple(figures)
    return tuple(replace(figure, source=f"{dataset}: {figure.source}") for figure in figures)


# The model card.


def model_card(card: Card, repo: str, base: Base | None = None, dataset: str | None = None) -> str:
    """README.md for a repository of the hub: its metadata in YAML, then what a user should know."""
    sections = [
        f"---\n{_metadata(card, repo, base, dataset).to_yaml()}\n---\n\n# {repo.partition('/')[2]}",
        _what(card, base),
        f"## Use\n\n```python\n{_usage(card, repo)}```",
        f"## Model\n\n{_facts(card)}",
        f"## Merging\n\n{_merging(card)}",
    ]
    if card.figures:
        rows = "\n".join(f"| {figure.r} | {figure.top1:.2f} | {_cell(figure.source)} |" for figure in card.figures)
        sections.append(f"## Figures\n\n| r | top-1, % | source |\n|---|---|---|\n{rows}")
    sections.append(f"## Licence and origin\n\n{_origin(card, base)}")
    if card.notes:
        sections.append(f"## Notes\n\n{card.notes}")
    papers = [*card.papers, "Token Merging: Your ViT But Faster (ICLR 2023), arXiv:2210.09461"]
    sections.append("## Papers\n\n" + "\n".join(f"- {_link_papers(paper)}" for paper in papers))
    return "\n\n".join(sections) + "\n"


def _metadata(card: Card, repo: str, base: Base | None, dataset: str | None) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    known = card.licence is None or card.licence in LICENCES
    task = "image-classification" if card.config.num_classes else "image-feature-extraction"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset or IMAGENET[0],
            dataset_name=dataset or IMAGENET[1],
            metric_type="accuracy",
            metric_name=f"top-1 accuracy in %, r = {figure.r}",
            metric_value=figure.top1,
        )
        for figure in card.figures
    ]
    return ModelCardData(
        library_name="tomevit",
        pipeline_tag=task,
        tags=["vision-transformer", "token-merging"],
        license=card.licence if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.]+", "-", (card.licence or "").lower()).strip("-"),
        base_model=base.hub if base else None,
        model_name=repo.partition("/")[2] if results else None,
        eval_results=results or None,
    )


def _what(card: Card, base: Base | None) -> str:
    size = f" ({card.title})" if card.title else ""
    name = f"`{card.name}`{size}" if card.name else f"A vision transformer{size}"
    does = f"tells {card.config.num_classes} classes of images apart" if card.config.num_classes else "embeds images"
    made = f" and was made from {_link(base)}" if base else ""
    return (
        f"{name} with [token merging](https://arxiv.org/abs/2210.09461) in every block. It {does}{made}. "
        f"It runs with the Python library tomevit."
    )


def _usage(card: Card, repo: str) -> str:
    if _buildable(card):
        load = f'model = tomevit.create("{card.name}", pretrained="hf-hub:{repo}")\n'
    else:  # of a shape that the zoo has no name for
        load = f'tomevit.convert("hf-hub:{repo}", "model.safetensors")\nmodel = tomevit.load("model.safetensors")\n'
    mode = {1: '.convert("L")', 3: '.convert("RGB")'}.get(card.config.in_chans, "")
    lines = [
        "import tomevit\nfrom PIL import Image\n",
        f"{load}preprocess = tomevit.transform(model)",
        f'image = Image.open("image.png"){mode}',
        f"{'logits' if card.config.num_classes else 'features'} = model(preprocess(image)[None])",
    ]
    if card.class_names:
        lines.append("print(model.card.class_names[logits.argmax()])")
    return "\n".join(lines) + "\n"


def _buildable(card: Card) -> bool:
    """Whether the zoo's architecture of the card's name is the card's."""
    try:
        named = zoo.architecture(card.name).config
    except ValueError:
        return False
    return replace(named, **{name: getattr(card.config, name) for name in (*ADAPTABLE, *RUNTIME)}) == card.config


def _facts(card: Card) -> str:
    config, prepare = card.config, card.preprocess
    height, width = config.img_size
    resize = "shorter edge" if prepare.resize == "shorter" else "both edges"
    facts = {
        "Blocks": f"{config.depth}, of width {config.embed_dim} with {config.num_heads} heads",
        "Patches": f"{config.patch_size}x{config.patch_size} pixels, {config.num_patches} of them",
        "Classes": str(config.num_classes) if len(card.class_names) > 20 else ", ".join(card.class_names),
        "Image": f"{height}x{width} pixels, {config.in_chans} channels",
        "Preprocessing": f"{prepare.interpolation} resize of the {resize}, centre crop of {prepare.crop_pct:g}",
        "Mean": ", ".join(f"{value:g}" for value in prepare.mean),
        "Standard deviation": ", ".join(f"{value:g}" for value in prepare.std),
    }
    facts["Classes"] = facts["Classes"] or str(config.num_classes or "none: features")
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(fact)} |" for name, fact in facts.items())


def _merging(card: Card) -> str:
    config = card.config
    tokens = token_counts(card.r, config.depth, config.num_tokens, config.num_prefix)
    less = (
        f"At r = {card.r}, {tokens[-1]} of {tokens[0]} tokens leave the last block, and a forward pass takes "
        f"{flops(config, card.r) / 1e9:.3g} GFLOPs instead of {flops(config) / 1e9:.3g}."
    )
    return (
        f"r tokens merge into the most similar others in every block: a larger r is faster, a smaller one more "
        f"accurate, and `model.r` changes it at any time. This model comes with r = {card.r}, and "
        f"{'proportional attention' if config.prop_attn else 'attention that is not proportional'} (a merged token "
        f"counts {'as often as the patches it stands for' if config.prop_attn else 'once'})."
        f"{f' {less}' if tokens[-1] < tokens[0] else ''}"
    )


def _origin(card: Card, base: Base | None) -> str:
    licence = f"Licence: {card.licence or 'not stated'}."
    if base is None:
        return licence
    file = f", the file with sha256 `{card.origin.sha256}`" if card.origin and card.origin.sha256 else ""
    address = (card.origin.url or card.origin.hub or card.origin.file) if card.origin else None
    first = f" Its first weights were read from {address}{file}." if address else ""
    return f"{licence} Made from {_link(base)}, whose figures are not this model's.{first}"


def _link(base: Base) -> str:
    return f"[{base.name}](https://huggingface.co/{base.hub})" if base.hub else base.name


def _link_papers(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _cell(text: str) -> str:
    """Text for a table, which neither a line break nor a | may end."""
    return " ".join(text.replace("|", "\\|").split())


# The upload.


def _upload(folder: Path, repo: str, private: bool, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UploadError(f"{repo} cannot be uploaded while HF_HUB_OFFLINE is set")
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UploadError(
                f"{repo} exists and is public, nothing was uploaded: choose another name, or make it private at "
                f"{constants.ENDPOINT}/{repo}/settings"
            )
        files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        return str(api.create_commit(repo, files, commit_message=message).commit_url)
    except UploadError:
        raise
    except Exception as error:  # of httpx, httpx2 or hf_xet, which have no base class in common
        raise UploadError(f"{repo} could not be uploaded to {constants.ENDPOINT}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            status, said = cause.response.status_code, " ".join((cause.server_message or "").split())
            said = f"it answered {status}{f' ({said})' if said else ''}"
            if hint := _hint(status):
                said += f": {hint}"
            return said
        if isinstance(cause, json.JSONDecodeError):
            return "its answer is not JSON: try again later"
    *_, first = _causes(error)
    return " ".join(str(first).split()) or type(first).__name__


def _hint(status: int) -> str:
    if status == 401:
        return "log in with `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return "the token needs the right to write there, and the owner room for it"
    if status == 429 or status >= 500:
        return "try again later"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
