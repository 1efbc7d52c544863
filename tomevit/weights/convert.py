"""From a checkpoint of any known format to ours: open, recognise, rename by table, adapt, check, write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomevit import zoo
from tomevit.cards import is_ours
from tomevit.config import Card, Source
from tomevit.errors import AmbiguousCheckpointError, CheckpointError, either
from tomevit.models import MaskedAutoencoder, VisionTransformer, unwrap
from tomevit.output import check_output
from tomevit.weights import cache as hub
from tomevit.weights import checkpoint as native
from tomevit.weights import files, rules
from tomevit.weights.adapt import adapt
from tomevit.weights.foreign_configs import CONFIG_FILES, card_from_configs
from tomevit.weights.formats import FORMATS, TIMM
from tomevit.weights.recognise import (
    adopt_inferred,
    check_format,
    comparable_fields,
    differences,
    explain_recognition,
    find_format,
    infer_architecture,
)
from tomevit.weights.rules import Format, Resampling, enumerate_names

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".torch", ".tar", ".ckpt", ".npz")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a checkpoint.

    Attributes:
        source: the file, URL or repository.
        sha256: of the source's file.
        recognised: its format, and by what.
        model: what it was taken for.
        names: for each parameter, the source's tensors that it was made of.
        left_out: for all else in the source, why it is not in the result.
        changes: what was resampled, replaced or rounded: sentences.
        out: the file written.
    """

    source: str
    sha256: str
    recognised: str
    model: str
    names: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, str]
    changes: tuple[str, ...] = ()
    out: str | None = None


class Weights(NamedTuple):
    """Tensors that fit their card's config, and how they came about."""

    card: Card
    tensors: dict[str, Tensor]
    report: Report


class Located(NamedTuple):
    """A checkpoint on this machine, and what is known of it beforehand."""

    path: Path
    origin: Source  # with the whole sha256, unless the file is ours
    card: Card | None = None  # as published, or as the files beside it describe it
    format: str | None = None  # as published
    downloaded: bool = False

    @property
    def name(self) -> str:
        """By which the user knows it: a download's own path is soon gone."""
        repo = f"hf-hub:{self.origin.hub}@{self.origin.revision}" if self.origin.hub else None
        return (self.downloaded and (self.origin.url or repo)) or str(self.path)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: str | Card | None = None,
    format: str | None = None,  # noqa: A002
    key: str | None = None,
    num_classes: int | None = None,
    img_size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    ask: Callable[[AmbiguousCheckpointError], str] | None = None,
) -> Report:
    """Write a checkpoint of any known format as a file of tomevit's own.

    Args:
        source: a file; a directory with model.safetensors and config.json; a URL; hf-hub:owner/repo[@revision]; or a
            name of the zoo, whose weights are then downloaded.
        out: the file to write, which appears whole or not at all; None: MODEL.safetensors, where there is none yet.
        model: what the checkpoint is, as a name of the zoo or a card of your own; None: as recognised.
        format: a name in `tomevit.weights.formats.FORMATS`; None: as recognised.
        key: where in the file the state dict lies, if it holds several.
        num_classes: another class count puts fresh weights into the head, or into both heads of a distilled model.
        img_size: (height, width) in pixels; positions are resampled as the source's project does it.
        dtype: floating; None: the source's.
        ask: called where the checkpoint fits several things, returns one of the error's choices; None: the error.

    Raises:
        CheckpointError: the file is damaged or hostile, fits no model, or not the one that was named.
        AmbiguousCheckpointError: it fits several formats or models.
        DownloadError: it could not be had.
        ValueError: a name or an option that does not exist.
        FileNotFoundError, OSError: nothing to read, or no place to write.
    """
    shape = {"num_classes": num_classes, "img_size": img_size}
    _check_before_reading(out, model, format, shape)
    told: dict[str, Any] = {"model": model, "format": format, "key": key}
    with locate(source) as located:
        while True:
            try:
                weights = read(located, **told, img_size=img_size)
                break
            except AmbiguousCheckpointError as error:
                if ask is None:
                    raise
                told[error.option] = ask(error)
        if isinstance(model, str) and not _same_model(weights.card, zoo.card(model)):
            raise CheckpointError(f"{located.name} holds {weights.card.full_name} by its own account, and not {model}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # new heads: equal sources make equal files
            card, tensors, report = fit(weights, shape, _card(model))
        changes, stored = report.changes, tensors["pos_embed"].dtype
        if dtype is not None and dtype != stored:
            changes += (_check_dtype(tensors, stored, dtype),)
        path = Path(out or f"{card.full_name}.safetensors")
        if out is None and path.exists():
            raise ValueError(f"{path} exists already: name the file to write")
        if path.exists() and path.samefile(located.path):
            raise ValueError(f"{path} is the source itself: name another file to write")
        native.write(path, card, tensors, dtype=dtype)
    return replace(report, changes=changes, out=str(path))


def _check_before_reading(
    out: str | os.PathLike[str] | None,
    model: str | Card | None,
    format: str | None,  # noqa: A002
    shape: Mapping[str, Any],
) -> None:
    """What can be known to be wrong before a download should be."""
    if out is not None:
        check_output(out)
    if format is not None:
        check_format(format)
    if model is not None:
        config = _card(model).config
        replace(config, **{name: value for name, value in shape.items() if value is not None})


def _check_dtype(tensors: Mapping[str, Tensor], old: torch.dtype, new: torch.dtype) -> str:
    """What a change of dtype does.

    Raises:
        ValueError: values overflow; the message names the tensors.
    """
    if torch.promote_types(old, new) == new:
        return f"{_short(old)} made {_short(new)}, without loss"
    most = torch.finfo(new).max
    if large := [name for name, tensor in tensors.items() if torch.stack(tensor.aminmax()).abs().max() > most]:
        raise ValueError(f"{_short(new)} ends at {most:g}, and there are larger values in {enumerate_names(large)}")
    return f"{_short(old)} rounded to {_short(new)}"


def published(card: Card) -> Weights:
    """The card's weights, downloaded and converted on first use; from then on only our own file is read.

    Raises:
        ValueError: none are published.
        CheckpointError, DownloadError: as `convert`.
    """
    if not card.sources:
        raise ValueError(f"no weights are published for {card.full_name}: pretrained= takes a file of your own")
    return read_native(_cached(card, lambda fetched: _published(card, fetched)))


def pretrained(source: str | os.PathLike[str], model: str, *, img_size: tuple[int, int] | None = None) -> Weights:
    """Weights that a user names, for a model of that name. What a URL gave is cached.

    Args, Raises: as `convert`.
    """
    if (url := os.fspath(source)).startswith(("http://", "https://")):
        card = _reference(url)
        if card.weights:
            _named(model, card)
            return read_native(_cached(card, lambda fetched: _published(zoo.card(card.full_name), fetched)), model)
        # What is made of an unknown file depends on what it is taken for.
        distinct = hashlib.sha256(f"{url} {model} {img_size}".encode()).hexdigest()[:16]
        card = replace(card, name=f"{card.name}-{distinct}")

        def locate_fetched(fetched: hub.Fetched) -> Located:
            return _known(fetched.path, fetched.source, {}, downloaded=True)

        return read_native(_cached(card, locate_fetched, model=model, img_size=img_size), model)
    if "." in url and url in zoo.list_models(weights=True) and not os.path.exists(url):  # noqa: PTH110
        weights = published(zoo.card(url))
        _named(model, weights.card)
        return weights
    with locate(source) as located:
        weights = read(located, model=model, img_size=img_size)
    if not (located.downloaded or is_ours(located.path)):
        # They are mapped from a file that a user may write anew, in place, while the model is in use.
        for name in list(weights.tensors):
            weights.tensors[name] = weights.tensors[name].clone()
    return weights


def _cached(card: Card, locate_fetched: Callable[[hub.Fetched], Located], **told: Any) -> Path:
    def write(fetched: hub.Fetched, draft: Path) -> None:
        weights = read(locate_fetched(fetched), **told)
        native.write(draft, weights.card, weights.tensors)

    return hub.cached(card, write)


@contextmanager
def locate(source: str | os.PathLike[str]) -> Iterator[Located]:
    """The file that a user means, downloaded if need be; a download lasts as long as the context."""
    name = os.fspath(source)
    path = Path(name)
    if not name:
        raise ValueError("the source's name is empty: give a file, a URL, hf-hub:owner/repo or a name of the zoo")
    if name.startswith(("http://", "https://", "hf-hub:")):
        with _fetch(_reference(name)) as located:
            yield located
    elif path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(f"{name} is a directory without model.safetensors: name the checkpoint file")
        yield _known(path / "model.safetensors", _local(path / "model.safetensors"), _beside(path))
    elif is_ours(path):
        yield Located(path, Source(format="tomevit", file=path.name))
    elif path.exists():
        yield _known(path, _local(path), _beside(path.parent) if path.name in hub.HUB_FILES else {})
    else:
        with _fetch(card_of_name(name)) as located:
            yield located


@contextmanager
def _fetch(card: Card) -> Iterator[Located]:
    with hub.fetch(card) as fetched:
        if card.weights:
            yield _published(zoo.card(card.full_name), fetched)
        else:
            beside = hub.beside(fetched.source, CONFIG_FILES) if fetched.source.hub else {}
            yield _known(fetched.path, fetched.source, beside, downloaded=True)


def _published(card: Card, fetched: hub.Fetched) -> Located:
    return Located(fetched.path, fetched.source, card, fetched.source.format, downloaded=True)


def card_of_name(name: str) -> Card:
    """The card of what is no file.

    Raises:
        FileNotFoundError: the name looks like a file's.
        ValueError: there is no such model.
    """
    path = Path(name)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no file {name}")
    try:
        return zoo.card(name)
    except ValueError as error:
        raise ValueError(f"there is no file {name}, and {str(error).replace('there is ', '', 1)}") from error


def _reference(name: str) -> Card:
    """What is known of a URL or hf-hub:owner/repo[@revision] beforehand: a card with this one source.

    It is that of the weights published there, so that their hash is checked, or has no more than the address.
    """
    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    on_hub = name.startswith("hf-hub:")
    for card, source in zoo.published():
        if (on_hub and repo == source.hub and revision in ("", source.revision)) or name == source.url:
            return replace(card, sources=(source,))
    if not on_hub:
        distinct = hashlib.sha256(name.encode()).hexdigest()[:16]
        return Card(name=f"url-{distinct}", sources=(Source(format="", url=name),))
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"{name} names no repository: it must be hf-hub:owner/repo or hf-hub:owner/repo@revision")
    return Card(name=repo.replace("/", "--"), sources=(Source(format="", hub=repo, revision=revision or None),))


def _local(path: Path) -> Source:
    return Source(format="", file=path.name, sha256=files.sha256(path))


def _beside(directory: Path) -> dict[str, Path]:
    return {name: directory / name for name in CONFIG_FILES if (directory / name).is_file()}


def _known(path: Path, origin: Source, beside: Mapping[str, Path], *, downloaded: bool = False) -> Located:
    """What the zoo knows of a file by its hash, or else the files beside it."""
    assert origin.sha256 is not None
    for card, source in zoo.published():
        if source.sha256 is not None and origin.sha256.startswith(source.sha256):
            origin = replace(source, sha256=origin.sha256, revision=origin.revision, file=origin.file)
            return Located(path, origin, card, source.format, downloaded)
    return Located(path, origin, card_from_configs(beside) if beside else None, None, downloaded)


def read(
    located: Located,
    *,
    model: str | Card | None = None,
    format: str | None = None,  # noqa: A002
    key: str | None = None,
    img_size: tuple[int, int] | None = None,
) -> Weights:
    """Tensors under native names, checked against the architecture: as they are, nothing resampled or replaced.

    Args, Raises: as `convert`; img_size helps only to read positions of a grid that is not square.
    """
    with _naming(located):
        if is_ours(located.path):
            if format or key:
                raise ValueError(f"{located.path} is a file of tomevit's own: it takes neither a format nor a key")
            return read_native(located.path, model)
        checkpoint = files.open_checkpoint(located.path, key=key)
        names = list(checkpoint.tensors)
        known = model is not None or located.card is not None
        form = find_format(names, checkpoint.key, format or located.format, model_known=known)
        heads = form.count_heads(checkpoint.tensors)
        tensors, sources, left_out = rules.to_native(form, checkpoint.tensors)
        left_out |= dict.fromkeys(checkpoint.beside, "not weights of the model")
        if any(reason == rules.PRE_LOGITS for reason in left_out.values()):
            left_out |= _drop_heads(tensors, sources, rules.PRE_LOGITS)

        observed = infer_architecture(tensors)
        card = _choose(located, model, form, observed)
        if card.weights and not card.config.num_classes and observed["num_classes"]:
            left_out |= _drop_heads(tensors, sources, f"{card.full_name} is published without a classifier")
            observed = infer_architecture(tensors)
        if heads not in (None, card.config.num_heads):
            raise CheckpointError(f"it has {heads} attention heads, and {card.name} has {card.config.num_heads}")
        config = adopt_inferred(card.config, observed, img_size)
        native.check_structure(config, tensors, "it")
        changes = _check_values(tensors)

    if config != card.config:
        card = replace(card, figures=())
    if config.num_classes != card.config.num_classes:
        card = replace(card, class_names=())
    origin = replace(located.origin, format=form.name)
    card = replace(card, config=config, origin=origin)
    report = Report(
        source=located.name,
        sha256=origin.sha256 or "",
        recognised=explain_recognition(form, names, checkpoint.key),
        model=card.full_name,
        names=sources,
        left_out=left_out,
        changes=changes,
    )
    return Weights(card, tensors, report)


def fit(weights: Weights, wanted: Mapping[str, Any], model: Card | None = None) -> Weights:
    """Weights adapted to fields of the config that are not None, by the rule of the project that they come from.

    Args:
        model: what they are for, if that was said; an encoder without a head takes on its pooling.

    Raises:
        ValueError: a field has no such value.
    """
    card, tensors, report = weights
    if model is not None and model.config.pool_norm != card.config.pool_norm:
        card = replace(card, name=model.name, weights=None, timm=model.timm, title=model.title, papers=model.papers)
        wanted = {"pool": model.config.pool, "pool_norm": model.config.pool_norm, **wanted}
    config = replace(card.config, **{name: value for name, value in wanted.items() if value is not None})
    card, tensors, changes = adapt(card, tensors, config, resampling(card))
    return Weights(card, tensors, replace(report, changes=(*report.changes, *changes)))


def resampling(card: Card) -> Resampling:
    """How positions are resampled: as the project does that the weights come from, timm's way for our own."""
    return FORMATS.get(card.origin.format if card.origin else "", TIMM).resampling


def read_native(path: Path, model: str | Card | None = None) -> Weights:
    """The weights in a file of ours; with a model named, of that architecture or a CheckpointError."""
    card, tensors, _ = native.read(path)
    return _described(card, tensors, str(path), model)


def of_model(source: nn.Module, model: str) -> Weights:
    """A copy of a model's weights, for a model of that name.

    Raises:
        ValueError: it is none of ours.
        CheckpointError: as `read_native`.
    """
    source = unwrap(source)
    if not isinstance(source, VisionTransformer):
        hint = ": give its encoder" if isinstance(source, MaskedAutoencoder) else ""
        raise ValueError(f"pretrained is a {type(source).__name__}, and no model to take weights from{hint}")
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in source.state_dict().items()}
    return _described(native.card_of(source), tensors, "the model", model)


def _described(card: Card, tensors: dict[str, Tensor], source: str, model: str | Card | None) -> Weights:
    named, headless = _card(model), not card.config.num_classes
    if named is not None and (wrong := differences(comparable_fields(card.config), named.config, headless=headless)):
        raise CheckpointError(
            f"{source} holds {card.full_name or 'a model without a name'}, which is no {named.name}: {'; '.join(wrong)}"
        )
    if isinstance(model, str) and "." in model and card.weights not in (None, named and named.weights):
        raise CheckpointError(f"{source} holds {card.full_name}, and not {model}")
    report = Report(
        source=source,
        sha256=card.origin.sha256 or "" if card.origin else "",
        recognised="tomevit: its metadata describes it",
        model=card.full_name,
        names={name: (name,) for name in tensors},
        left_out={},
    )
    return Weights(card, tensors, report)


def _choose(located: Located, model: str | Card | None, form: Format, observed: Mapping[str, Any]) -> Card:
    """The card of what was observed: the one that was named, the one that is known, or the only one that fits."""
    if model is not None:
        card = _named(model, located.card)
    elif located.card is not None:
        card = located.card
    else:
        return _only(located, form, observed)
    if wrong := differences(observed, card.config, headless=not observed["num_classes"]):
        fits = _fitting(observed)
        instead = f"It fits {either(card.name for card in fits)}" if fits else _nearest(observed)
        raise CheckpointError(f"it does not fit {card.name}: {'; '.join(wrong)}. {instead}")
    return card


def _card(model: str | Card | None) -> Any:
    return zoo.card(model) if isinstance(model, str) else model


def _same_model(known: Card, asked: Card) -> bool:
    """Of the same name, or an encoder without a head for one that pools otherwise."""
    if known.config.pool_norm == asked.config.pool_norm or known.config.num_classes:
        return known.name == asked.name
    return not differences(comparable_fields(known.config), asked.config, headless=True)


def _named(model: str | Card, known: Card | None) -> Card:
    """The user's word, completed by what is known of the file."""
    if isinstance(model, Card):
        return model
    card = zoo.card(model) if "." in model else zoo.architecture(model)
    if known is None:
        # Figures are of the published file, and this may be another.
        return replace(card, figures=())
    if known.weights:
        if not _same_model(known, card) or card.weights not in (None, known.weights):
            raise CheckpointError(f"it is {known.full_name} by its address or hash, and not {model}")
        return known
    if wrong := differences(comparable_fields(known.config), card.config):
        raise CheckpointError(f"it is {known.name} by the files beside it, and no {card.name}: {'; '.join(wrong)}")
    return replace(
        card,
        config=replace(known.config, prop_attn=card.config.prop_attn, init=card.config.init),
        preprocess=known.preprocess,
        licence=known.licence or card.licence,
        figures=(),
        class_names=known.class_names,
    )


def _only(located: Located, form: Format, observed: Mapping[str, Any]) -> Card:
    """The one architecture that was observed, of the families that are published in this format."""
    published = {(card.title, source.format) for card, source in zoo.published()}
    fits = [
        card for card in _fitting(observed) if {(card.title, form.name), (card.title, form.variant_of)} & published
    ] or _fitting(observed)
    if not fits:
        raise CheckpointError(f"it fits no model here. {_nearest(observed)}, or describe yours by a Card as model=")
    # One per family: other resolutions of the same differ in nothing that weights have.
    families = {card.title: card for card in reversed(fits)}
    families |= {card.title: card for card in fits if card.config.num_positions == observed["positions"]}
    same_file = [
        card.full_name
        for card, source in zoo.published()
        if located.origin.file and (source.url or "").endswith(f"/{located.origin.file}") and not source.sha256
    ]
    choices = [*same_file, *sorted(card.name for card in families.values())]
    if len(choices) > 1:
        named = " (by its name it is the first)" if same_file else ""
        raise AmbiguousCheckpointError(
            f"it fits {either(choices)}{named}, which differ in preprocessing, merging or licence: "
            f"say which it is with model=, or --model",
            "model",
            choices,
        )
    return next(iter(families.values()))


def _fitting(observed: Mapping[str, Any]) -> list[Card]:
    return [card for card in zoo.architectures() if not differences(observed, card.config)]


def _nearest(observed: Mapping[str, Any]) -> str:
    def distance(card: Card) -> tuple[int, float]:
        config = card.config
        sizes = abs(config.embed_dim - observed["embed_dim"]) / config.embed_dim
        sizes += abs(config.depth - observed["depth"]) / config.depth
        return len(differences(observed, config)), sizes

    card = min(zoo.architectures(), key=distance)
    return f"The nearest is {card.name}: {'; '.join(differences(observed, card.config))}"


def _drop_heads(tensors: dict[str, Tensor], sources: dict[str, tuple[str, ...]], reason: str) -> dict[str, str]:
    heads = [name for name in tensors if name.startswith(("head.", "head_dist."))]
    dropped = {source: reason for name in heads for source in sources.pop(name)}
    for name in heads:
        del tensors[name]
    return dropped


def _check_values(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """All floating, of one dtype, finite; a mixture of dtypes becomes the widest.

    Raises:
        CheckpointError: naming the tensors that are not.
    """
    if integers := [name for name, tensor in tensors.items() if tensor.dtype not in native.DTYPES]:
        kinds = {_short(tensors[name].dtype) for name in integers}
        raise CheckpointError(f"weights must be floating point: {enumerate_names(integers)} are {either(kinds)}")
    bad = [name for name, tensor in tensors.items() if not finite(tensor)]
    if bad:
        raise CheckpointError(f"it holds NaN or infinity, in {enumerate_names(bad)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        return ()
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(widest)
    return (f"a mixture of {either(sorted(map(_short, dtypes)))} made {_short(widest)} throughout, without loss",)


def finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it; without a copy of its size."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


@contextmanager
def _naming(located: Located) -> Iterator[None]:
    """Errors about a file begin with the name that its user knows."""
    try:
        yield
    except CheckpointError as error:
        said = str(error)
        if said.startswith(str(located.path)):
            error.args = (located.name + said.removeprefix(str(located.path)),)
        else:
            error.args = (f"{located.name}: {said}",)
        raise


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
