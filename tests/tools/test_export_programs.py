"""`tomevit export` of programs: what the model answers, onnxruntime, OpenVINO and torch's own runtimes answer."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tomevit import cli
from tomevit.cli import export as export_command
from tomevit.config import Preprocess, Preset
from tomevit.deploy import programs
from tomevit.deploy.programs import LEAST_TORCH, PROGRAMS, archive, describe_program, export_program
from tomevit.deploy.programs import onnx as onnx_programs
from tomevit.deploy.programs import openvino as openvino_programs
from tomevit.deploy.programs.trace import fold_normalisation
from tomevit.models import VisionTransformer
from tomevit.weights import checkpoint

#: What TensorRT 10 has, without restrictions that could touch us (onnx/onnx-tensorrt, docs/operators.md, at 10.0), and
#: onnxruntime and OpenVINO too. No scatter, no control flow, no sequences, nothing whose shape depends on values.
EVERYWHERE = """
    Add ArgMax Cast Clip Concat Conv Div Elu Equal Erf Expand Gather GatherElements GatherND Gelu Gemm Greater
    GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mul Neg Not Pow Range ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceSum Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh TopK
    Transpose Unsqueeze Where
"""

pytestmark = pytest.mark.skipif(torch.__version__ < LEAST_TORCH, reason="needs a newer torch")


@pytest.fixture(autouse=True, scope="module")
def _no_network() -> Iterator[None]:
    """OpenVINO's converter, unlike its runtime, reports its use: nothing here may."""
    called: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda _, address: called.append(address))
        yield
    assert called == []


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def in_openvino(path: Path) -> Callable[[Tensor], Tensor]:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled({"images": images.numpy()})[0].copy())


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def assert_alike(path: Path, images: Tensor, expected: Tensor, bound: float) -> None:
    """In every runtime."""
    for runtime, load in RUNTIMES.items():
        found = load(path)(images)
        assert relative_error(found.float(), expected) < bound, runtime


def operators(path: Path) -> Counter[str]:
    graph = onnx.load(path, load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    return Counter(node.op_type for node in graph.node)


def ends(path: Path) -> dict[str, list[str | int]]:
    """The shapes of a program's input and output."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        end.name: [dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim]
        for end in (*graph.input, *graph.output)
    }


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


def run_cli(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stdout(out), redirect_stderr(err):
        cli.main(["export", *arguments])
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def opened(vit: tuple[VisionTransformer, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file as an ONNX program of an open batch at r = 6, and what the command said. Half of all time here."""
    path = tmp_path_factory.mktemp("opened") / "model.onnx"
    status, out, err = run_cli(str(vit[1]), "--format", "onnx", "-o", str(path), "--r", "6")
    assert (status, err) == (0, "")
    return path, out


# ----------------------------------------------------------------------------------------------------------------- ONNX


def test_an_open_batch(vit: tuple[VisionTransformer, Path], opened: tuple[Path, str]) -> None:
    (model, _), (path, _) = vit, opened
    assert list(path.parent.iterdir()) == [path]
    for load in RUNTIMES.values():
        run = load(path)
        for batch in (1, 3):
            images = images_for(model, batch, seed=batch)
            with torch.inference_mode():
                assert relative_error(run(images), model(images, r=6)) < 1e-5
    onnx.checker.check_model(path, full_check=True)
    assert operators(path).keys() <= set(EVERYWHERE.split())
    assert ends(path) == {"images": ["batch", 3, 32, 32], "logits": ["batch", 3]}
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    counts = [constants[node.input[1]].item() for node in graph.node if node.op_type == "TopK"]
    assert counts  # constants all, as TensorRT wants them
    assert max(counts) < 3840  # TensorRT's limit
    assert str(Path(tomevit.__file__).parent).encode() not in path.read_bytes()  # no directories of this machine


def test_every_option(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = tiny(
        [5, 3],
        depth=2,
        img_size=(16, 24),
        dist_token=True,
        reg_tokens=3,
        layer_scale=0.1,
        qk_norm=True,
        act="quick_gelu",
        pos_embed_prefix=False,
        pre_norm=True,
        qkv_bias=False,
    )
    program = export_program(model, path, batch=3)
    assert program.written == [path]
    assert program.parity is not None
    assert program.parity.same_top1 == program.parity.images == 3
    assert program.parity.difference < 1e-5 * program.parity.largest
    images = images_for(model, 3)
    with torch.inference_mode():
        assert_alike(path, images, model(images), 1e-5)
    assert operators(path).keys() <= set(EVERYWHERE.split())
    assert ends(path) == {"images": [3, 3, 16, 24], "logits": [3, 7]}


def test_an_r_in_words_is_plain_numbers_in_a_program(tmp_path: Path) -> None:
    r, meant = "1.3x late", [12, 26]
    model, path = tiny(depth=2, pool="avg"), tmp_path / "model.onnx"
    program = export_program(model, path, r=r)
    assert json.loads(program.metadata["r"]) == meant == model.plain(r)
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props}["r"] == program.metadata["r"]
    assert json.loads(program.metadata["tokens"]) == list(model.token_counts(r))
    for batch in (1, 3):
        images = images_for(model, batch, seed=batch)
        with torch.inference_mode():
            expected = model(images, r)
            assert relative_error(expected, model(images, 0)) > 1e-3
            assert_alike(path, images, expected, 1e-5)
    assert operators(path).keys() <= set(EVERYWHERE.split())


def test_a_preset_of_the_card_is_an_r_of_programs(tmp_path: Path) -> None:
    model, path = tiny(depth=2), tmp_path / "model.pt2"
    preset = Preset(name="diffrate-0.1g", r=("2+3 diffrate", 1), num_tokens=model.config.num_tokens, source="a paper")
    model.card = replace(model.card, presets=(preset,))
    program = export_program(model, path, "pt2", r="diffrate-0.1g", batch=2)
    assert json.loads(program.metadata["r"]) == ["2+3 diffrate", 1]


def test_a_stable_sort_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equally similar tokens the earlier merges, here as in torch: images of two colours have hardly others."""
    monkeypatch.setattr(onnx_programs, "ONE_FILE", 0)
    model = tiny(8, depth=1, pool="avg", pool_norm="after", prop_attn=False, num_classes=0)
    path = tmp_path / "model.onnx"
    nn.init.zeros_(model.pos_embed)
    program = export_program(model, path, batch=2, opset=18, r=3)
    images = torch.ones(2, 3, 32, 32)
    images[:, :, :, 16:] = -1
    with torch.inference_mode():
        assert_alike(path, images, model(images, r=3), 1e-5)
    assert ends(path) == {"images": [2, 3, 32, 32], "features": [2, 24]}
    # and what else can be asked for
    assert program.written == [path, tmp_path / "model.onnx.data"]
    assert program.written[1].stat().st_size > 0.9 * sum(4 * p.numel() for p in model.parameters())
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 18


def test_float16_does_not_overflow_and_pixels_go_in_as_they_are(tmp_path: Path) -> None:
    model, path = tiny(8, depth=1, pool="avg"), tmp_path / "half.onnx"
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model.card = replace(model.card, preprocess=Preprocess(mean=mean, std=std))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[24:48:8] += 300  # 300² is beyond float16; a shift of all keys leaves attention as it is
            block.attn.qkv.weight[:24] *= 0.1
            block.attn.qkv.bias[:24] = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = export_program(model, path, dtype="float16", raw=True, batch=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert program.metadata["input"] == "images: uint8 (3, 3, 32, 32), pixels from 0 to 255"
    assert program.metadata["output"] == "logits: float16 (3, 7)"
    assert not {"mean", "std"} & program.metadata.keys()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    images = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.inference_mode():
        assert_alike(path, pixels, model(images), 2e-2)
    assert in_onnxruntime(path)(pixels).dtype == torch.float16
    assert operators(path).keys() <= set(EVERYWHERE.split())


def test_int8_multiplies_in_8_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(8, depth=1, embed_dim=96, pool="avg")
    path = tmp_path / "int8 [a]*.onnx"
    program = export_program(model, path, dtype="int8", batch=3)
    assert [record for record in caplog.records if record.name != "torch.__trace"] == []
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = Counter((node.op_type, node.input[1] in constants) for node in graph.node if "MatMul" in node.op_type)
    assert products["MatMulInteger", True] >= 4  # every linear layer,
    assert not products["MatMul", True]
    assert products["MatMul", False] >= 2 + 1  # and neither attention nor matching
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


def inputs_of_products(path: Path) -> Counter[tuple[str, ...]]:
    """What makes the inputs of each product: "" for the program's own images and weights."""
    graph = onnx.load(path).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    return Counter(
        tuple(makers.get(name, "") for name in node.input) for node in graph.node if node.op_type == "MatMul"
    )


def test_int8_by_calibration_multiplies_linear_layers_in_8_bits_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny(8, depth=2, embed_dim=96, pool="avg")
    path = tmp_path / "int8 [a]*.onnx"
    images = images_for(model, 12)
    program = export_program(model, path, dtype="int8", calibrate=images)
    assert [record for record in caplog.records if record.name != "torch.__trace"] == []
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [path]
    found = inputs_of_products(path)
    assert found["DequantizeLinear", "DequantizeLinear"] == 4 * 2  # every linear layer,
    others = [key for key in found.elements() if "DequantizeLinear" in key]
    assert len(others) == 4 * 2
    assert found.total() >= 4 * 2 + 2 * 4  # and neither attention, nor matching, nor merging
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)
    assert stored < 0.4 * sum(4 * parameter.numel() for parameter in model.parameters())
    with torch.inference_mode():
        expected = model(images)
    for runtime, load in RUNTIMES.items():
        assert 1e-4 < relative_error(load(path)(images), expected) < 0.1, runtime
    about = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert about.items() >= program.metadata.items()
    assert program.metadata["input"].startswith("images: float32 (batch, 3, 32, 32)")
    assert program.parity is not None
    assert (program.parity.images, program.parity.source) == (1 + 8, "calibration")


def test_calibrated_products_run_in_8_bits_at_a_fixed_batch_too(tmp_path: Path) -> None:
    """Where shapes are fixed, onnxruntime takes a bias into the product, if it can, and multiplies in float32 then."""
    path, run = tmp_path / "model.onnx", tmp_path / "run.onnx"
    model = tiny(4, depth=2)
    export_program(model, path, dtype="int8", batch=3, calibrate=images_for(model, 3))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(run), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(run).graph.node].count("MatMulIntegerToFloat") == 4 * 2


def test_calibration_of_pixels_in_batches_of_a_fixed_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as the model takes them, images come to the program as the pixels that they were."""
    model = tiny(8, depth=1, pool="avg")
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=1.0)
    model.card = replace(model.card, preprocess=preprocess)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    seen: list[Tensor] = []
    quantise = onnx_programs._quantise

    def look(source: Path, out: Path, calibration: Any, *, large: bool) -> None:
        seen.extend(calibration)
        quantise(source, out, calibration, large=large)

    def prepare(transform: tomevit.transform.Transform) -> Tensor:
        return transform(pixels)

    monkeypatch.setattr(onnx_programs, "_quantise", look)
    path = tmp_path / "model.onnx"
    export_program(model, path, dtype="int8", batch=3, raw=True, calibrate=prepare)
    assert [len(batch) for batch in seen] == [3, 3]
    assert torch.equal(torch.cat(seen), pixels[[0, 1, 2, 3, 0, 1]])  # the last is filled up
    with torch.inference_mode():
        expected = model(tomevit.transform(model)(pixels[:3]))
    assert relative_error(in_onnxruntime(path)(pixels[:3]), expected) < 0.1


# ------------------------------------------------------------------------------------------------------------- OpenVINO


@pytest.mark.parametrize(
    ("dtype", "share", "bound"), [("float32", 1.0, 1e-5), ("float16", 0.5, 5e-3), ("bfloat16", 0.5, 0.05)]
)
def test_openvinos_own_files(dtype: str, share: float, bound: float, tmp_path: Path) -> None:
    model, path = tiny(8, depth=2, embed_dim=48), tmp_path / "model.xml"
    program = export_program(model, path, "openvino", dtype=dtype, batch=None if dtype == "float32" else 3)
    weights = tmp_path / "model.bin"
    assert program.written == [path, weights]
    assert sorted(tmp_path.iterdir()) == [weights, path]
    matrices = sum(4 * parameter.numel() for parameter in model.parameters())
    assert weights.stat().st_size == pytest.approx(share * matrices, rel=0.25)
    read = openvino.Core().read_model(path)
    about = {name: read.get_rt_info(["tomevit", name]).astype(str) for name in program.metadata}
    assert about == program.metadata
    assert about["dtype"] == dtype
    assert "float32" in about["input"]
    for batch in (1, 3) if dtype == "float32" else (3,):
        images = images_for(model, batch, seed=batch)
        with torch.inference_mode():
            assert relative_error(in_openvino(path)(images), model(images)) < bound
    assert program.parity is not None
    assert program.parity.runtime.startswith("OpenVINO 20")
    assert program.parity.difference < bound * program.parity.largest


def test_ways_to_merge_answer_alike_everywhere(tmp_path: Path) -> None:
    r = ["grid", "4+2 diffrate", "2 importance", "2 pitome"]
    model, path = tiny(r, depth=len(r), pool="avg", reg_tokens=2), tmp_path / "model.onnx"
    export_program(model, path)
    assert set(operators(path)) <= set(EVERYWHERE.split())
    for batch in (1, 3):
        images = images_for(model, batch, seed=batch)
        with torch.inference_mode():
            assert_alike(path, images, model(images), 1e-5)


@pytest.mark.skipif(find_spec("nncf") is None, reason="nncf is not installed")
@pytest.mark.parametrize("raw", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_openvinos_int8(raw: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, path = tiny(8, depth=2, embed_dim=96, pool="avg"), tmp_path / "model.xml"
    model.card = replace(model.card, preprocess=Preprocess(crop_pct=1.0))
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    images = tomevit.transform(model)(pixels)
    program = export_program(model, path, "openvino", dtype="int8", calibrate=images, raw=raw)
    assert capfd.readouterr() == ("", "")
    with torch.inference_mode():
        expected = model(images)
    found = in_openvino(path)(pixels if raw else images)
    assert 1e-4 < relative_error(found, expected) < 0.1
    alone = in_openvino(path)((pixels if raw else images)[:1])
    assert relative_error(alone, found[:1]) < 1e-4  # whatever else is in the batch
    assert (tmp_path / "model.bin").stat().st_size < 0.4 * sum(4 * p.numel() for p in model.parameters())
    products = [node for node in openvino.Core().read_model(path).get_ops() if node.get_type_name() == "MatMul"]
    makers = [[value.get_node().get_type_name() for value in node.input_values()] for node in products]
    assert (
        sum(inputs[1] == "Multiply" for inputs in makers) == 4 * 2 + 1
    )  # of int8 weights: linear layers, and the head
    assert len(makers) >= 4 * 2 + 1 + 2 * 3
    assert program.parity is not None
    assert program.parity.source == "calibration"


@pytest.mark.skipif(find_spec("nncf") is None, reason="nncf is not installed")
def test_quantising_reports_nothing_over_the_network() -> None:
    code = (
        "import os; from tomevit.deploy.programs.openvino import _import_nncf; _import_nncf();"
        "from nncf.telemetry import wrapper;"
        "assert not isinstance(wrapper.telemetry, wrapper.NNCFTelemetry); assert 'NNCF_CI' not in os.environ"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_lies_in_the_place_of_openvinos_weights(tmp_path: Path) -> None:
    checkpoint.save(tiny(depth=1), tmp_path / "model.safetensors")
    source = (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is what would be read"):
        export_program(source, tmp_path / "model.xml", "openvino")
    with pytest.raises(ValueError, match=r"model\.bin is there without model\.xml, and would be replaced"):
        export_program(tiny(depth=1), tmp_path / "model.xml", "openvino")
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(source, before)]


def test_files_that_belong_together_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("before")
    shutil_move = programs.shutil.move
    moved: list[str] = []

    def fill_the_disk(file: Path, draft: Path) -> None:
        if moved:
            raise OSError(28, "No space left on device")
        moved.append(str(shutil_move(file, draft)))

    monkeypatch.setattr(programs.shutil, "move", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        export_program(tiny(depth=1), tmp_path / "model.xml", "openvino", batch=1)
    assert moved
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        ("model.xml", "model.bin"), "before"
    )


@pytest.mark.parametrize(("missing", "dtype"), [("openvino", "float32"), ("onnx", "float32"), ("nncf", "int8")])
def test_without_openvinos_packages(missing: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_programs, "find_spec", lambda name: None if name == missing else True)
    model = tiny(depth=1)
    calibrate = images_for(model) if dtype == "int8" else None
    says = rf"writing {dtype} for OpenVINO needs {missing}: pip install 'tomevit\[openvino\]'"
    with pytest.raises(ValueError, match=says):
        export_program(model, tmp_path / "model.xml", "openvino", dtype=dtype, calibrate=calibrate)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_openvino_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(
        ValueError, match=r"^OpenVINO [0-9.]+ cannot run this program, and nothing was written: [^\n]+$"
    ):
        openvino_programs.load_openvino(tmp_path / "model.xml")


# ---------------------------------------------------------------------------------------------------------- torch's own


def test_torch_archives_answer_alike(tmp_path: Path) -> None:
    model, path = tiny(8, depth=1, pool="avg"), tmp_path / "model.pt2"
    program = export_program(model, path, "pt2", dtype="float16")
    extra = {archive.METADATA: ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra[archive.METADATA]) == program.metadata
    for batch in (1, 3):
        images = images_for(model, batch)
        with torch.inference_mode():
            assert relative_error(loaded(images.half()).float(), model(images)) < 2e-2


def test_compiled_packages_answer_alike(tmp_path: Path) -> None:
    model = tiny(["8+3 diffrate"], depth=1, pool="avg")
    # Vector instructions and optimising what surrounds the kernels take half of the time, and are torch's to test.
    quick = {
        "cpp.simdlen": 1,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
    }
    with inductor_config.patch(quick):
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
def test_a_normalisation_can_be_folded_into_the_layer_after_it(bias: bool) -> None:
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    proj = nn.Conv2d(3, 5, 4, 4, bias=bias).double()
    pixels = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    )
    expected = proj((pixels - mean) / std)
    fold_normalisation(proj, preprocess)
    assert torch.allclose(proj(pixels), expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_a_program_that_answers_otherwise_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("before")

    def abacus(answer: float) -> Callable[[Path], tuple[str, Callable[[Tensor], Tensor]]]:
        return lambda _: ("abacus", lambda images: torch.full((len(images), 7), answer))

    for answer, says in ((0.3, "abacus does not answer as torch does"), (torch.nan, "not finite")):
        monkeypatch.setitem(PROGRAMS, "pt2", PROGRAMS["pt2"]._replace(load=abacus(answer)))
        with pytest.raises(ValueError, match=says):
            export_program(tiny(depth=1), path, "pt2", batch=1)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("before")

    def fill_the_disk(_: Any, half: Path, **__: Any) -> None:
        half.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        export_program(tiny(depth=1), path, "pt2", batch=1)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_program_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt2").symlink_to(tmp_path / "real" / "model.pt2")
    export_program(tiny(depth=1), tmp_path / "link.pt2", "pt2", batch=1)
    assert (tmp_path / "link.pt2").is_symlink()
    assert (tmp_path / "real" / "model.pt2").stat().st_size > 0


def reshape(opset: int, path: Path) -> Path:
    """A program that takes any batch, and can answer for one of two images only."""
    ends = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("images", "logits"))
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [6])
    node = onnx.helper.make_node("Reshape", ["images", "shape"], ["logits"])
    graph = onnx.helper.make_graph([node], "graph", [next(ends)], [next(ends)], [shape])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def test_a_program_that_onnxruntime_does_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    says = rf"^onnxruntime {onnxruntime.__version__} cannot run this program, and nothing was written: .*"
    with pytest.raises(ValueError, match=says + "Opset 99 is under development"):
        onnx_programs.load_onnx(reshape(99, tmp_path / "new.onnx"))
    loaded = onnx_programs.load_onnx(reshape(18, tmp_path / "wrong.onnx"))
    assert loaded is not None
    _, run = loaded
    assert run(torch.ones(2, 3)).shape == (6,)
    with pytest.raises(ValueError, match=says + "cannot be reshaped"):
        run(torch.ones(3, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("release", "refused"), [("2.6.0+cpu", True), ("2.12.1", True), ("2.13.0a0+git", False)])
def test_torch_is_too_old(release: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", release)
    says = f"programs need torch 2.13 or later, and this is {release}: " if refused else "model is a Linear"
    with pytest.raises(ValueError, match=re.escape(says)):
        export_program(nn.Linear(1, 1), tmp_path / "model.pt2", "pt2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"out": "model.pt2"}, "must end in .onnx"),
        ({"out": "missing/model.onnx"}, "there is no directory"),
        ({"format": "tflite"}, "there are onnx, openvino, pt2, aoti"),
        ({"dtype": "bfloat16"}, "float32, float16 or int8"),
        ({"format": "pt2", "out": "m.pt2", "dtype": "int8"}, "float32, float16 or bfloat16"),
        ({"batch": 0}, "batch is 0"),
        ({"format": "openvino"}, "must end in .xml"),
        ({"format": "openvino", "out": "m.xml", "opset": 18}, "opset is ONNX's"),
        ({"format": "openvino", "out": "m.xml", "dtype": "int8"}, "int8 for openvino takes images to calibrate with"),
        ({"calibrate": torch.zeros(3, 3, 32, 32)}, "are for int8, and dtype is 'float32'"),
        ({"dtype": "int8", "calibrate": torch.zeros(0, 3, 32, 32)}, r"\(0, 3, 32, 32\), and must be"),
        ({"dtype": "int8", "calibrate": torch.zeros(3, 1, 32, 32)}, r"must be floating point, \(N, 3, 32, 32\)"),
        ({"dtype": "int8", "calibrate": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, r"torch\.uint8 tensor"),
        ({"dtype": "int8", "calibrate": torch.full((1, 3, 32, 32), torch.nan)}, "values that are not finite"),
        ({"opset": 17}, "from 18 to"),
        ({"opset": 99}, "from 18 to"),
        ({"format": "pt2", "out": "m.pt2", "opset": 18}, "opset is ONNX's"),
        ({"r": -1}, "cannot be negative"),
        ({"model": nn.Linear(1, 1)}, "model is a Linear"),
        ({"model": tiny(4, depth=2, matching="random")}, "draws anew"),
        ({"model": tiny(4, depth=2), "r": [0, "4 random"]}, "name no random matching in r"),
        ({"r": "diffrate-2.9g"}, "is no preset of this model"),
        ({"r": "9x"}, "cannot be reached"),
        ({"model": "vit_b61"}, "did you mean vit_b16"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    given = {"model": tiny(depth=1), "out": "model.onnx"} | arguments
    with pytest.raises((ValueError, OSError), match=says):
        export_program(given.pop("model"), tmp_path / given.pop("out"), **given)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_no_longer_what_they_say(tmp_path: Path) -> None:
    broken = tiny(depth=1)
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"^the model answers with values that are not finite.* nothing was written$"):
        export_program(broken, tmp_path / "model.pt2", "pt2", batch=1)
    other = tiny(depth=1)
    other.head = torch.nn.Linear(other.config.embed_dim, 3)
    with pytest.raises(ValueError, match=r"config says: head.bias is \(3,\) and should be \(7,\)"):
        export_program(other, tmp_path / "model.pt2", "pt2", batch=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_packages(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_programs, "find_spec", lambda name: None if name == missing else True)
    path = tmp_path / "model.onnx"
    if missing != "onnxruntime":
        with pytest.raises(ValueError, match=rf"needs {missing}: pip install 'tomevit\[export\]'"):
            export_program(tiny(depth=1), path)
        return
    model = tiny(0.3, depth=1, pool="avg", matching="every_kth")
    with pytest.raises(ValueError, match=r"quantising needs onnxruntime: pip install 'tomevit\[export\]'"):
        export_program(model, path, dtype="int8", batch=1)
    assert list(tmp_path.iterdir()) == []
    assert export_program(model, path, batch=1).parity is None
    images = images_for(model, 1)
    with torch.inference_mode():
        assert_alike(path, images, model(images), 1e-5)
    assert operators(path).keys() <= set(EVERYWHERE.split())


def test_without_a_compiler(tmp_path: Path) -> None:
    # Not monkeypatch: what it undoes on torch's configuration is deleted, for every later test of the process.
    no_compiler = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(ValueError, match="no compiler was found"):
        export_program(tiny(depth=1), tmp_path / "model.pt2", "aoti")


def test_weights_and_programs_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use tomevit\.export_program"):
        tomevit.export(tiny(depth=1), tmp_path / "model.onnx", "onnx")


# ----------------------------------------------------------------------------------------------------- the command line


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
    vit: tuple[VisionTransformer, Path], opened: tuple[Path, str], tmp_path: Path
) -> None:
    (model, _), (path, out) = vit, opened
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines[:4] == [
        ["written", str(path)],
        ["r", "6: 53 of 65 tokens remain after the last block"],
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


def test_json(vit: tuple[VisionTransformer, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    status, out, err = run_cli(str(vit[1]), "--format", "pt2", "-o", str(path), "--batch", "2", "--r", "0", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["written"] == [str(path)]
    assert report["metadata"]["output"] == "logits: float32 (2, 3)"
    assert report["parity"]["same_top1"] == report["parity"]["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--format onxn -o m.onnx", "there is no format 'onxn'; did you mean onnx or openvino?"),
        ("--format onnx -o m.pt2", "m.pt2 must end in .onnx"),
        ("--format onnx -o m.onnx --r eight", "8,-1"),
        ("--format onnx -o m.onnx --r [1,2,3]", "the model has 2"),
        ("--format onnx -o m.onnx --dtype int4", "int8"),
        ("--format timm -o m.pth --r 8", "--r is for programs (onnx, openvino, pt2, aoti), and timm is of weights"),
        ("--format timm -o m.pth --raw", "--raw is for programs"),
        ("--format aoti -o missing/m.pt2", "there is no directory missing"),
        ("--format onnx -o m.onnx --calibrate .", "images to calibrate with are for int8"),
        ("--format timm -o m.pth --calibrate .", "--calibrate is for programs"),
        ("--format openvino -o m.xml --dtype int8", "--calibrate FOLDER"),
        ("--format onnx -o m.onnx --dtype int8 --calibrate .", ".: no image in this folder"),
        ("--format onnx -o m.onnx --dtype int8 --calibrate photos", "photos: No such file or directory"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    vit: tuple[VisionTransformer, Path],
    arguments: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli(str(vit[1]), *arguments.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_folder_to_calibrate_with(
    vit: tuple[VisionTransformer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = tmp_path / "photos", tmp_path / "model.onnx"
    (folder / "more").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(5):
        pixels = noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    monkeypatch.setattr(export_command, "MOST_IMAGES", 4)
    seen = [export_command._sample(folder, tomevit.transform(vit[0])) for _ in range(2)]
    assert torch.equal(*seen)
    assert seen[0].shape == (4, 3, 32, 32)
    assert len({tuple(image.flatten()[:9].tolist()) for image in seen[0]}) == 4
    arguments = (str(vit[1]), "--format", "onnx", "--dtype", "int8", "-o", str(path), "--calibrate", str(folder))
    status, out, err = run_cli(*arguments, "--batch", "2", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["parity"]["source"] == "calibration"
    assert ("DequantizeLinear", "DequantizeLinear") in inputs_of_products(path)
    path.unlink()
    (folder / "0.png").write_bytes(b"no image")
    monkeypatch.setattr(export_command, "MOST_IMAGES", 256)
    status, out, err = run_cli(*arguments)
    assert (status, out) == (2, "")
    assert err == f"tomevit: {folder / '0.png'}: not an image of a known format\n"
    assert not path.exists()


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint.save(tiny(depth=1), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="is what would be read"):
        export_program(tmp_path / "model.pt2", tmp_path / "model.pt2", "pt2")


@pytest.mark.parametrize(("r", "stored"), [(8, 8), ((8, -1.0), {"mean": 8, "inflection": -1.0}), ([3, 0], [3, 0])])
def test_a_program_says_its_r_as_every_file_does(r: Any, stored: Any) -> None:
    model = tiny(r)
    model.card = replace(model.card, r=r)
    assert json.loads(describe_program(model, "float32", None, raw=False)["r"]) == stored
