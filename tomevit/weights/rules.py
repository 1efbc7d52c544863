"""The engine that reads tables of parameter names in both directions.

A checkpoint format is a table of rules. Each relates one native parameter to the source's tensors:

    Rule("blocks.#.norm1.*", "encoder.layers.layer_#.ln_1.*")

`#` stands for a number and `*` for `weight` or `bias`, the same on both sides. Where the source keeps in several
tensors what is one here, the rule names them in order. A layout says how values are arranged anew on the way in, and
read backwards on the way out; nothing is computed, so a round trip is exact to the bit. The one exception, a class
token's position, is the format's word: see `Format.folds_class_position`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from heapq import nsmallest
from typing import Any, Literal, NamedTuple

import torch
from einops import EinopsError, rearrange, reduce
from torch import Tensor

from tomevit.config import Config
from tomevit.errors import CheckpointError

#: What wrappers put into names: data parallelism, torch.compile, checkpointed activations, FSDP, trainers.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module")
)

MOST_MODELS = 16  # in one state dict


def without_wrappers(name: str) -> str:
    """A parameter's name as it is without the wrappers around the modules that it lies in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Rule:
    """One native parameter, and the source's tensors that it is made of, stacked along the first dimension.

    `layout` is an einops pattern that turns each of them into its native form. Backwards it undoes itself; the lengths
    that cannot be read off a native tensor, `heads` and `pool_heads`, are the config's. A source that is None stands
    for zeros: the project has no such parameter, and only models in which it is 0 can be written. `shares` are the
    rows that each source has, relative to the others; none: all the same. Where a project has several ways for one
    parameter, `when` are the fields of Config of the models that it writes in this one.
    """

    native: str
    source: str | tuple[str | None, ...]
    layout: str | None = None
    shares: tuple[int, ...] | None = None
    when: Mapping[str, Any] = field(default_factory=dict)

    def writes(self, native: str, config: Config) -> re.Match[str] | None:
        """Whether the project has that parameter of such a model in this way."""
        fits = all(getattr(config, name) == value for name, value in self.when.items())
        return _regex(self.native).fullmatch(native) if fits else None

    @property
    def parts(self) -> tuple[str | None, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part is not None)

    def stack(self, arranged: Mapping[str, Tensor]) -> Tensor:
        """The native tensor of the source's, arranged, by their patterns in the rule."""
        if len(self.parts) == 1:
            return next(iter(arranged.values())).contiguous()
        like = next(iter(arranged.values()))
        return torch.cat([torch.zeros_like(like) if part is None else arranged[part] for part in self.parts])

    def split(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `stack`.

        Raises:
            ValueError: a part for which the project has no place is not 0.
        """
        shares = self.shares or (1,) * len(self.parts)
        lengths = [len(x) * share // sum(shares) for share in shares]
        for part, rows in zip(self.parts, torch.split(x, lengths), strict=True):
            if part is not None:
                yield part, rows
            elif rows.any():
                raise ValueError("has values where models of that format have none")

    def to_native(self, x: Tensor) -> Tensor:
        return x if self.layout is None else rearrange(x, self.layout)

    def from_native(self, x: Tensor, config: Config) -> Tensor:
        if self.layout is None:
            return x
        theirs, ours = self.layout.split(" -> ")
        known = {"heads": config.num_heads, "pool_heads": config.pool_heads or config.num_heads}
        lengths = {name: length for name, length in known.items() if name in re.findall(r"\w+", theirs)}
        return rearrange(x, f"{ours} -> {theirs}", **lengths)


@dataclass(frozen=True)
class Omission:
    """Tensors that files of a format may hold and our models have no place for."""

    source: str  # a pattern, in which a last `**` stands for anything
    reason: str
    zero: bool = False  # if all its values are 0: else the model computes with it, and is another than ours
    like: str | None = None  # written as zeros, for this native parameter, in the shape that the layout makes of it
    layout: str = "o i -> o"
    #: What is written in place of zeros, given that parameter and the config; it returns None where nothing is.
    value: Callable[[Tensor, Config], Tensor | None] | None = None

    def write(self, native: Tensor, config: Config) -> Tensor | None:
        """What the project's code insists on, given the native parameter that `like` names; None: nothing."""
        if self.value is not None:
            return self.value(native, config)
        return reduce(torch.zeros_like(native), self.layout, "max").contiguous()


@dataclass(frozen=True)
class Signature:
    """What tells a format from all others, by names alone."""

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    keys: tuple[str, ...] | None = None  # where in a file the state dict lies; None: anywhere
    not_keys: tuple[str, ...] = ()  # where it does not lie

    def misses(self, names: Collection[str]) -> list[str]:
        """Why tensors of these names are not of the format; empty if they are."""
        return [f"no {p}" for p in self.has if not _has(names, p)] + [f"a {p}" for p in self.lacks if _has(names, p)]

    def fits(self, names: Collection[str], key: str) -> bool:
        return (self.keys is None or key in self.keys) and key not in self.not_keys and not self.misses(names)

    def prefixes(self, names: Collection[str]) -> set[str]:
        """What the names of a whole model begin with, beside which there may be others; "" for plain ones.

        Raises:
            CheckpointError: there are more models than anyone keeps in one state dict.
        """
        anchor = self.has[0]  # a name, and no pattern: of hostile names a pattern could match thousands
        starts = {name.removesuffix(anchor) for name in names if name.endswith(anchor)}
        starts = {prefix for prefix in starts if not prefix or prefix.endswith((".", "/"))}
        if len(starts) > MOST_MODELS:
            raise CheckpointError(f"it holds {len(starts):,} tensors whose names end in {anchor!r}: too many models")
        return {prefix for prefix in starts if not self.misses(names_under(names, prefix))}


@dataclass(frozen=True)
class Resampling:
    """How a project resamples its positions to another grid: arguments of `torch.nn.functional.interpolate`."""

    mode: Literal["bicubic", "bilinear"]
    antialias: bool = False
    align_corners: bool = False
    offset: float = 0.0  # patches that are added to the new size for the step from one sample to the next (DINOv2)

    def __str__(self) -> str:
        options = [name for name in ("antialias", "align_corners") if getattr(self, name)]
        return " with ".join([self.mode, *options, *([f"an offset of {self.offset}"] if self.offset else [])])


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one project names and lays out the parameters of a vision transformer.

    Attributes:
        name: what users call it.
        title: what it is, in a few words, with its source.
        rules: every native parameter that it can hold.
        signatures: a file is of this format if any of them fits.
        resampling: the project's own way with positions.
        omissions: what is left out on the way in, and why.
        variant_of: the format that users name when they mean this one too.
        fixed: fields and properties of Config that models of this project always have: others cannot be written.
        always: native parameters that models of this project always have, by which it is told from others: models
            without them cannot be written.
        beside_mean: whether a head may read the class token beside the mean patch.
        folds_class_position: whether registers have no position there, nor then the class token, to which its own is
            added when such a model is written.
        layers: what the names of a block begin with where all blocks lie in one tensor, along its first dimension, and
            where each has its own.
        num_heads: a tensor whose second dimension is the number of heads, where the format has one.
        container: what the project's own files are: "safetensors", "npz", "torch", or "torch:KEY" where the state dict
            lies under a key.
    """

    name: str
    title: str
    rules: tuple[Rule, ...]
    signatures: tuple[Signature, ...]
    resampling: Resampling
    omissions: tuple[Omission, ...] = ()
    variant_of: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    always: tuple[str, ...] = ()
    beside_mean: bool = False
    folds_class_position: bool = False
    layers: tuple[str, str] | None = None
    num_heads: str | None = None
    container: str = "safetensors"

    def __str__(self) -> str:
        return self.name

    def count_heads(self, tensors: Mapping[str, Tensor]) -> int | None:
        """Attention heads, where the source's tensors tell."""
        shapes = [tensors[name].shape for name in tensors if self.num_heads and _regex(self.num_heads).fullmatch(name)]
        return shapes[0][1] if shapes and len(shapes[0]) == 3 else None

    @property
    def components(self) -> frozenset[str]:
        """What names of the format begin with, up to the first dot or slash."""
        sources = [*(source for rule in self.rules for source in rule.sources), *(o.source for o in self.omissions)]
        return frozenset(re.split(r"[./]", source)[0] for source in sources)

    @property
    def heads(self) -> dict[str, str]:
        """By the component that a head's names begin with: the name that its one linear layer has."""
        rules = (rule for rule in self.rules if rule.native in ("head.*", "head_dist.*"))
        return {rule.sources[0].split(".")[0]: rule.sources[0].removesuffix(".*") for rule in rules}

    def find_blocks(self, names: Iterable[str]) -> dict[str, set[int]]:
        """The numbers of the blocks that names are of, by what the names begin with."""
        rule = next(rule for rule in self.rules if rule.native.startswith("blocks.#.norm1."))
        block = re.compile(rf"(.*[./]|){_regex(rule.sources[0]).pattern}")
        found: dict[str, set[int]] = {}
        for match in map(block.fullmatch, names):
            if match:
                found.setdefault(match[1], set()).add(int(match[2]))
        return found

    def has_native(self, name: str) -> bool:
        """Whether the format holds a native parameter."""
        return any(_regex(rule.native).fullmatch(name) for rule in self.rules)

    def has_place_for(self, name: str) -> bool:
        """Whether a native parameter is made of the source's of that name."""
        return self._find_rule(name, ()) is not None

    def _find_rule(self, name: str, names: Collection[str]) -> tuple[Rule, str, str] | None:
        """The rule for a tensor of the source, its pattern in it, and the native name that it makes.

        Of several the first that has all its parts among the names.
        """
        found: list[tuple[Rule, str, str]] = []
        for rule in self.rules:
            for source in rule.sources:
                if match := _regex(source).fullmatch(name):
                    found.append((rule, source, _fill_in(rule.native, match.groups())))
                    if all(_fill_in(part, match.groups()) in names for part in rule.sources):
                        return found[-1]
        return found[0] if found else None


#: Why a representation layer is left out, and the head that stands on it.
PRE_LOGITS = "the representation layer of pre-training, and the head after it, are for its classes alone"


class Renamed(NamedTuple):
    """What `to_native` made of a source's tensors."""

    tensors: dict[str, Tensor]  # by native name
    names: dict[str, tuple[str, ...]]  # the source's names of each
    left_out: dict[str, str]  # the reason for each of the source's tensors that is not among them


def to_native(format: Format, tensors: dict[str, Tensor]) -> Renamed:  # noqa: A002
    """Tensors under their native names, contiguous.

    Args:
        format: what the tensors are.
        tensors: by the source's names. It is emptied on the way, so that memory holds each tensor once.

    Raises:
        CheckpointError: names that the format does not know, or parts of a parameter without the others.
    """
    parts: dict[str, tuple[Rule, dict[str, str]]] = {}  # by native name; the source's names by their patterns
    left_out, unknown = {}, []
    for name, tensor in tensors.items():
        if found := format._find_rule(name, tensors.keys()):
            rule, pattern, native = found
            parts.setdefault(native, (rule, {}))[1][pattern] = name
        elif omitted := [o for o in format.omissions if _regex(o.source).fullmatch(name)]:
            left_out[name] = omitted[0].reason
            if omitted[0].zero and tensor.any():
                raise CheckpointError(f"not a model that can be read: {name} is not 0, as in {format.name} it must be")
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"not of the format {format.name}, which has no place for {enumerate_names(unknown)}")

    native_tensors, names = {}, {}
    for native, (rule, sources) in parts.items():
        present = tuple(sources[pattern] for pattern in rule.sources if pattern in sources)
        if len(present) < len(rule.sources):
            raise CheckpointError(
                f"{native} is made of {len(rule.sources)} tensors, of which there are only {enumerate_names(present)}"
            )
        arranged = {}
        for pattern, source in sources.items():
            tensor = tensors.pop(source)
            try:
                arranged[pattern] = rule.to_native(tensor)
            except EinopsError as error:
                shape, layout = tuple(tensor.shape), (rule.layout or "").partition(" ->")[0]
                raise CheckpointError(f"{source} is {shape}, and {format.name} lays it out as {layout}") from error
        if not _match(rule, arranged):
            kinds = ", ".join(f"{sources[p]} {tuple(x.shape)} {x.dtype}" for p, x in arranged.items())
            raise CheckpointError(f"{native} cannot be made of tensors that do not match: {kinds}")
        native_tensors[native] = rule.stack(arranged)
        names[native] = present
    tensors.clear()
    return Renamed(native_tensors, names, left_out)


def from_native(format: Format, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:  # noqa: A002
    """The inverse of `to_native`: tensors under the source's names.

    Raises:
        ValueError: the format has no place for a parameter, or fixes what the model has otherwise.
    """
    for name, value in format.fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{format.name} cannot hold this model: its {name} is {getattr(config, name)!r}, "
                f"and models of that format have {value!r}"
            )
    if missing := [name for name in format.always if not _has(tensors, name)]:
        raise ValueError(f"{format.name} cannot hold this model: it has no {enumerate_names(missing)}")
    if format.folds_class_position and config.pos_embed_prefix == "class" and config.num_prefix > 1:
        tensors = _fold_class_position(tensors)
    out, unknown = {}, []
    for native, tensor in tensors.items():
        for rule in format.rules:
            if found := rule.writes(native, config):
                try:
                    for source, part in rule.split(tensor):
                        out[_fill_in(source, found.groups())] = rule.from_native(part, config).contiguous()
                except ValueError as error:
                    raise ValueError(f"{format.name} cannot hold this model: its {native} {error}") from error
                break
        else:
            unknown.append(native)
    if unknown:
        raise ValueError(f"{format.name} cannot hold this model: it has no place for {enumerate_names(unknown)}")
    for omission in format.omissions:
        for native, tensor in tensors.items():
            found = _regex(omission.like).fullmatch(native) if omission.like else None
            if found and (written := omission.write(tensor, config)) is not None:
                out[_fill_in(omission.source, found.groups())] = written
    return out


def _fold_class_position(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The class token with its position, which the model adds before anything else: in float32 the same sum."""
    cls, positions = tensors["cls_token"], tensors["pos_embed"]
    return {**tensors, "cls_token": cls + positions[:, :1], "pos_embed": positions[:, 1:]}


def unstack_layers(format: Format, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:  # noqa: A002
    """Tensors that hold all blocks, taken apart: each block's, with the name of the tensor that it is a part of.

    Args:
        format: what the tensors are.
        tensors: by the source's names.
    """
    whole, block = format.layers or ("", "")
    return {
        f"{block.replace('#', str(i))}{name.removeprefix(whole)}": (name, layer)
        for name, tensor in tensors.items()
        if whole and name.startswith(whole) and tensor.ndim
        for i, layer in enumerate(tensor)
    }


def _match(rule: Rule, arranged: Mapping[str, Tensor]) -> bool:
    """Whether tensors can be stacked: of one kind and width, each with its share of the rows."""
    if len(rule.parts) == 1:
        return True
    shares = dict(zip(rule.parts, rule.shares or (1,) * len(rule.parts), strict=True))
    kinds = {(x.shape[1:], x.dtype, len(x) / shares[pattern]) if x.ndim else None for pattern, x in arranged.items()}
    return len(kinds) == 1 and None not in kinds


def names_under(names: Iterable[str], prefix: str) -> list[str]:
    """The names that begin with a prefix, without it."""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def enumerate_names(names: Iterable[str], most: int = 6) -> str:
    """The first few of many names, block 2 before block 10."""
    names = list(names)
    first = nsmallest(
        most,
        names,
        key=lambda name: [(int(part or 0), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)],
    )
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(first) + more


def _has(names: Iterable[str], pattern: str) -> bool:
    return any(map(_regex(pattern).fullmatch, names))


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\#", r"(\d{1,4})")
    return re.compile(escaped.replace(r"\*", "(weight|bias)"))


def _fill_in(pattern: str, bindings: tuple[str, ...]) -> str:
    values: Iterator[str] = iter(bindings)
    return re.sub(r"[#*]", lambda _: next(values), pattern)
