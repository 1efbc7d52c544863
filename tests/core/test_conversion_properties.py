"""Whatever is in a checkpoint or a file of ours, it converts and loads, or ends in CheckpointError."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tomevit
from tests import foreign
from tests.helpers import randomise, tiny
from tomevit import CheckpointError, Config, cards
from tomevit.cards import Card
from tomevit.models import build
from tomevit.weights import rules
from tomevit.weights.formats import FORMATS
from tomevit.weights.recognise import adopt_inferred, differences, find_format, infer_architecture

FUZZ = settings(max_examples=100, suppress_health_check=list(HealthCheck))


def whole_or_refused(act: Callable[[], object], out: Path) -> bool:
    """Whether it went well. If not: a documented error, in words, and out is as it was; no drafts either way."""
    before = out.read_bytes()
    others = {file for file in out.parent.iterdir() if file != out}
    refused = None
    try:
        act()
    except CheckpointError as error:
        refused = str(error)
    if refused is not None:
        assert refused.splitlines()[0].strip()
        assert out.read_bytes() == before
    assert {file for file in out.parent.iterdir() if file != out} == others
    return refused is None


# ------------------------------------------------------------------------------------------ every config, every format


@st.composite
def configs(draw: st.DrawFn) -> Config:
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dist = draw(st.booleans())
    flag = st.booleans()
    return Config(
        img_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        in_chans=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 5)),
        embed_dim=heads * draw(st.integers(1, 5)),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.floats(1, 5)),
        qkv_bias=draw(flag),
        qk_norm=draw(flag),
        layer_scale=draw(st.sampled_from([None, 1e-5])),
        pre_norm=draw(st.sampled_from([False, False, True])),
        class_token=True,
        dist_token=dist,
        reg_tokens=draw(st.sampled_from([0, 0, 1, 2])),
        pos_embed_prefix=draw(flag),
        pool="token" if dist else draw(st.sampled_from(["token", "avg"])),
        pool_norm=draw(st.sampled_from(["before", "after"])),
    )


PLAIN: dict[str, Any] = {
    "qk_norm": False,
    "dist_token": False,
    "layer_scale": None,
    "pre_norm": False,
    "reg_tokens": 0,
    "pos_embed_prefix": True,
}
PLAIN |= {"pool": "token", "pool_norm": "before", "qkv_bias": True}


@pytest.mark.parametrize("name", FORMATS)
def test_every_config_that_a_format_can_hold_comes_back(name: str) -> None:
    held = 0
    families = [fields for _, fields, _ in foreign.FORMATS[name]]

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(configs(), st.sampled_from([None, *2 * families]))  # None: most of what no family is fits no format
    def comes_back(config: Config, family: dict[str, Any] | None) -> None:
        nonlocal held
        if family is not None:
            few = {field: value for field, value in family.items() if field not in (*foreign.SMALL, "classes")}
            few |= {"embed_dim": 8 * config.num_heads, "num_classes": family["num_classes"] and config.num_classes}
            config = Config(**vars(config) | PLAIN | few)
        model = build(config)
        randomise(model)
        for block in model.blocks if config.rope in ("eva", "dinov3") and config.qkv_bias else ():
            with torch.no_grad():
                block.attn.qkv.bias.chunk(3)[1].zero_()  # of keys, EVA-02 and EUPE have none
        tensors = model.state_dict()
        try:
            theirs = rules.from_native(FORMATS[name], tensors, config)
        except ValueError:
            return
        held += 1
        read = rules.to_native(FORMATS[name], dict(theirs))
        left_out = {left for left in read.left_out if left != "rope_embed.periods"}  # which is computed
        assert all("bias" in left or "mask_token" in left for left in left_out)  # written as zeros
        assert read.tensors.keys() == tensors.keys()
        assert all(torch.equal(read.tensors[key], tensor) for key, tensor in tensors.items())
        observed = infer_architecture(read.tensors)
        assert differences(observed, config) == []
        assert adopt_inferred(config, observed, config.img_size) == config
        if not FORMATS[name].variant_of:
            key = FORMATS[name].container.partition(":")[2]
            # MAE and DeiT share names and container; without a head, it is MAE's.
            expected = "mae" if name == "deit" and not config.num_classes else name
            try:
                fits = [find_format(theirs, key).name]
            except tomevit.AmbiguousCheckpointError as error:
                fits = error.choices
            assert expected in fits

    comes_back()
    assert held > 5


# ----------------------------------------------------------------------------------------------------- others' files

TINY = Config(depth=2, **foreign.SMALL)
CARD = Card(name="tiny", config=TINY)
SOURCES = [foreign.deit, foreign.vit_jax, foreign.hf_vit, foreign.swag, foreign.torchvision, foreign.mae_full]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 24, 72, 10**6]), max_size=5).map(tuple)
KINDS = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]


@st.composite
def changed(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with up to three things wrong with it, or none."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        match draw(st.sampled_from(["drop", "rename", "double", "shape", "reshape", "kind", "value", "prefix", "add"])):
            case "drop":
                del tensors[name]
            case "rename":
                tensors[_misspelt(draw, name)] = tensors.pop(name)
            case "double":
                tensors[_misspelt(draw, name)] = tensor
            case "shape":
                shape = draw(SHAPES)
                small = math.prod(shape) <= 10**6
                tensors[name] = (
                    torch.zeros(shape) if small else torch.zeros(()).expand(shape[:1] + (1,) * len(shape[1:]))
                )
            case "reshape":
                ways: list[Callable[[Tensor], Tensor]] = [
                    torch.Tensor.flatten, lambda x: x[None], lambda x: x[..., None], lambda x: x[:0],
                    lambda x: x.movedim(0, -1) if x.ndim else x, lambda x: x[1:] if x.ndim else x,
                ]  # fmt: skip
                tensors[name] = draw(st.sampled_from(ways))(tensor) if tensor.ndim else tensor[None]
            case "kind":
                tensors[name] = tensor.to(draw(st.sampled_from(KINDS)))
            case "value":
                tensors[name] = torch.full_like(tensor, draw(st.sampled_from([0, 1])))
                if tensor.is_floating_point():
                    tensors[name] = torch.full_like(tensor, draw(st.sampled_from([math.nan, math.inf, 1e4])))
            case "prefix":
                prefix = draw(st.sampled_from(["module.", "model.", "encoder.", "é."]))
                tensors = {prefix + key: value for key, value in tensors.items()}
            case _:
                other = foreign.fill(draw(st.sampled_from(SOURCES))(foreign.sizes(TINY)))
                tensors[draw(st.sampled_from(sorted(other)))] = torch.zeros(
                    draw(st.sampled_from([(), (24,), (24, 24)]))
                )
        assume(tensors)
    return tensors


def _misspelt(draw: st.DrawFn, name: str) -> str:
    old, new = draw(
        st.sampled_from([("0", "1"), ("1", "01"), ("0", "10000"), ("1", "７"), ("weight", "bias"), ("", "x")])
    )
    return name.replace(old, new) if old else name + new


@pytest.mark.parametrize("keys", SOURCES, ids=lambda keys: keys.__name__)
def test_changed_checkpoints(keys: Callable[[foreign.Sizes], dict[str, Any]], tmp_path: Path) -> None:
    sound = foreign.fill(keys(foreign.sizes(TINY)))
    path, out = tmp_path / "model.pth", tmp_path / "out.safetensors"
    out.write_bytes(b"as it was")
    config = Config(**vars(TINY) | ({"num_classes": 0} if keys is foreign.mae_full else {}))
    verdicts = set()

    @FUZZ
    @given(changed(sound), st.booleans(), st.sampled_from(["", "model", "state_dict"]))
    def converts_or_is_refused(tensors: dict[str, Tensor], named: bool, key: str) -> None:
        path.unlink(missing_ok=True)  # tensors of the last example may be mapped from it
        foreign.write(path, tensors, key=key)
        model = Card(name="tiny", config=config) if named else None
        good = whole_or_refused(lambda: tomevit.convert(path, out, model=model), out)
        verdicts.add(good)
        if good:
            assert all(check.passed for check in tomevit.verify(out, against=path)), tensors.keys()

    converts_or_is_refused()
    assert verdicts == {True, False}


def test_changed_checkpoints_for_a_model_of_the_zoo(tmp_path: Path) -> None:
    card = tomevit.card("digits_p1")
    sound = rules.from_native(FORMATS["timm"], tomevit.create("digits_p1").state_dict(), card.config)
    path, out = tmp_path / "model.pth", tmp_path / "untouched"
    out.write_bytes(b"")

    @FUZZ
    @given(changed(sound))
    def loads_or_is_refused(tensors: dict[str, Tensor]) -> None:
        path.unlink(missing_ok=True)
        foreign.write(path, tensors)

        def create() -> None:
            model = tomevit.create("digits_p1", pretrained=path, num_classes=3)
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert model.head.weight.shape == (3, 64)

        whole_or_refused(create, out)

    loads_or_is_refused()


# --------------------------------------------------------------------------------------------------------- our own file

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.sampled_from([10**9, 10**18, 10**30, -(10**9)]),
    st.floats(), st.text(max_size=4), st.just([]), st.just({}), st.lists(st.integers(0, 10**10), max_size=3),
)  # fmt: skip


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON tree, with a key in it."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [place for key, value in items for place in [(tree, key), *_places(value)]]


@st.composite
def changed_header(draw: st.DrawFn, sound: dict[str, Any], described: dict[str, Any]) -> bytes:
    header, described = copy.deepcopy(sound), copy.deepcopy(described)
    for _ in range(draw(st.integers(0, 3))):
        place, key = draw(st.sampled_from(_places(draw(st.sampled_from([described, described, described, header])))))
        match draw(st.sampled_from(["change", "change", "change", "drop", "add"])):
            case "change":
                place[key] = draw(LEAVES)
            case "drop":
                del place[key]
            case _ if isinstance(place, dict):
                place[draw(st.sampled_from(["depth", "new", "r"]))] = draw(LEAVES)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] = {cards.KEY: json.dumps(described)}
    return json.dumps(header).encode()


def test_changed_files_of_ours(tmp_path: Path) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    model = tiny(8, depth=2)
    tomevit.save(model, path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"][cards.KEY])
    out.write_bytes(b"as it was")
    loaded = 0

    @settings(FUZZ, max_examples=400)
    @given(changed_header(header, described))
    def loads_or_is_refused(changed: bytes) -> None:
        nonlocal loaded
        path.unlink(missing_ok=True)
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
        good = whole_or_refused(lambda: tomevit.load(path), out)
        loaded += good
        checks = {check.name: check.passed for check in tomevit.verify(path)}
        assert checks.get("structure", False) == good
        assert whole_or_refused(lambda: tomevit.convert(path, out), out) == good

    loads_or_is_refused()
    assert loaded > 15


def test_changed_bytes_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tomevit.save(tiny(8, depth=1), path)
    data = path.read_bytes()

    @FUZZ
    @given(
        st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(1, 255)), min_size=1, max_size=4), st.booleans()
    )
    def is_noticed(flips: list[tuple[int, int]], cut: bool) -> None:
        damaged = bytearray(data)
        for at, bits in flips:
            damaged[at] ^= bits
        damaged = damaged[: flips[0][0]] if cut else damaged
        assume(damaged != data)
        path.unlink()
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            tomevit.load(path)
        header = 8 + struct.unpack("<Q", data[:8])[0]
        if cut or all(at >= header for at, _ in flips):
            assert not all(check.passed for check in tomevit.verify(path))

    is_noticed()
