"""`tomevit export` of programs: what the model answers, onnxruntime, OpenVINO and torch's own runtimes answer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tomevit import cli
from tomevit.config import Preprocess
from tomevit.models import VisionTransformer
from tomevit.programs import PROGRAMS, archive, export_program
from tomevit.programs import onnx as onnx_programs
from tomevit.programs.trace import fold_normalisation
from tomevit.weights import native

#: What TensorRT 10 has, without restrictions that could touch us (onnx/onnx-tensorrt, docs/operators.md, at 10.0), and
#: onnxruntime and OpenVINO too. No scatter, no control flow, no sequences, nothing whose shape depends on values.
EVERYWHERE = """
    Add ArgMax Cast Clip Concat Conv Div Equal Erf Expand Gather GatherElements GatherND Gelu Gemm Greater
    GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mul Neg Not Pow Range ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceSum Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh TopK
    Transpose Unsqueeze Where
"""

MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "vit": lambda: tiny(8, depth=2),
    "unmerged": lambda: tiny(0, depth=1),
    "distilled": lambda: tiny(8, depth=2, dist_token=True),
    "mae": lambda: tiny(8, depth=1, pool="avg", pool_norm="after", prop_attn=False),
    "options": lambda: tiny(
        [5, 3], depth=2, img_size=(16, 24), reg_tokens=3, layer_scale=0.1, qk_norm=True, act="quick_gelu",
        pos_embed_prefix=False, num_classes=0, pre_norm=True, qkv_bias=False,
    ),
    "every_kth": lambda: tiny(0.3, depth=1, pool="avg", matching="every_kth"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """OpenVINO's converter, unlike its runtime, reports its use: nothing here may."""
    called: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: called.append(address))
    yield
    assert called == []


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def in_openvino(path: Path) -> Callable[[Tensor], Tensor]:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled({"images": images.numpy()})[0].copy())


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def operators(path: Path) -> Counter[str]:
    graph = onnx.load(path, load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    return Counter(node.op_type for node in graph.node)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionTransformer, Path]:
    """A model with a card, and its file."""
    model = tiny(8, depth=2, num_classes=3)
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", resize="squash")
    model.card = replace(
        model.card, name="mine", preprocess=preprocess, class_names=("ant", "bee", "cat"), licence="mit"
    )
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tomevit.save(model, path)
    return model, path


# ----------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name", MODELS)
def test_onnx_answers_alike_at_any_batch(name: str, tmp_path: Path) -> None:
    model, path = MODELS[name](), tmp_path / "model.onnx"
    program = export_program(model, path)
    assert program.written == [path]
    assert list(tmp_path.iterdir()) == [path]
    assert program.parity is not None
    assert program.parity.same_top1 == program.parity.images == 4
    assert program.parity.difference < 1e-5 * program.parity.largest
    for runtime, load in RUNTIMES.items():
        run = load(path)
        for batch in (1, 3):
            images = images_for(model, batch, seed=batch)
            with torch.inference_mode():
                assert relative_error(run(images), model(images)) < 1e-5, runtime
    onnx.checker.check_model(path, full_check=True)
    found = operators(path)
    assert found.keys() <= set(EVERYWHERE.split())
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    counts = [constants[node.input[1]].item() for node in graph.node if node.op_type == "TopK"]
    assert (counts == []) == (name == "unmerged")
    assert max(counts, default=0) < 3840  # TensorRT's limit
    ends = [*graph.input, *graph.output]
    shapes = [[dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim] for end in ends]
    config = model.config
    assert [end.name for end in ends] == ["images", "logits" if config.num_classes else "features"]
    assert shapes == [["batch", 3, *config.img_size], ["batch", config.num_classes or config.embed_dim]]


def test_a_stable_sort_stays_one(tmp_path: Path) -> None:
    """Of equally similar tokens the earlier merges, here as in torch: images of one colour have no others."""
    model = tiny(8, depth=1, pool="avg")
    nn.init.zeros_(model.pos_embed)
    export_program(model, tmp_path / "model.onnx", batch=2)
    images = torch.ones(2, 3, 32, 32)
    images[:, :, :, 16:] = -1
    with torch.inference_mode():
        expected = model(images)
    for runtime, load in RUNTIMES.items():
        assert relative_error(load(tmp_path / "model.onnx")(images), expected) < 1e-5, runtime


def test_float16_does_not_overflow(tmp_path: Path) -> None:
    model, path = tiny(8, depth=2), tmp_path / "half.onnx"
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[24:48] += 300  # 300² is beyond float16; a shift of all keys leaves attention as it is
            block.attn.qkv.weight[:24] *= 0.1
            block.attn.qkv.bias[:24] = 0
    program = export_program(model, path, dtype="float16", batch=3)
    assert program.metadata["input"].startswith("images: float16 (3, 3, 32, 32)")
    images = images_for(model)
    with torch.inference_mode():
        expected = model(images)
    for runtime, load in RUNTIMES.items():
        found = load(path)(images.half())
        assert found.dtype == torch.float16, runtime
        assert relative_error(found.float(), expected) < 2e-2, runtime
    assert operators(path).keys() <= set(EVERYWHERE.split())


def test_int8_multiplies_in_8_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(8, depth=2, embed_dim=96)
    path = tmp_path / "int8.onnx"
    program = export_program(model, path, dtype="int8", batch=3)
    assert [record for record in caplog.records if record.name != "torch.__trace"] == []
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = Counter((node.op_type, node.input[1] in constants) for node in graph.node if "MatMul" in node.op_type)
    assert products["MatMulInteger", True] >= 4 * 2 - 1  # every linear layer, the one of a single token perhaps not,
    assert not products["MatMul", True]
    assert products["MatMul", False] >= 2 * 2 + 1  # and neither attention nor matching
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    assert stored < 0.4 * sum(4 * parameter.numel() for parameter in model.parameters())
    assert list(tmp_path.iterdir()) == [path]
    images = images_for(model)
    with torch.inference_mode():
        expected = model(images)
    for runtime, load in RUNTIMES.items():
        assert 1e-4 < relative_error(load(path)(images), expected) < 0.1, runtime
    assert program.parity is not None
    assert program.parity.difference > 0


def test_a_fixed_batch_an_opset_and_weights_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_programs, "ONE_FILE", 0)
    model, path = tiny(8, depth=2), tmp_path / "model.onnx"
    program = export_program(model, path, batch=2, opset=18, r=3)
    assert program.written == [path, tmp_path / "model.onnx.data"]
    assert program.written[1].stat().st_size > 0.9 * sum(4 * p.numel() for p in model.parameters())
    assert program.parity is not None
    assert program.parity.images == 2
    proto = onnx.load(path)
    assert proto.opset_import[0].version == 18
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    images = images_for(model, 2)
    with torch.inference_mode():
        assert relative_error(in_onnxruntime(path)(images), model(images, r=3)) < 1e-5


# ---------------------------------------------------------------------------------------------------------- torch's own


def test_torch_archives_answer_alike(vit: tuple[VisionTransformer, Path], tmp_path: Path) -> None:
    model, _ = vit
    path = tmp_path / "model.pt2"
    program = export_program(model, path, "pt2", dtype="float16")
    extra = {archive.METADATA: ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra[archive.METADATA]) == program.metadata
    for batch in (1, 3):
        images = images_for(model, batch)
        with torch.inference_mode():
            assert relative_error(loaded(images.half()).float(), model(images)) < 2e-2


def test_compiled_packages_answer_alike(tmp_path: Path) -> None:
    model = tiny(8, depth=1, pool="avg")
    program = export_program(model, tmp_path / "model.pt2", "aoti")
    assert list(tmp_path.iterdir()) == program.written
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    assert loaded.get_metadata().items() >= program.metadata.items()
    for batch in (1, 3):
        images = images_for(model, batch)
        with torch.inference_mode():
            assert relative_error(loaded(images), model(images)) < 1e-5


# ------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("bias", [True, False])
def test_a_normalisation_can_be_folded_into_the_layer_behind_it(bias: bool) -> None:
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    proj = nn.Conv2d(3, 5, 4, 4, bias=bias).double()
    pixels = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    )
    expected = proj((pixels - mean) / std)
    fold_normalisation(proj, preprocess)
    assert torch.allclose(proj(pixels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pixels_go_in_as_they_are(vit: tuple[VisionTransformer, Path], dtype: str, tmp_path: Path) -> None:
    model, _ = vit
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = export_program(model, tmp_path / "raw.onnx", raw=True, dtype=dtype, batch=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert program.metadata["input"] == "images: uint8 (2, 3, 32, 32), pixels from 0 to 255"
    assert not {"mean", "std"} & program.metadata.keys()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.inference_mode():
        expected = model((pixels / 255 - mean) / std)
    bound = 1e-5 if dtype == "float32" else 2e-2
    assert relative_error(in_onnxruntime(tmp_path / "raw.onnx")(pixels).float(), expected) < bound


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_a_program_that_answers_otherwise_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("before")

    def abacus(answer: float) -> Callable[[Path], tuple[str, Callable[[Tensor], Tensor]]]:
        return lambda _: ("abacus", lambda images: torch.full((len(images), 7), answer))

    for answer, says in ((0.3, "abacus does not answer as torch does"), (torch.nan, "not finite")):
        monkeypatch.setitem(PROGRAMS, "pt2", PROGRAMS["pt2"]._replace(load=abacus(answer)))
        with pytest.raises(ValueError, match=says):
            export_program(tiny(8, depth=1), path, "pt2")
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("before")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(OSError, match="No space left"):
        export_program(tiny(0, depth=1), path, batch=1)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"out": "model.pt2"}, "must end in .onnx"),
        ({"out": "missing/model.onnx"}, "there is no directory"),
        ({"format": "tflite"}, "there are onnx, pt2, aoti"),
        ({"dtype": "bfloat16"}, "float32, float16 or int8"),
        ({"format": "pt2", "out": "m.pt2", "dtype": "int8"}, "float32, float16 or bfloat16"),
        ({"batch": 0}, "batch is 0"),
        ({"opset": 17}, "from 18 to"),
        ({"opset": 99}, "from 18 to"),
        ({"format": "pt2", "out": "m.pt2", "opset": 18}, "opset is ONNX's"),
        ({"r": -1}, "cannot be negative"),
        ({"model": nn.Linear(1, 1)}, "model is a Linear"),
        ({"model": tiny(4, depth=2, matching="random")}, "draws anew"),
        ({"model": "vit_b61"}, "did you mean vit_b16"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    given = {"model": tiny(depth=1), "out": "model.onnx"} | arguments
    with pytest.raises((ValueError, OSError), match=says):
        export_program(given.pop("model"), tmp_path / given.pop("out"), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_packages(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_programs, "find_spec", lambda name: None if name == missing else True)
    if missing != "onnxruntime":
        with pytest.raises(ValueError, match=rf"needs {missing}: pip install 'tomevit\[export\]'"):
            export_program(tiny(depth=1), tmp_path / "model.onnx")
    else:
        with pytest.raises(ValueError, match=r"quantising needs onnxruntime: pip install 'tomevit\[export\]'"):
            export_program(tiny(depth=1), tmp_path / "model.onnx", dtype="int8", batch=1)
        assert list(tmp_path.iterdir()) == []
        assert export_program(tiny(depth=1), tmp_path / "model.onnx", batch=1).parity is None


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match="no compiler was found"):
        export_program(tiny(depth=1), tmp_path / "model.pt2", "aoti")


def test_weights_and_programs_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use tomevit\.export_program"):
        tomevit.export(tiny(depth=1), tmp_path / "model.onnx", "onnx")


# ----------------------------------------------------------------------------------------------------- the command line


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


READER = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
about = session.get_modelmeta().custom_metadata_map
(images,), (logits,) = session.get_inputs(), session.get_outputs()
height, width = json.loads(about["image_size"])
pixels = np.random.default_rng(0).integers(0, 256, (5, height, width, 3))
mean, std = (np.array(json.loads(about[name])) for name in ("mean", "std"))
batch = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
(answer,) = session.run([logits.name], {images.name: batch})
assert not {"torch", "tomevit"} & sys.modules.keys()
names = json.loads(about["class_names"])
print(json.dumps({"about": about, "logits": answer.tolist(), "names": [names[i] for i in answer.argmax(1)]}))
"""


def test_a_file_that_only_onnxruntime_and_numpy_read(
    vit: tuple[VisionTransformer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, source = vit
    path = tmp_path / "model.onnx"
    status, out, err = run_cli(capsys, str(source), "--format", "onnx", "-o", str(path), "--r", "6")
    assert (status, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines[:4] == [
        ["written", str(path)],
        ["r", "6: of 65 tokens 53 leave the last block"],
        ["input", "images: float32 (batch, 3, 32, 32), pixels from 0 to 1, less mean, over std"],
        ["output", "logits: float32 (batch, 3)"],
    ]
    assert lines[4][0] == "compared"
    assert lines[4][1].startswith(f"onnxruntime {onnxruntime.__version__} with torch in float32")
    assert lines[4][1].endswith("same top-1 4 of 4")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = model(images.float(), r=6)
    assert relative_error(torch.tensor(found["logits"]), expected) < 1e-5
    assert found["names"] == [("ant", "bee", "cat")[i] for i in expected.argmax(1)]
    about = found["about"]
    assert (about["name"], about["licence"], about["tomevit"]) == ("mine", "mit", tomevit.__version__)
    assert (about["r"], json.loads(about["tokens"])) == ("6", [65, 59, 53])
    assert (about["resize"], about["interpolation"], about["crop_pct"]) == ("squash", "bilinear", "0.875")
    assert str(Path(tomevit.__file__).parent).encode() not in path.read_bytes()  # no directories of this machine


def test_json(vit: tuple[VisionTransformer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    status, out, err = run_cli(capsys, str(vit[1]), "--format", "pt2", "-o", str(path), "--batch", "2", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["written"] == [str(path)]
    assert report["metadata"]["output"] == "logits: float32 (2, 3)"
    assert report["parity"]["same_top1"] == report["parity"]["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--format onxn -o m.onnx", "there is no format 'onxn'; did you mean onnx?"),
        ("--format onnx -o m.pt2", "m.pt2 must end in .onnx"),
        ("--format onnx -o m.onnx --r eight", "8,-1"),
        ("--format onnx -o m.onnx --r [1,2,3]", "the model has 2"),
        ("--format onnx -o m.onnx --dtype int4", "int8"),
        ("--format timm -o m.pth --r 8", "--r is for programs (onnx, pt2, aoti), and timm is of weights"),
        ("--format timm -o m.pth --raw", "--raw is for programs"),
        ("--format aoti -o missing/m.pt2", "there is no directory missing"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    vit: tuple[VisionTransformer, Path],
    arguments: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli(capsys, str(vit[1]), *arguments.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    native.save(tiny(depth=1), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="the source itself"):
        export_program(tmp_path / "model.pt2", tmp_path / "model.pt2", "pt2")
