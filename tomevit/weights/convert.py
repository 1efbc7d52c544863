"""From a checkpoint of any known format to ours: open, recognise, rename by table, adapt, check, write."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomevit import zoo
from tomevit.cards import Card, Contents, is_ours
from tomevit.config import Config, Source
from tomevit.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    MissingOptionError,
    check_path,
    check_type,
    join_with_or,
)
from tomevit.models import unwrap_transformer
from tomevit.output import check_output
from tomevit.weights import cache, checkpoint, files, live, rules, sources
from tomevit.weights.adapt import adapt
from tomevit.weights.formats import FORMATS, NO_BIAS, TIMM
from tomevit.weights.reading import explain_lack_of_memory
from tomevit.weights.recognise import (
    ADOPTED,
    OF_FOUR_BLOCKS,
    OF_OPENAI,
    Found,
    adopt_inferred,
    check_format,
    check_not_head_alone,
    choose_card,
    complete_told,
    differences,
    explain_recognition,
    fields_of_named,
    find_head_beside,
    find_heads,
    find_model,
    find_projection_beside,
    holds_model,
    infer_architecture,
    is_same_model,
    name_sets_with_heads,
)
from tomevit.weights.rules import Resampling, enumerate_names


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a checkpoint.

    Attributes:
        source: the file, URL or repository.
        sha256: of the source's file; of several, of the index and the files that it lists, one after the other.
        recognised: its format, where in the file it lay, and by what it was recognised.
        model: what it was taken for.
        names: for each parameter, the source's tensors that it was made of, without what all their names begin with.
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


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: str | Card | None = None,
    format: str | None = None,  # noqa: A002
    key: str | None = None,
    prefix: str | None = None,
    num_classes: int | None = None,
    img_size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    ask: Callable[[AmbiguousCheckpointError], str] | None = None,
) -> Report:
    """Write a checkpoint of any known format as a file of tomevit's own.

    Args:
        source: a file; a directory with one checkpoint, as model.safetensors and config.json; the index of several
            files; a URL; hf-hub:owner/repo[@revision]; or a name of the zoo, whose weights are then downloaded.
        out: the file to write, which appears whole or not at all; None: MODEL.safetensors, where there is none yet.
        model: what the checkpoint is, as a name of the zoo or a card of your own; None: as recognised.
        format: a name in `tomevit.weights.formats.FORMATS`; None: as recognised.
        key: where in the file the state dict lies, if it holds several.
        prefix: what the names of the model's parameters begin with, as in "student.backbone.", if the state dict holds
            several models; "." for nothing.
        num_classes: another class count puts fresh weights into the head, or into both heads of a distilled model; so
            does any where the source's head is more than one linear layer.
        img_size: (height, width) in pixels; positions are resampled as the source's project does it.
        dtype: floating; None: the source's.
        ask: called where the checkpoint fits several things, returns one of the error's choices; None: the error.

    Raises:
        CheckpointError: the file is damaged or hostile, fits no model, or not the one that was named.
        MissingOptionError, AmbiguousCheckpointError: it fits several formats or models, or holds several: the message
            says with which argument to name one.
        DownloadError: it could not be had.
        ValueError: a name or an option that does not exist.
        FileNotFoundError, OSError: nothing to read, or no place to write.
    """
    check_type("dtype", dtype, torch.dtype | None, "a floating one of torch's, as in torch.float16")
    shape = {"num_classes": num_classes, "img_size": img_size}
    _check_before_reading(out, model, format, shape)
    told: dict[str, Any] = {"model": model, "format": format, "key": key, "prefix": prefix}
    with sources.locate(source) as located:
        weights = _read_asking(located, told, img_size, ask, fresh_head=num_classes is not None)
        if isinstance(model, str) and not is_same_model(weights.card, zoo.card(model)):
            raise CheckpointError(f"{located.name} holds {weights.card.full_name} by its own account, and not {model}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # new heads: equal sources make equal files
            card, tensors, report = adapt_weights(weights, shape, _card_of_model(model))
        changes, stored = report.changes, next(iter(tensors.values())).dtype
        if dtype is not None and dtype != stored:
            changes += (_check_dtype(tensors, stored, dtype),)
        path = Path(out or f"{card.full_name}.safetensors")
        if out is None and path.exists():
            raise ValueError(f"{path} exists already: name the file to write")
        checkpoint.write(check_output(path, inputs=located.paths), card, tensors, dtype=dtype)
    return replace(report, changes=changes, out=str(path))


def _read_asking(
    located: sources.Located,
    told: dict[str, Any],
    img_size: tuple[int, int] | None,
    ask: Callable[[AmbiguousCheckpointError], str] | None,
    *,
    fresh_head: bool,
) -> Weights:
    """As `read_weights`; where the checkpoint fits several things, the user is asked, and told has the answer."""
    while True:
        try:
            return read_weights(located, **told, img_size=img_size, fresh_head=fresh_head)
        except AmbiguousCheckpointError as error:
            if ask is None:
                raise
            told[error.option] = ask(error)


def _check_before_reading(
    out: str | os.PathLike[str] | None,
    model: str | Card | None,
    format: str | None,  # noqa: A002
    shape: Mapping[str, Any],
) -> None:
    """What can be known to be wrong before a download should be."""
    if out is not None:
        check_output(out, endings=(".safetensors",))
    if format is not None:
        check_format(format)
    if model is not None:
        config = _card_of_model(model).config
        replace(config, **{name: value for name, value in shape.items() if value is not None})


def _check_dtype(tensors: Mapping[str, Tensor], old: torch.dtype, new: torch.dtype) -> str:
    """What a change of dtype does.

    Raises:
        ValueError: values overflow; the message names the tensors.
    """
    if torch.promote_types(old, new) == new:
        return f"{dtype_name(old)} made {dtype_name(new)}, without loss"
    most = torch.finfo(new).max
    if large := [name for name, tensor in tensors.items() if torch.stack(tensor.aminmax()).abs().max() > most]:
        raise ValueError(f"{dtype_name(new)} ends at {most:g}, and there are larger values in {enumerate_names(large)}")
    return f"{dtype_name(old)} rounded to {dtype_name(new)}"


def weights_of(source: nn.Module | str | os.PathLike[str], model: str | Card | None = None) -> Weights:
    """The weights that a user means, under native names: what every function and command asks that takes a model.

    Args, Returns, Raises: as `open_weights`. Where that asks for an argument, which the caller does not take, the error
    says that `tomevit convert` does.
    """
    with _pointing_to_convert():
        return open_weights(source, model)


def open_weights(
    source: nn.Module | str | os.PathLike[str],
    model: str | Card | None = None,
    *,
    format: str | None = None,  # noqa: A002
    key: str | None = None,
    prefix: str | None = None,
    img_size: tuple[int, int] | None = None,
    fresh_head: bool = False,
) -> Weights:
    """The weights that a user means, under native names.

    Args:
        source: a model, in a wrapper of torch's or not, of tomevit's or one that `tomevit.from_module` takes; a
            checkpoint of any known format: a file, a directory, a URL, hf-hub:owner/repo[@revision]; or a name of the
            zoo, timm's among them. Published weights and what a URL gives are converted into the cache; the card of
            published ones is the zoo's of today.
        model: what they must be; None: what they are.
        format, key, prefix: of a checkpoint, as `convert` takes them.
        img_size: helps only to read positions of a grid that is not square.
        fresh_head: whether the head will be replaced, and need not be one linear layer.

    Returns:
        Tensors as they are, nothing resampled: a model's own, copies of another library's; of a file copies, which no
        longer need it; those mapped from a file in the cache, where tomevit alone writes.

    Raises:
        ValueError, CheckpointError, DownloadError, FileNotFoundError: as `convert`.
    """
    if isinstance(source, nn.Module):
        _check_not_told("the model", format, key, prefix)
        if (described := live.describe(source)) is not None:
            return _read_live(described, model, fresh_head=fresh_head)
        source = unwrap_transformer(source)
        tensors = {name: tensor.detach() for name, tensor in checkpoint.state_dict_of(source).items()}
        checkpoint.check_whole(tensors)
        return _as_described(checkpoint.card_of(source), tensors, "the model", model)
    check_path("source", source, "a model, a file, a URL, hf-hub:owner/repo or a name of the zoo")
    name = os.fspath(source)
    told: dict[str, Any] = {"model": model, "format": format, "key": key, "prefix": prefix}
    told |= {"img_size": img_size, "fresh_head": fresh_head}
    if zoo.is_elsewhere(name):
        card = sources.card_of_source(name)
        if card.weights:
            _check_not_told(card.full_name, format, key, prefix)
            if model is not None:
                complete_told(model, card)
            return published_weights(card)
        if not card.sources:
            raise ValueError(f"no weights are published for {card.full_name}: give a file of your own")
        if card.sources[0].url:
            # What is made of an unknown file depends on what it is taken for.
            said = [f"{name} {model} {img_size}", *filter(None, (format, key, prefix)), *["fresh head"] * fresh_head]
            distinct = hashlib.sha256(" ".join(said).encode()).hexdigest()[:16]
            stored = _read_cached(card, variant=distinct, **told)
            published = sources.find_published(stored.card.origin)
            if published is None or published[0].full_name != stored.card.full_name:
                return stored
            return _with_card_of_today(stored, published[0])
    with sources.locate(name) as located:
        return read_weights(located, **told)


@contextmanager
def _pointing_to_convert() -> Iterator[None]:
    """What is asked for, tomevit convert takes."""
    try:
        yield
    except MissingOptionError as error:
        error.args = (f"{error} of tomevit convert, whose file every command and function takes",)
        raise


def _check_not_told(what: str, format: str | None, key: str | None, prefix: str | None) -> None:  # noqa: A002
    """Raises ValueError if the user says where in a file the model lies that describes itself."""
    if format or key or prefix:
        raise ValueError(f"{what} takes neither a format nor a key nor a prefix")


def published_weights(card: Card) -> Weights:
    """The card's weights, downloaded and converted on first use; from then on only our own file is read.

    The card is the one given, which is the zoo's of today, with the shape and origin that the file has.

    Raises:
        ValueError: none are published.
        CheckpointError, DownloadError: as `convert`.
    """
    if not card.sources:
        raise ValueError(f"no weights are published for {card.full_name}: pretrained= takes a file of your own")
    return _with_card_of_today(_read_cached(card), zoo.card(card.full_name))


def _with_card_of_today(stored: Weights, current: Card) -> Weights:
    shape = {name: getattr(stored.card.config, name) for name in ADOPTED}
    current = replace(with_config(current, replace(current.config, **shape)), origin=stored.card.origin)
    checkpoint.check_structure(current.config, stored.tensors, stored.report.source)
    return stored._replace(card=current)


def with_config(card: Card, config: Config) -> Card:
    """The card with a config that differs in shape alone, and without what does not hold of it."""
    figures = card.figures if config == card.config else ()
    class_names = card.class_names if config.num_classes == card.config.num_classes else ()
    return replace(card, config=config, figures=figures, class_names=class_names)


def _read_cached(card: Card, *, variant: str = "", model: str | Card | None = None, **told: Any) -> Weights:
    """The weights of a card's first source that can be had, converted on first use."""

    def write(fetched: cache.Fetched, draft: Path) -> None:
        weights = read_weights(sources.locate_fetched(fetched, card), model=model, **told)
        if card.weights:  # the positions of some are published at another size than that of their figures
            weights = adapt_weights(weights, {"img_size": card.config.img_size})
        checkpoint.write(draft, weights.card, weights.tensors)

    path = cache.cached(card, write, variant=variant)
    return read_own_file(path, model, mapped=cache.holds(path))


def inspect(source: str | os.PathLike[str]) -> Contents:
    """What a checkpoint of any known format says of itself.

    Raises:
        CheckpointError, FileNotFoundError: as `convert`.
    """
    with _pointing_to_convert(), sources.locate(source) as located:
        card, tensors, report = read_weights(located)
        dtypes = Counter(dtype_name(tensor.dtype) for tensor in tensors.values())
        size = sum(path.stat().st_size for path in located.paths)
    return Contents(located.path, card, None, size, report.recognised, dict(dtypes), dict(report.left_out))


def read_weights(
    located: sources.Located,
    *,
    model: str | Card | None = None,
    format: str | None = None,  # noqa: A002
    key: str | None = None,
    prefix: str | None = None,
    img_size: tuple[int, int] | None = None,
    fresh_head: bool = False,
) -> Weights:
    """Tensors under native names, checked against the architecture: as they are, nothing resampled or replaced.

    Args, Raises: as `open_weights` and `convert`.
    """
    with sources.name_errors_after(located), explain_lack_of_memory(located.name):
        if is_ours(located.path):
            _check_not_told(f"{located.path} is a file of tomevit's own: it", format, key, prefix)
            return read_own_file(located.path, model)
        told = format or located.origin.format or None
        found = files.open_checkpoint(
            located.files or located.path, key=key, holds_model=partial(holds_model, told=told)
        )
        return _read_found(
            found,
            located,
            model=model,
            format=told,
            format_told=format is not None,
            prefix=prefix,
            img_size=img_size,
            fresh_head=fresh_head,
        )


def _read_live(described: live.Described, model: str | Card | None, *, fresh_head: bool) -> Weights:
    """The weights of another library's model, as if they were read from a file, with what the model says of itself.

    Raises:
        CheckpointError: as `read_weights`.
    """
    found = files.Checkpoint(described.name, "memory", "", "", dict(described.tensors))
    located = sources.Located(Path(described.name), Source(format=""))
    with sources.name_errors_after(located):
        weights = _read_found(
            found,
            located,
            model=model,
            format=described.format,
            format_told=True,
            fresh_head=fresh_head,
            describe=described.card,
        )
    report = weights.report
    return weights._replace(report=replace(report, changes=(*described.changes, *report.changes)))


def _read_found(
    found: files.Checkpoint,
    located: sources.Located,
    *,
    model: str | Card | None,
    format: str | None,  # noqa: A002
    format_told: bool,
    prefix: str | None = None,
    img_size: tuple[int, int] | None = None,
    fresh_head: bool = False,
    describe: Callable[[Mapping[str, Any]], Card] | None = None,
) -> Weights:
    """The weights in a state dict.

    Args:
        found: the state dict, which is emptied.
        located: where it is from.
        format_told: whether the format is the user's word.
        describe: what the model is, given what is observed of it; None: what is known of the file.

    Raises:
        CheckpointError, AmbiguousCheckpointError, MissingOptionError: as `convert`.
    """
    known = _card_of_model(model) or located.card
    check_not_head_alone(found.tensors)
    place = find_model(
        list(found.tensors),
        found.key,
        told_format=format,
        told_prefix=prefix,
        model=_with_head_of(known, found.tensors),
    )
    form = place.form
    _check_tensors_are_such(place, found)
    theirs = {name: found.tensors[place.names[name]] for name in place.names}
    beside = {name: found.tensors[name] for name in place.left_out}
    found.tensors.clear()
    linear, other_heads = find_heads(form, theirs)
    theirs = {linear.get(name, name): theirs[name] for name in list(theirs) if name not in other_heads}
    names = {ours: name for name, ours in linear.items()}
    for part, (whole, values) in rules.unstack_layers(form, theirs).items():
        theirs[part], names[part] = values, whole
        theirs.pop(whole, None)
    heads = form.count_heads(theirs)
    tensors, made_of, omitted = rules.to_native(form, theirs)
    made_of = {native: tuple(names.get(part, part) for part in parts) for native, parts in made_of.items()}
    omitted |= _drop_zero_biases(tensors, made_of, known)
    if any(reason == rules.PRE_LOGITS for reason in omitted.values()):
        omitted |= _drop_heads(tensors, made_of, rules.PRE_LOGITS)

    if (projection := find_projection_beside(place.prefix, beside)) is not None:
        tensors["proj.weight"], made_of["proj.weight"] = beside[projection], (projection,)
        del place.left_out[projection]
    observed = infer_architecture(tensors)
    widths = {observed["proj_dim"] or observed["embed_dim"], *([2 * observed["embed_dim"]] * form.beside_mean)}
    other_heads += _find_heads_of_another_width(tensors, made_of, widths)
    if other_heads:
        if not fresh_head and (known is None or known.config.num_classes):
            raise MissingOptionError(
                f"its head, {enumerate_names(other_heads)}, is not one linear layer on the model's features: "
                f"num_classes= (--num-classes) puts a fresh one in its place, or none by 0",
                "num_classes",
            )
        reason = "not one linear layer on the model's features, as a head is here"
        omitted |= dict.fromkeys(other_heads, reason) | _drop_heads(tensors, made_of, reason)
        observed = infer_architecture(tensors)
    changes: tuple[str, ...] = ()
    headless = not (observed["num_classes"] or other_heads or observed["dist_token"])
    if headless and (layer := find_head_beside(beside, widths)):
        parts = {f"head.{kind}": f"{layer}.{kind}" for kind in ("weight", "bias") if f"{layer}.{kind}" in beside}
        for native, name in parts.items():
            tensors[native], made_of[native] = beside[name], (name,)
            del place.left_out[name]
        changes = (f"the head is {layer}, which lies beside the model",)
        observed = infer_architecture(tensors)
    elif headless and form.beside_mean and not fresh_head:
        _check_head_reads_one_block(beside, observed["embed_dim"])
    del beside
    changes += _complete_biases(tensors, made_of)
    of_openai = place.left_out.keys() | set(found.beside) >= OF_OPENAI
    card = choose_card(
        observed,
        form,
        told=model,
        known=located.card if describe is None else describe(observed),
        file=located.origin.file,
        format_told=format_told,
        act="quick_gelu" if of_openai else None,
    )
    if card.weights and not card.config.num_classes and observed["num_classes"]:
        omitted |= _drop_heads(tensors, made_of, f"{card.full_name} is published without a classifier")
        observed = infer_architecture(tensors)
    if heads not in (None, card.config.num_heads):
        raise CheckpointError(f"it has {heads} attention heads, and {card.name} has {card.config.num_heads}")
    config = adopt_inferred(card.config, observed, img_size)
    checkpoint.check_structure(config, tensors, "it")
    changes += _check_values(tensors)

    if observed["pool_norm"] == "after" and config.pool != card.config.pool:
        changes += ("the head reads the mean patch: the last norm is fc_norm",)
    if config.in_chans != card.config.in_chans:
        changes += (
            f"images of {config.in_chans} instead of {card.config.in_chans} channels, with a mean and std each",
        )
    left_out = dict.fromkeys(found.beside, "not weights of the model") | place.left_out
    left_out |= {place.names[name]: reason for name, reason in omitted.items()}
    origin = replace(located.origin, format=form.name)
    card = replace(with_config(card, config), origin=origin)
    report = Report(
        source=located.name,
        sha256=origin.sha256 or "",
        recognised=explain_recognition(form, place.names, found.key, found.prefix + place.prefix),
        model=card.full_name,
        names=made_of,
        left_out=left_out,
        changes=changes,
    )
    return Weights(card, tensors, report)


def adapt_weights(weights: Weights, wanted: Mapping[str, Any], model: Card | None = None) -> Weights:
    """Weights adapted to fields of the config that are not None, by the rule of the project that they come from.

    Args:
        model: what they are for, if that was said; an encoder without a head takes on its pooling.

    Raises:
        ValueError: a field has no such value.
    """
    card, tensors, report = weights
    if model is not None and (model.config.pool_norm, card.config.pool_norm) == ("after", "before"):
        card = replace(card, name=model.name, weights=None, timm=model.timm, title=model.title, papers=model.papers)
        card = replace(card, presets=model.presets)
        wanted = {"pool": model.config.pool, "pool_norm": model.config.pool_norm, **wanted}
    config = replace(card.config, **{name: value for name, value in wanted.items() if value is not None})
    card, tensors, changes = adapt(card, tensors, config, resampling(card))
    return Weights(card, tensors, replace(report, changes=(*report.changes, *changes)))


def resampling(card: Card) -> Resampling:
    """How positions are resampled: as the project does that the weights come from, timm's way for our own."""
    return FORMATS.get(card.origin.format if card.origin else "", TIMM).resampling


def read_own_file(path: Path, model: str | Card | None = None, *, mapped: bool = False) -> Weights:
    """The weights in a file of ours; with a model named, of that architecture or a CheckpointError."""
    header, tensors = checkpoint.read(path, mapped=mapped)
    return _as_described(header.card, tensors, str(path), model)


def _as_described(card: Card, tensors: dict[str, Tensor], source: str, model: str | Card | None) -> Weights:
    named, headless = _card_of_model(model), not card.config.num_classes
    same = named is not None and card.title == named.title
    if named is not None and (
        wrong := differences(fields_of_named(card.config, model), named.config, headless=headless, averaged=same)
    ):
        raise CheckpointError(
            f"{source} holds {card.full_name or 'a model without a name'}, which is no {named.name}: {'; '.join(wrong)}"
        )
    if isinstance(model, str) and "." in model and card.weights not in (None, named and named.weights):
        raise CheckpointError(f"{source} holds {card.full_name}, and not {model}")
    if named is not None and card.name == named.name and not card.presets:
        card = replace(card, presets=named.presets)  # files of earlier versions have none
    report = Report(
        source=source,
        sha256=card.origin.sha256 or "" if card.origin else "",
        recognised="tomevit: its metadata describes it",
        model=card.full_name,
        names={name: (name,) for name in tensors},
        left_out={},
    )
    return Weights(card, tensors, report)


def _card_of_model(model: str | Card | None) -> Any:
    check_type("model", model, str | Card | None, "a name of the zoo or a Card")
    return zoo.card(model) if isinstance(model, str) else model


def _with_head_of(known: Card | None, tensors: Mapping[str, Tensor]) -> Card | None:
    """What is known of a tower that projects; with a classifier in place of the projection if the head is no such."""
    if known is None or not known.config.proj_dim:
        return known
    outputs = {len(x) for name, x in tensors.items() if x.ndim == 2 and f".{name}".endswith(".head.weight")}
    if not outputs or known.config.proj_dim in outputs:
        return known
    return replace(known, config=replace(known.config, proj_dim=0, num_classes=max(outputs)))


def _drop_heads(tensors: dict[str, Tensor], sources: dict[str, tuple[str, ...]], reason: str) -> dict[str, str]:
    heads = [name for name in tensors if name.startswith(("head.", "head_dist."))]
    dropped = {source: reason for name in heads for source in sources.pop(name)}
    for name in heads:
        del tensors[name]
    return dropped


def _drop_zero_biases(
    tensors: dict[str, Tensor], sources: dict[str, tuple[str, ...]], known: Card | None
) -> dict[str, str]:
    """Biases of 0 that DINOv3's queries, keys and values have in some files (timm's `qkvb`), and its models not."""
    biases = [name for name in tensors if name.endswith(".attn.qkv.bias")]
    without = known is None or not known.config.qkv_bias
    if not without or "pos_embed" in tensors or any(tensors[name].any() for name in biases):
        return {}
    for name in biases:
        del tensors[name]
    return {source: NO_BIAS for name in biases for source in sources.pop(name)}


def _check_tensors_are_such(place: Found, found: files.Checkpoint) -> None:
    """Raises CheckpointError if a parameter is something else than a tensor: without it the model is another."""
    above = f"{found.key}." if found.key else ""
    for name in found.beside:
        plain = rules.without_wrappers(name.removeprefix(above))
        is_inside = name.startswith(above) and plain.startswith(place.prefix)
        if is_inside and place.form.has_place_for(plain.removeprefix(place.prefix)):
            raise CheckpointError(f"its {name} is no tensor that tomevit reads")


def _find_heads_of_another_width(
    tensors: dict[str, Tensor], sources: dict[str, tuple[str, ...]], widths: Collection[int]
) -> list[str]:
    """The source's names of heads that stand on more or less than the features that a head reads here."""
    heads = [name for name in ("head.weight", "head_dist.weight") if name in tensors]
    shapes = {(width,) for width in widths}
    return [source for name in heads if tuple(tensors[name].shape[1:]) not in shapes for source in sources[name]]


def _check_head_reads_one_block(beside: Mapping[str, Tensor], dim: int) -> None:
    """Raises MissingOptionError if the head beside a model reads several of its blocks: it would be lost in silence."""
    if layer := find_head_beside(beside, {OF_FOUR_BLOCKS * dim}):
        sets = name_sets_with_heads(dim)
        instead = f"the zoo's {join_with_or(sets)} has such a head, and " if sets else ""
        raise MissingOptionError(
            f"its head, {layer}, reads the class tokens of the last four blocks beside the mean patch, and a head here "
            f"reads the last block alone: {instead}num_classes= (--num-classes) puts a fresh one in its place, or none "
            f"by 0",
            "num_classes",
        )


def _complete_biases(tensors: dict[str, Tensor], sources: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Heads of linear layers without a bias get one of zeros."""
    changes: tuple[str, ...] = ()
    for head in ("head", "head_dist"):
        if f"{head}.weight" in tensors and f"{head}.bias" not in tensors:
            tensors[f"{head}.bias"] = torch.zeros_like(tensors[f"{head}.weight"][:, 0])
            sources[f"{head}.bias"] = ()
            changes += (f"a bias of zeros given to {head}, which has none",)
    return changes


def _check_values(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """All floating, of one dtype, finite; a mixture of dtypes becomes the widest.

    Raises:
        CheckpointError: naming the tensors that are not.
    """
    if integers := [name for name, tensor in tensors.items() if tensor.dtype not in checkpoint.DTYPES]:
        kinds = {dtype_name(tensors[name].dtype) for name in integers}
        raise CheckpointError(f"weights must be floating point: {enumerate_names(integers)} are {join_with_or(kinds)}")
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise CheckpointError(f"it holds NaN or infinity, in {enumerate_names(bad)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        return ()
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(widest)
    mixture = join_with_or(sorted(map(dtype_name, dtypes)))
    return (f"a mixture of {mixture} made {dtype_name(widest)} throughout, without loss",)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it; without a copy of its size."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
