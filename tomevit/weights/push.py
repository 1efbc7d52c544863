"""Share models on the Hugging Face hub: one file that describes itself, and a model card made from it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from torch import nn

from tomevit import zoo
from tomevit.cards import Card, is_ours
from tomevit.config import RUNTIME, Config, Figure, Source
from tomevit.errors import CheckpointError, UploadError, check_type, printable
from tomevit.flops import flops
from tomevit.schedule import Schedule, token_counts
from tomevit.weights import checkpoint
from tomevit.weights.adapt import ADAPTABLE
from tomevit.weights.convert import is_finite, weights_of
from tomevit.weights.rules import enumerate_names
from tomevit.weights.servers import bounded_answers, words

#: Where the model card's template lies, and the licences that the hub has names for.
_ASSETS = resources.files("tomevit") / "assets"

MOST_ANSWERED = 2**24  # bytes, of the hub to one request
SMALL = 2**24  # bytes that are up before a bar would tell anything


class Base(NamedTuple):
    """What a model's weights began as."""

    name: str
    hub: str | None  # owner/repo where the hub has it


def push(
    model: nn.Module | str | os.PathLike[str],
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
        model: a model, in a wrapper of torch's or not, or anything that `tomevit.convert` takes.
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
    card, tensors, _ = weights_of(model)
    if not isinstance(model, nn.Module) and is_ours(model):
        _check_undamaged(model)
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise CheckpointError(f"the weights have NaN or infinity, in {enumerate_names(bad)}")
    base = find_base(card, repo)
    card = replace(
        card,
        weights=None,
        licence=_choose_licence(card, licence),
        sources=(Source(format="tomevit", hub=repo),),
        figures=_check_figures(figures, dataset, card.config.num_classes),
        class_names=tuple(class_names) or card.class_names,
        notes=notes,
    )
    if card.class_names and len(card.class_names) != card.config.num_classes:
        raise ValueError(f"{len(card.class_names)} class_names for {card.config.num_classes} classes")
    with tempfile.TemporaryDirectory(prefix="tomevit-") as folder:
        checkpoint.write(Path(folder) / "model.safetensors", card, tensors)
        (Path(folder) / "README.md").write_text(model_card(card, repo, base, dataset), encoding="utf-8")
        return _upload(Path(folder), repo, private, message)


def find_base(card: Card, repo: str = "") -> Base | None:
    """What a model's weights began as, other than an earlier state of the same repository; None: as noise."""
    for source in card.sources:
        if source.format == "tomevit" and source.hub and source.hub != repo:
            return Base(source.hub, _repository(source))
    if (origin := card.origin) is None:
        return None
    for known, source in zoo.published_sources():
        if (origin.hub and origin.hub == source.hub) or (origin.url and origin.url == source.url):
            return Base(known.full_name, origin.hub or next((other.hub for other in known.sources if other.hub), None))
    return Base(origin.hub or origin.url or origin.file or "a file", _repository(origin))


def _repository(source: Source) -> str | None:
    """Where a source is on the hub, which a file may say of itself in any words."""
    return source.hub if source.hub and re.fullmatch(r"[\w.-]+/[\w.-]+", source.hub, re.ASCII) else None


def _check_name(repo: str) -> None:
    check_type("repo", repo, str, "owner/repo")
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, if not listed

    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"{repo!r} is no name for a repository, which has the form owner/repo: {error}") from error
    if "/" not in repo:
        raise ValueError(f"{repo!r} does not say whose repository it is: it must be owner/repo")


def _check_undamaged(path: str | os.PathLike[str]) -> None:
    header, tensors = checkpoint.read(path)
    if header.sha256 not in (None, checkpoint.digest_of(tensors)):  # a new file would record the digest of the damage
        raise CheckpointError(f"{path} was damaged or changed since it was written: tomevit verify has the details")


def _choose_licence(card: Card, wanted: str | None) -> str | None:
    # Fresh weights have the card of the published ones by that name, but owe them nothing.
    given = None if card.weights and card.sources and card.origin is None else card.licence
    if given and wanted and _is_non_commercial(given) and not _is_non_commercial(wanted):
        raise ValueError(
            f"the licence cannot be {wanted}: the weights were made from such under {given}, which excludes commercial "
            f"use, for what is made from them too; leave licence out to keep it"
        )
    licence = wanted or given
    return licence.lower() if licence and _is_known_to_the_hub(licence.lower()) else licence


def _is_non_commercial(licence: str) -> bool:
    return re.search(r"\bnc\b|non-?commercial", licence.lower()) is not None


def _is_known_to_the_hub(licence: str) -> bool:
    return licence in (_ASSETS / "hub_licences.txt").read_text(encoding="ascii").split()


def _check_figures(figures: Sequence[Figure], dataset: str | None, num_classes: int) -> tuple[Figure, ...]:
    if wrong := [figure.top1 for figure in figures if not 0 <= figure.top1 <= 100]:
        raise ValueError(f"a figure's top1 is {wrong[0]}, and must be in per cent, from 0 to 100")
    if dataset is not None:
        return tuple(replace(figure, source=f"{dataset}: {figure.source}") for figure in figures)
    if num_classes != 1000 and any(figure.by == "head" for figure in figures):
        raise ValueError(
            f"figures are of ImageNet-1k, and the model has {num_classes} classes: name the dataset that they are of"
        )
    return tuple(figures)


def model_card(card: Card, repo: str, base: Base | None = None, dataset: str | None = None) -> str:
    """README.md for a repository of the hub: assets/model_card.md, filled in.

    A line of that template which begins with `?field` is there if the field is not empty, one with `?!field` if it is.
    """
    config = card.config
    tokens = _tokens(card.r, config)
    fields = {
        "metadata": _metadata(card, repo, base, dataset),
        "card": card,
        "config": config,
        "origin": (origin := card.origin or Source(format="")),
        "address": origin.url or origin.hub or origin.file,
        "repo": repo,
        "title": repo.partition("/")[2],
        "base": base and _link(base),
        "buildable": _is_buildable(card),
        "mode": {1: '.convert("L")', 3: '.convert("RGB")'}.get(config.in_chans, ""),
        "classes": (len(card.class_names) <= 20 and card.class_names) or config.num_classes or "none: features",
        "edge": "shorter edge" if card.preprocess.resize == "shorter" else "both edges",
        "tokens": tokens,
        "merges": tokens[1] < tokens[0],
        "gflops": [flops(config) / 1e9, flops(config, card.r) / 1e9],
        "figures": [
            f"| {_plain(str(figure.r))} | {figure.top1:.2f} {figure.unit} | {_plain(figure.source)} |"
            for figure in card.figures
        ],
        "presets": [
            f"| {_plain(preset.name)} | {_tokens(list(preset.r), config)[1]} | "
            f"{flops(config, list(preset.r)) / 1e9:.4g} | {_plain(preset.source)} |"
            for preset in card.presets
            if preset.fits(config)
        ],
        "papers": [f"- {_link_arxiv(_plain(paper))}" for paper in card.papers],
    }
    lines, formatter = [], _CardFormatter()
    for line in (_ASSETS / "model_card.md").read_text(encoding="utf-8").splitlines():
        marker = re.match(r"\?(!?)([\w.]+) ?", line)
        if marker is None or bool(marker[1]) != bool(formatter.get_field(marker[2], (), fields)[0]):
            lines.append(line[marker.end() :] if marker else line)
    return formatter.vformat("\n".join(lines) + "\n", (), fields)


def _tokens(r: Schedule, config: Config) -> tuple[int, int]:
    """How many enter the first block, and how many leave the last."""
    counts = token_counts(r, config.depth, config.num_tokens, config.num_prefix, config.grid)
    return counts[0], counts[-1]


class _CardFormatter(Formatter):
    """Text of a card is text, on its line and in its cell, also between backticks, as `{field:code}`.

    `{field:as_it_is}` and the lines of `{field:list}` are Markdown.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec == "as_it_is":
            return str(value)
        if format_spec == "list":
            return "\n".join(value)
        if format_spec == "code":
            return printable(str(value)).replace("`", "'")
        return _plain(", ".join(map(str, value)) if isinstance(value, tuple) else format(value, format_spec))


def _plain(text: str) -> str:
    """Text in Markdown, in which nothing is a heading, a link, HTML or a cell; an underscore within a word is none."""
    return re.sub(r"^#|[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(" ".join(text.split())))


def _link(base: Base) -> str:
    name = _plain(base.name)
    return f"[{name}](https://huggingface.co/{base.hub})" if base.hub else name


def _link_arxiv(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _is_buildable(card: Card) -> bool:
    """Whether the zoo's architecture of the card's name is the card's."""
    try:
        named = zoo.architecture(card.name).config
    except ValueError:
        return False
    return replace(named, **{name: getattr(card.config, name) for name in (*ADAPTABLE, *RUNTIME)}) == card.config


def _metadata(card: Card, repo: str, base: Base | None, dataset: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-classification" if card.config.num_classes else "image-feature-extraction"
    on = dataset or "imagenet-1k", dataset or "ImageNet-1k"
    results = [
        EvalResult(task, *on, "accuracy", figure.top1, metric_name=f"top-1 accuracy in {figure.unit}, r = {figure.r}")
        for figure in card.figures
    ]
    licence = card.licence or ""
    known = not licence or _is_known_to_the_hub(licence)
    data = ModelCardData(
        library_name="tomevit",
        pipeline_tag=task,
        tags=["vision-transformer", "token-merging"],
        license=(licence or None) if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-"),
        base_model=base.hub if base else None,
        model_name=repo.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _upload(folder: Path, repo: str, private: bool, message: str) -> str:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UploadError(f"{repo} cannot be uploaded while HF_HUB_OFFLINE is set")
    api = HfApi()
    try:
        with bounded_answers(MOST_ANSWERED), _bars_of_large(folder):
            api.create_repo(repo, private=private or None, exist_ok=True)
            if not private or api.repo_info(repo).private:
                return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # of httpx, httpx2 or hf_xet, which have no base class in common
        raise UploadError(f"{repo} could not be uploaded to {constants.ENDPOINT}: {_explain(error)}") from error
    raise UploadError(
        f"{repo} exists and is public, nothing was uploaded: choose another name, or make it private at "
        f"{constants.ENDPOINT}/{repo}/settings"
    )


@contextmanager
def _bars_of_large(folder: Path) -> Iterator[None]:
    """huggingface_hub's bars, which stay on the terminal, for what is large or where somebody asked for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    small = sum(file.stat().st_size for file in folder.iterdir()) < SMALL
    if not small or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _explain(error: BaseException) -> str:
    """What the hub answered, or else what the first cause says."""
    from huggingface_hub.errors import HfHubHTTPError

    while not isinstance(error, HfHubHTTPError | json.JSONDecodeError):
        if (cause := error.__cause__ or error.__context__) is None:
            return words(error) or type(error).__name__
        error = cause
    if isinstance(error, json.JSONDecodeError):
        return "its answer is not JSON: try again later"
    status, said = error.response.status_code, words(error.server_message or "")
    hints = {401: "log in with `hf auth login`, or set HF_TOKEN"}
    hints |= dict.fromkeys((403, 404), "the token needs the right to write there, and the owner room for it")
    hint = hints.get(status, "try again later" if status == 429 or status >= 500 else "")
    return f"it answered {status}{said and f' ({said})'}{hint and f': {hint}'}"
