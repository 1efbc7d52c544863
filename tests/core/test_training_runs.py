"""Checkpoints of real training runs: the model is found among all that stands beside it, or the user is asked."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import http
import ipaddress
import logging
import pathlib
import random
import re
import signal
import types
import typing
import uuid
import zipfile
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests import foreign, hostile
from tests.helpers import tiny
from tomevit import AmbiguousCheckpointError, CheckpointError, Config
from tomevit.cards import Card
from tomevit.errors import MissingOptionError
from tomevit.weights.convert import weights_of
from tomevit.weights.files import open_checkpoint
from tomevit.weights.other_files import describe_directory

State = dict[str, Tensor]
CARD = Card(name="tiny", config=Config(depth=2, **foreign.SMALL))
SIZES = foreign.sizes(CARD.config)
WIDTH, CLASSES = SIZES.dim, SIZES.classes
MODEL = foreign.fill(foreign.deit(SIZES))
OTHER = {name: tensor + 1 for name, tensor in MODEL.items()}
ENCODER = {name: tensor for name, tensor in MODEL.items() if not name.startswith("head.")}
HEAD = {name.removeprefix("head."): tensor for name, tensor in MODEL.items() if name.startswith("head.")}
PROJECTION = {
    "0.weight": torch.ones(8, WIDTH),
    "1.weight": torch.ones(8),
    "1.running_mean": torch.ones(8),
    "1.num_batches_tracked": torch.tensor(3),
    "3.weight": torch.ones(9, 8),
}


def under(prefix: str, tensors: State = MODEL) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


class Converted(typing.NamedTuple):
    tensors: State
    report: Any


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Converted]:
    def write_and_convert(tree: Any, **options: Any) -> Converted:
        torch.save(tree, tmp_path / "run.ckpt")
        report = tomevit.convert(tmp_path / "run.ckpt", tmp_path / "out.safetensors", **{"model": CARD, **options})
        return Converted(dict(tomevit.load(tmp_path / "out.safetensors").state_dict()), report)

    return write_and_convert


def assert_same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------------------------------- what stands beside the model

BESIDE: dict[str, tuple[State, State]] = {
    "a loss": (MODEL, {"criterion.weight": torch.ones(5)}),
    "a metric": (under("net."), {"val_acc.tp": torch.zeros(5, dtype=torch.int64)}),
    "a number": (under("model."), {"logit_scale": torch.tensor(1.0)}),
    "an average's count": (under("module."), {"n_averaged": torch.tensor(3)}),
    "a projection": (under("encoder.", ENCODER), under("projection_head.", PROJECTION)),
    "projections within": (under("model."), under("model.projector.", PROJECTION)),
    "a text tower": (
        under("visual.trunk.", ENCODER),
        {"logit_bias": torch.ones(1), "text.transformer.resblocks.0.ln_1.weight": torch.ones(9)},
    ),
    "a student's head": (under("student.module.backbone.", ENCODER), under("student.head.", PROJECTION)),
    "hidden patches": (under("encoder.", ENCODER), {"encoder.mask_token": torch.ones(1, 1, 24)}),
    "another architecture": (under("net."), {"teacher.conv1.weight": torch.ones(3), "teacher.fc.bias": torch.ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
def test_what_stands_beside_the_model_is_named(what: str, convert: Callable[..., Converted]) -> None:
    model, beside = BESIDE[what]
    tensors, report = convert({"state_dict": beside | model, "epoch": 3})
    assert_same(tensors, MODEL if len(model) == len(MODEL) else ENCODER)
    assert report.left_out.keys() == {*beside, "epoch"}
    prefix = next(iter(model)).removesuffix("cls_token").replace("module.", "")
    assert (f"in names that begin with {prefix!r}" in report.recognised) == bool(prefix)


def test_what_computes_with_the_model_is_never_left_out(convert: Callable[..., Converted]) -> None:
    for name in ("attn_pool.probe", "rel_pos_bias.table", "rope.freqs", "pos_embed_win", "blocks.1.attn.bias"):
        for prefix in ("", "model."):
            with pytest.raises(CheckpointError, match=f"no place for {re.escape(name)}"):
                convert({"state_dict": under(prefix, MODEL | {name: torch.ones(1)})})
    with pytest.raises(CheckpointError, match=r"does not fit the model:\n  attn_pool\.latent"):
        convert({"state_dict": MODEL | {"attn_pool.latent": torch.ones(1)}})


def test_a_part_is_never_taken_for_the_whole(convert: Callable[..., Converted]) -> None:
    first = {name: tensor for name, tensor in MODEL.items() if not name.startswith("blocks.1.")}
    second = {name: tensor for name, tensor in MODEL.items() if name.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match=r"depth 1 where the model has 2"):
        convert({"state_dict": under("model.", first)})
    with pytest.raises(CheckpointError, match=r"a model in parts: its blocks from 1 on lie under 'stage1\.'"):
        convert({"state_dict": under("stage0.", first) | under("stage1.", second)})
    with pytest.raises(CheckpointError, match=r"head\.bias is no tensor that tomevit reads"):
        convert({"state_dict": {**MODEL, "head.bias": "elsewhere"}})


@pytest.mark.parametrize(
    ("state", "choices"),
    [
        (under("model.") | under("ema.module.", OTHER), ["ema.", "model."]),
        (MODEL | under("ema.", OTHER), [".", "ema."]),
        (under("student.backbone.") | under("teacher.backbone.", OTHER), ["student.backbone.", "teacher.backbone."]),
        (under("module.base_encoder.") | under("module.ema_encoder.", OTHER), ["base_encoder.", "ema_encoder."]),
    ],
)  # fmt: skip
def test_several_models_are_asked_about(
    state: State, choices: list[str], convert: Callable[..., Converted], tmp_path: Path
) -> None:
    with pytest.raises(AmbiguousCheckpointError, match=r"several models.*prefix= \(--prefix\)") as caught:
        convert({"state_dict": state})
    assert (caught.value.option, caught.value.choices) == ("prefix", choices)
    for prefix in choices:
        other = prefix.startswith(("ema", "teacher"))
        for told in (prefix, prefix.rstrip(".") or "."):
            tensors, report = convert({"state_dict": state}, prefix=told)
            assert_same(tensors, OTHER if other else MODEL)
            assert len(report.left_out) == len(MODEL)
    with pytest.raises(CheckpointError, match=r"no names that begin with 'nope'; a model's names begin with '"):
        convert({"state_dict": state}, prefix="nope")
    assert_same(
        convert({"state_dict": state}, ask=lambda error: error.choices[0]).tensors,
        OTHER if choices[0] == "ema." else MODEL,
    )
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("form", ["timm_deit3", "swag", "torchvision", "hf_vit", "hf_vit_v5", "hf_deit", "hf_vit_mae"])
def test_every_format_is_found_under_a_name(form: str, tmp_path: Path, convert: Callable[..., Converted]) -> None:
    fields = {"timm_deit3": foreign.SCALED, "hf_deit": foreign.DIST, "hf_vit_mae": foreign.NO_HEAD}
    card = Card(name="tiny", config=Config(depth=2, **fields.get(form, foreign.SMALL)))
    state = foreign.fill(getattr(foreign, form)(foreign.sizes(card.config)))
    plain = convert(state, model=card)
    found = convert({"state_dict": under("net.", state) | {"loss.weight": torch.ones(3)}}, model=card)
    assert_same(found.tensors, plain.tensors)
    assert found.report.names == plain.report.names
    assert found.report.left_out.keys() == {"loss.weight", *(f"net.{name}" for name in plain.report.left_out)}


# ------------------------------------------------------------------------------------------------------------ wrappers

WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "blocks compiled": lambda name: re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name),
    "one block compiled": lambda name: re.sub(r"^(blocks\.1)\.", r"\1._orig_mod.", name),
    "checkpointed layers": lambda name: re.sub(r"\.mlp\.", "._checkpoint_wrapped_module.mlp.", name),
    "FSDP of compiled": lambda name: (
        "_fsdp_wrapped_module._orig_mod." + re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module.", name)
    ),
    "DDP in Lightning": lambda name: f"model.module.{name}",
    "Fabric": lambda name: f"_forward_module._orig_mod.module.{name}",
}


@pytest.mark.parametrize("what", WRAPPED)
def test_wrappers_are_seen_through(what: str, convert: Callable[..., Converted]) -> None:
    assert_same(convert({"state_dict": {WRAPPED[what](name): t for name, t in MODEL.items()}}).tensors, MODEL)


def test_a_parameter_twice_is_refused(convert: Callable[..., Converted]) -> None:
    with pytest.raises(CheckpointError, match=r"one parameter twice, but for wrappers"):
        convert(MODEL | under("module.", OTHER))


@pytest.mark.parametrize("which", [slice(None), slice(1)])
def test_a_model_of_compiled_blocks_is_saved_as_what_it_is(which: slice, tmp_path: Path) -> None:
    model = tiny(8)
    before = dict(model.state_dict())
    for i in range(len(model.blocks))[which]:
        model.blocks[i] = torch.compile(model.blocks[i])  # lazy: nothing is compiled here
    tomevit.save(model, tmp_path / "saved.safetensors")
    assert_same(dict(tomevit.load(tmp_path / "saved.safetensors").state_dict()), before)
    tomevit.export(model, tmp_path / "theirs.pth", "timm")
    assert torch.load(tmp_path / "theirs.pth", weights_only=True).keys() == before.keys()


# -------------------------------------------------------------------------------------------------- hyper-parameters


class Mode(enum.Enum):
    A = 1


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    root: pathlib.Path = pathlib.Path("/data")
    mode: Mode = Mode.A


class AttributeDict(dict[str, Any]):
    pass


VALUES: dict[str, Any] = {
    "path": pathlib.Path("/data/cats"),
    "pure path": pathlib.PureWindowsPath("C:/data"),
    "enum": Mode.A,
    "int enum": Level.HIGH,
    "standard enums": [http.HTTPStatus.OK, signal.SIGINT, re.IGNORECASE],
    "dataclass": Settings(),
    "dates": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date(2024, 1, 1), datetime.time(3)],
    "time zone": zoneinfo.ZoneInfo("UTC"),
    "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), 2**200],
    "addresses": [uuid.uuid4(), ipaddress.ip_address("127.0.0.1")],
    "collections": [collections.deque([1]), collections.defaultdict(list, a=[1]), collections.ChainMap({"a": 1})],
    "namespaces": [argparse.Namespace(root=pathlib.Path("x")), types.SimpleNamespace(a=1), AttributeDict(a=1)],
    "code by name": [functools.partial(nn.LayerNorm, eps=1e-6), nn.GELU, torch.nn.functional.gelu, dataclasses.field],
    "types": [int | None, list[int], re.compile("a+"), logging.getLogger("x"), ...],
    "random": [random.Random(0), np.random.default_rng(0), np.random.RandomState(0), random.getstate()],
    "numpy": [np.str_("x"), np.datetime64("2024-01-01"), np.array(["a"]), np.array([{}]), np.float16(1)],
    "torch": [torch.Size([1]), torch.device("cuda:1"), torch.bfloat16, torch.strided, torch.get_rng_state()],
    "tensors": [torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.ones(2).to(torch.float8_e4m3fn)],
    "keys": {Mode.A: 1, pathlib.Path("x"): 2, (Mode.A, 1): 3},
    "sets": [{Mode.A}, frozenset([1]), slice(1), range(3), bytearray(b"x")],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", VALUES)
def test_hyper_parameters_of_any_class(what: str, zipped: bool, tmp_path: Path) -> None:
    tree = {"hyper_parameters": {"lr": 1e-3, "x": VALUES[what]}, "state_dict": MODEL}
    torch.save(tree, tmp_path / "run.ckpt", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "run.ckpt")
    assert_same(checkpoint.tensors, MODEL)
    assert checkpoint.beside == ("hyper_parameters",)


@pytest.mark.parametrize(
    ("module", "name"),
    [("omegaconf.dictconfig", "DictConfig"), ("pathlib._local", "PosixPath"), ("my_training.config", "Settings.Inner")],
)
def test_classes_that_are_not_here(module: str, name: str, tmp_path: Path) -> None:
    """Configs of other packages, another Python's paths: they cannot be imported, and need not be."""
    made = hostile.call(module, name, hostile.text("a"))
    built = hostile.name(module, name) + b")\x81}" + hostile.text("_content") + b"Nsb"
    for value in (made, built, made + b"}" + hostile.text("x") + b"Nsb"):
        content = hostile.torch_zip(hostile.state_dict(model=hostile.tensor((4,), (1,), 4), args=value))
        (tmp_path / "run.ckpt").write_bytes(content)
        assert open_checkpoint(tmp_path / "run.ckpt").beside == ("args",)


def leave_a_file(path: str) -> None:
    Path(path).touch()


def test_nothing_that_a_checkpoint_calls_is_called(tmp_path: Path) -> None:
    """A function that is no one's but the user's: it may make an object as well, and is not run to see it."""
    proof = tmp_path / "proof"
    call = hostile.call(__name__, "leave_a_file", hostile.text(str(proof)))
    content = hostile.torch_zip(hostile.state_dict(model=hostile.tensor((4,), (1,), 4), args=call))
    (tmp_path / "run.ckpt").write_bytes(content)
    assert open_checkpoint(tmp_path / "run.ckpt").beside == ("args",)
    assert not proof.exists()
    for module, function in (
        ("commands", "getoutput"),
        ("torch.hub", "load"),
        ("numpy", "load"),
        ("pathlib.os", "system"),
    ):
        call = hostile.call(module, function, hostile.text(str(proof)))
        (tmp_path / "run.ckpt").write_bytes(hostile.torch_zip(hostile.state_dict(args=call)))
        with pytest.raises(CheckpointError, match=r"wants to run (subprocess|torch\.hub|numpy|pathlib\.os)\."):
            open_checkpoint(tmp_path / "run.ckpt")


def test_a_whole_module_is_refused_with_a_way_on(convert: Callable[..., Converted]) -> None:
    for tree in (tiny(), {"model": tiny()}, {"model": tiny(), "optimizer": {"state": {}}}):
        with pytest.raises(CheckpointError, match=r"wants to run \S+; .* can torch\.save its state dict alone"):
            convert(tree)


@pytest.mark.parametrize(
    "beside",
    [
        nn.CrossEntropyLoss(torch.ones(3)),
        nn.Sequential(nn.Linear(2, 2), nn.GELU()),
        tiny(),
        torch.optim.AdamW([torch.zeros(1)]),
        functools.partial(torch.optim.SGD, lr=0.1),
    ],
    ids=lambda beside: type(beside).__name__,
)
def test_modules_and_optimizers_beside_the_weights(beside: Any, convert: Callable[..., Converted]) -> None:
    tensors, report = convert({"state_dict": MODEL, "hyper_parameters": {"net": beside}, "criterion": beside})
    assert_same(tensors, MODEL)
    assert report.left_out.keys() == {"hyper_parameters", "criterion"}


def test_a_dict_of_another_class_is_one(convert: Callable[..., Converted]) -> None:
    assert_same(convert({"state_dict": AttributeDict(MODEL)}).tensors, MODEL)
    assert_same(convert(collections.defaultdict(dict, model=MODEL)).tensors, MODEL)


# ------------------------------------------------------------------------------------------------- several state dicts


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"weights": MODEL, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "weights"),
        ({"checkpoint": {"generator": MODEL, "discriminator": {"w": torch.ones(1)}}}, "checkpoint.generator"),
        ({"learner_state_dict": under("net.module."), "step": 3}, "learner_state_dict"),
        ({"model": MODEL, "teacher": {"conv1.weight": torch.ones(1)}}, "model"),
        ([MODEL, {"state": {}, "param_groups": []}], "0"),
        ((3, MODEL), "1"),
    ],
)
def test_the_state_dict_that_holds_a_model_is_found(tree: Any, key: str, convert: Callable[..., Converted]) -> None:
    tensors, report = convert(tree)
    assert_same(tensors, MODEL)
    assert f"under {key!r}" in report.recognised
    assert_same(convert(tree, key=key).tensors, MODEL)


@pytest.mark.parametrize(
    ("tree", "choices"),
    [
        ({"model": MODEL, "ema_weights": OTHER}, ["model", "ema_weights"]),
        ({"state_dict": MODEL, "best": {"net": OTHER}}, ["state_dict", "best.net"]),
        ([MODEL, OTHER], ["0", "1"]),
        ({"model": MODEL, "model_ema": MODEL}, ["model", "model_ema"]),
    ],
)
def test_several_state_dicts_are_asked_about(tree: Any, choices: list[str], convert: Callable[..., Converted]) -> None:
    with pytest.raises(AmbiguousCheckpointError, match=r"several state dicts.*key= \(--key\)") as caught:
        convert(tree)
    assert (caught.value.option, caught.value.choices) == ("key", choices)
    assert_same(convert(tree, key=choices[0]).tensors, MODEL)


def test_what_is_asked_for_can_be_given_where_it_is_asked(tmp_path: Path) -> None:
    own = tomevit.create("digits_p1").state_dict()
    averaged = {name: tensor + 1 for name, tensor in own.items()}
    path = foreign.write(tmp_path / "run.pth", under("model.", own) | under("ema.", averaged), key="net", other=own)
    with pytest.raises(AmbiguousCheckpointError, match=r"key= \(--key\)$"):
        tomevit.create("digits_p1", pretrained=path)
    with pytest.raises(AmbiguousCheckpointError, match=r"prefix= \(--prefix\)$"):
        tomevit.create("digits_p1", pretrained=path, key="net")
    model = tomevit.create("digits_p1", pretrained=path, key="net", prefix="ema", format="timm")
    assert_same(dict(model.state_dict()), averaged)
    for call in (weights_of, lambda file: tomevit.export(file, tmp_path / "x.pth", "timm")):
        with pytest.raises(AmbiguousCheckpointError, match=r"--key\) of tomevit convert, whose file every command and"):
            call(path)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model="digits_p1", key="net", prefix="ema")
    assert report.model == "digits_p1"
    assert all(
        check.passed for check in tomevit.verify(tmp_path / "out.safetensors", against=path, key="net", prefix="ema.")
    )
    for given in (True, model, tmp_path / "out.safetensors"):
        with pytest.raises(ValueError, match=r"neither a format nor a key nor a prefix|give it as pretrained="):
            tomevit.create("digits_p1", pretrained=given, key="model")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- heads

PLACES = {
    "torchvision": ["heads.#", "heads.0.#", "heads.1.#", "heads.head.1.#", "heads.fc.#"],
    "deit": ["head.0.#", "head.1.#", "head.fc.#", "head.last_layer.#"],
    "swag": ["head.#", "head.layers.1.#"],
    "hf_vit": ["classifier.0.#", "classifier.1.#", "classifier.out_proj.#"],
}


@pytest.mark.parametrize(("form", "place"), [(form, place) for form in PLACES for place in PLACES[form]])
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_one_linear_layer_is_the_head_wherever_it_is(
    form: str, place: str, key: str, convert: Callable[..., Converted]
) -> None:
    standard = {"torchvision": "heads.head.", "deit": "head.", "swag": "head.layers.head.", "hf_vit": "classifier."}
    state = foreign.fill(getattr(foreign, form)(SIZES))
    moved = {name.replace(standard[form], place.rstrip("#")): tensor for name, tensor in state.items()}
    assert moved.keys() != state.keys()
    plain, found = convert({key: state}), convert({key: moved})
    assert_same(found.tensors, plain.tensors)
    assert found.report.names["head.weight"] == (place.replace("#", "weight"),)
    assert found.report.left_out == {}


@pytest.mark.parametrize(
    "head",
    [
        PROJECTION,
        {"0.weight": torch.ones(24), "0.bias": torch.ones(24), **under("1.", HEAD)},  # a norm in front
        {"weight_g": torch.ones(5, 1), "weight_v": torch.ones(5, 24), "bias": torch.ones(5)},
        {"weight": torch.ones(5, 4 * 24), "bias": torch.ones(5)},  # on the features of four blocks
        under("pre_logits.", HEAD) | under("head.", HEAD),
    ],
)
def test_another_head_is_replaced_or_refused(head: State, convert: Callable[..., Converted]) -> None:
    state = {"state_dict": ENCODER | under("head.", head)}
    with pytest.raises(
        MissingOptionError, match=r"its head, head\..*: num_classes= \(--num-classes\) puts a"
    ) as caught:
        convert(state)
    assert caught.value.option == "num_classes"
    with pytest.raises(MissingOptionError, match=r"of tomevit convert"):
        weights_of(caught.value.args[0].split(": its head")[0], CARD)
    assert_same(convert(state, num_classes=0).tensors, ENCODER)
    tensors, report = convert(state, num_classes=CLASSES)
    assert report.changes == (f"head added for {CLASSES} classes, with fresh weights",)
    assert (
        report.left_out.keys() >= under("head.", {name: head[name] for name in head if name.endswith("weight")}).keys()
    )
    assert tensors["head.weight"].shape == (CLASSES, WIDTH)


def test_an_encoder_leaves_the_head_of_its_training_out(convert: Callable[..., Converted]) -> None:
    encoder = Card(name="tiny", config=Config(depth=2, **foreign.NO_HEAD))
    state = under("module.base_encoder.", ENCODER) | under("module.base_encoder.head.", PROJECTION)
    tensors, report = convert({"state_dict": state}, model=encoder)
    assert_same(tensors, ENCODER)
    assert report.left_out.keys() == under("module.base_encoder.head.", PROJECTION).keys()


def test_a_head_without_a_bias(convert: Callable[..., Converted]) -> None:
    tensors, report = convert(ENCODER | {"head.weight": HEAD["weight"]})
    assert torch.equal(tensors["head.weight"], HEAD["weight"])
    assert not tensors["head.bias"].any()
    assert report.changes == ("a bias of zeros given to head, which has none",)


# ---------------------------------------------------------------------------------------------------- other containers


def _zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")


OTHERS: dict[str, tuple[bytes, str]] = {
    "flax_model.msgpack": (b"\xde\x00\x10\xa3cls\xc7", r"Flax's msgpack.*flax\.serialization.*makes an \.npz of it"),
    "checkpoint_100": (b"\x83\xa10\x83\xa3cls", r"Flax's msgpack"),
    "model.h5": (b"\x89HDF\r\n\x1a\n", r"HDF5 file \(Keras.*keras\.saving\.load_model"),
    "model.gguf": (b"GGUF\x03\0\0\0", r"GGUF file.*gguf\.GGUFReader"),
    "model.onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x052.9.0", r"ONNX model.*onnx\.load"),
    "saved_model.pb": (b"\x08\x01\x12\xf5\x1f\n", r"TensorFlow SavedModel.*tf\.saved_model\.load"),
    "model.ckpt.index": (bytes(60) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", r"TensorFlow checkpoint.*load_checkpoint"),
    "model.ckpt.data-00000-of-00001": (bytes(100), r"TensorFlow checkpoint"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-3"\n', r"index of a TensorFlow checkpoint"),
    "model.mlmodel": (b"\x08\x04\x12\x2d\n\x10", r"Core ML model, which holds a program"),
    "model.plan": (b"ftrt\0\0\0\0", r"engine of TensorRT"),
    "model.tflite": (b"\x1c\0\0\0TFL3", r"TensorFlow Lite model"),
    "model.pte": (b"\x1c\0\0\0ET12", r"ExecuTorch program"),
    "__0_0.distcp": (b"PK\x03\x04abc", r"distributed checkpoint: `python -m torch\.distributed"),
    ".metadata": (b"\x80\x04\x95\0ctorch.distributed.checkpoint.metadata\n", r"distributed checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_read_is_named_with_a_way_on(name: str, tmp_path: Path) -> None:
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path / name))}.? is .*{message}"):
        tomevit.convert(tmp_path / name, tmp_path / "out.safetensors", model=CARD)


def test_archives_that_are_not_read_are_named(tmp_path: Path, convert: Callable[..., Converted]) -> None:
    _zip(tmp_path / "model.keras", "metadata.json", "config.json", "model.weights.h5")
    _zip(tmp_path / "model.pt2", "x/archive_format", "x/models/model.json", "x/constants.pkl")
    for name, message in (("model.keras", r"Keras archive.*keras\."), ("model.pt2", r"torch\.export\.load")):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)
    for tree in (
        {"ds_version": "0.14", "module": {name: torch.empty(0) for name in MODEL}},
        {"ds_config": {}, "optimizer_state_dict": {"fp32_flat_groups": [torch.ones(3)]}},
    ):
        with pytest.raises(CheckpointError, match=r"part of a DeepSpeed ZeRO checkpoint.*zero_to_fp32\.py"):
            convert(tree)
    assert_same(convert({"ds_version": "0.14", "module": MODEL}).tensors, MODEL)  # not spread over processes


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (".metadata", "a distributed checkpoint: `python -m"),
        ("zero_to_fp32.py", "a DeepSpeed ZeRO checkpoint"),
        ("saved_model.pb", "a TensorFlow SavedModel"),
        ("model.ckpt.index", "a TensorFlow checkpoint"),
        ("_METADATA", "an Orbax checkpoint"),
    ],
)
def test_directories_that_are_not_read_are_named(mark: str, message: str, tmp_path: Path) -> None:
    assert describe_directory(tmp_path) is None
    (tmp_path / mark).touch()
    assert message in (describe_directory(tmp_path) or "")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["backbone.patch_embed.projection.weight", "backbone.layers.0.ln1.weight"], "MMPretrain"),
        (["visual.conv1.weight", "visual.layer1.0.conv1.weight"], "the ResNet of a CLIP"),
        (["base_model.model.blocks.0.attn.qkv.lora_A.default.weight"], r"an adapter .*merge_and_unload\(\)"),
    ],
)
def test_other_models_are_named(names: list[str], what: str, convert: Callable[..., Converted]) -> None:
    with pytest.raises(CheckpointError, match=f"of no known format: it looks like {what}"):
        convert({"state_dict": {name: torch.ones(1) for name in names}})


def test_the_report_of_a_run_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tomevit.create("digits_p1").state_dict()
    path = foreign.write(tmp_path / "run.pth", under("net.", own) | under("loss.", PROJECTION), key="state_dict")
    from tomevit.cli import main

    with pytest.raises(SystemExit):
        main(["convert", str(path), "--model", "digits_p1", "--prefix", "net", "-o", str(tmp_path / "out.safetensors")])
    out = capsys.readouterr().out
    assert "left out    loss.{i}.weight, loss.{i}.running_mean, loss.{i}.num_batches_tracked: beside the model" in out
    assert "under 'state_dict', in names that begin with 'net.'" in out


@pytest.mark.parametrize("layer", ["fc", "head", "net.classifier.1", "model.linear", "cls_head"])
def test_a_head_beside_its_backbone_is_the_head(layer: str, convert: Callable[..., Converted]) -> None:
    run = under("net.backbone.", ENCODER) | {"criterion.weight": torch.ones(5)}
    tensors, report = convert(run | under(f"{layer}.", HEAD))
    assert_same(tensors, MODEL)
    assert f"the head is {layer}, which lies beside the model" in report.changes
    assert report.left_out.keys() == {"criterion.weight"}
    tensors, report = convert(run | under(f"{layer}.", HEAD), num_classes=3)
    assert tensors["head.weight"].shape == (3, WIDTH)
    for others in ({"weight": torch.ones(5, 2 * WIDTH)}, {**HEAD, "extra.fc.weight": HEAD["weight"]}):
        tensors, report = convert(run | under(f"{layer}.", others))
        assert_same(tensors, ENCODER)
        assert report.left_out.keys() == {"criterion.weight", *under(f"{layer}.", others)}
