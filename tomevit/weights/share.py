"""Share models on the Hugging Face hub: one file that describes itself, and a model card made from it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

from tomevit.config import Card, Figure
from tomevit.models import VisionTransformer
from tomevit.weights import hub, native


def push(
    model: VisionTransformer | str | os.PathLike[str],
    repo: str,
    *,
    figures: tuple[Figure, ...] = (),
    licence: str | None = None,
    class_names: tuple[str, ...] = (),
    private: bool = False,
    message: str = "Upload model",
) -> str:
    """Upload a model to the hub, for `create(..., pretrained="hf-hub:owner/repo")`.

    The repository is made if there is none. It gets model.safetensors and README.md, a model card with licence, origin,
    figures, preprocessing and usage. The token is huggingface_hub's: HF_TOKEN, or `hf auth login`.

    Args:
        model: a model, or a file that `save` wrote.
        repo: owner/repo.
        figures: what this model was measured at, if not on its card.
        licence: of these weights; None: the card's. Weights made from others keep to the licence of those.
        class_names: one for each class, if not on its card.
        private: of a new repository.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: repo is no owner/repo, or class_names are not as many as classes.
        DownloadError: the hub cannot be reached or refuses.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"{repo!r} names no repository: it must be owner/repo")
    if isinstance(model, VisionTransformer):
        card, tensors = native.card_of(model), dict(model.state_dict())
    else:
        card, tensors, _ = native.read(model)
    card = replace(
        card,
        figures=figures or card.figures,
        licence=licence or card.licence,
        class_names=tuple(class_names) or card.class_names,
    )
    if card.class_names and len(card.class_names) != card.config.num_classes:
        raise ValueError(f"{len(card.class_names)} class_names for {card.config.num_classes} classes")
    with tempfile.TemporaryDirectory() as folder:
        native.write(Path(folder) / "model.safetensors", card, tensors)
        (Path(folder) / "README.md").write_text(model_card(card, repo), encoding="utf-8")
        return hub.upload(Path(folder), repo, private=private, message=message)


def model_card(card: Card, repo: str) -> str:
    """README.md for a repository of the hub: its metadata in YAML, then what a user should know."""
    config, prepare = card.config, card.preprocess
    metadata: dict[str, object] = {
        "library_name": "tomevit",
        "pipeline_tag": "image-classification" if config.num_classes else "image-feature-extraction",
        "tags": ["vision-transformer", "token-merging"],
    }
    if card.licence:
        metadata["license"] = card.licence
    if card.origin and card.origin.hub:
        metadata["base_model"] = card.origin.hub
    height, width = config.img_size
    merging = f"r = {card.r}, {'proportional' if config.prop_attn else 'plain'} attention"
    facts = {
        "Architecture": f"{card.title or 'vision transformer'} ({card.name or 'a size of its own'})",
        "Size": f"{config.depth} blocks, width {config.embed_dim}, {config.num_heads} heads, patch {config.patch_size}",
        "Image": f"{height}x{width} pixels, {config.in_chans} channels, mean {prepare.mean}, std {prepare.std}, "
        f"{prepare.interpolation}, {prepare.resize} edge, crop {prepare.crop_pct:g}",
        "Classes": ", ".join(card.class_names) or str(config.num_classes),
        "Merging": f"{merging}; both can be changed at any time",
        "Papers": "; ".join((*card.papers, "Token Merging: arXiv:2210.09461")),
        "Licence": card.licence or "not stated",
        "Made from": _origin(card),
    }
    what = "logits" if config.num_classes else "features"
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n# {repo.partition('/')[2]}",
        "A vision transformer with token merging in every block, for tomevit.",
        f"""```python
import tomevit

model = tomevit.create("{card.name or "NAME"}", pretrained="hf-hub:{repo}")
{what} = model(tomevit.transform(model)(image)[None])  # image: PIL or uint8 tensor
model.r = 8  # more or fewer tokens merge: faster, or more accurate
```""",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
    ]
    if card.figures:
        rows = "\n".join(f"| {figure.r} | {figure.top1:.2f} | {figure.source} |" for figure in card.figures)
        sections.append(f"| r | top-1, % | source |\n|---|---|---|\n{rows}")
    if card.notes:
        sections.append(card.notes)
    return "\n\n".join(sections) + "\n"


def _origin(card: Card) -> str:
    if card.origin is None:
        return "trained with tomevit, or of unknown origin"
    address = card.origin.url or card.origin.hub or card.origin.file or "a file"
    return f"{address}{f' ({card.weights})' if card.weights else ''}, sha256 {card.origin.sha256}"
