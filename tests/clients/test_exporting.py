"""Programs that are made without `tomevit.export_program`, by the packages' own functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import works_with
from tomevit.models import VisionTransformer

MODELS: dict[str, dict[str, Any]] = {
    "token": {"pool": "token"},
    "avg": {"pool": "avg", "class_token": False},
    "clip": {"pre_norm": True, "act": "quick_gelu", "reg_tokens": 1},
    "norms": {"qk_norm": True, "layer_scale": 0.1, "pool": "avg", "pool_norm": "after"},
}


def model_of(kind: str, r: int) -> VisionTransformer:
    return tiny(r, img_size=(16, 16), depth=2, **MODELS[kind])


of_every_kind = pytest.mark.parametrize("kind", MODELS)
merged_or_not = pytest.mark.parametrize("r", [0, 4])


def check(model: VisionTransformer, run: Callable[[Tensor], Any], most: float = 1e-5) -> None:
    """On other images than those that a program was made with, the answer is the model's."""
    images = images_for(model, 2, seed=2)
    with torch.no_grad():
        assert relative_error(torch.as_tensor(np.asarray(run(images))), model(images)) < most


def run_onnx(path: Path, images: Tensor) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


@works_with("torch", "torch.jit.trace, and freeze")
@of_every_kind
@merged_or_not
def test_jit_trace(kind: str, r: int) -> None:
    model = model_of(kind, r)
    program = torch.jit.trace(model, images_for(model, 2))
    check(model, lambda images: program(images).detach())
    check(model, torch.jit.freeze(program))


@works_with("torch", "torch.export, and run_decompositions()")
@of_every_kind
@merged_or_not
def test_torch_export(kind: str, r: int) -> None:
    model = model_of(kind, r)
    program = torch.export.export(model, (images_for(model, 2),))
    check(model, program.module())
    check(model, program.run_decompositions().module())


@works_with("openvino", "openvino.convert_model(model, example_input=images)")
@of_every_kind
@merged_or_not
def test_openvino(kind: str, r: int) -> None:
    import openvino

    model = model_of(kind, r)
    program = openvino.convert_model(model, example_input=images_for(model, 2))
    compiled = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(model, lambda images: compiled(images.numpy())[0])


@works_with("openvino", "openvino.convert_model of a program of torch.export")
@merged_or_not
def test_openvino_of_exported(r: int) -> None:
    import openvino

    model = model_of("token", r)
    program = openvino.convert_model(torch.export.export(model, (images_for(model, 2),)))
    compiled = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(model, lambda images: compiled(images.numpy())[0])


@works_with("tensorboard", "SummaryWriter.add_graph")
@merged_or_not
def test_tensorboard(r: int, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    model = model_of("token", r)
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, images_for(model, 2))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 1000


@works_with("onnx", "torch.onnx.export(model, images, path, dynamo=False)")
@of_every_kind
@merged_or_not
def test_onnx_by_tracing(kind: str, r: int, tmp_path: Path) -> None:
    model, path = model_of(kind, r), tmp_path / "model.onnx"
    torch.onnx.export(model, (images_for(model, 2),), path, dynamo=False)
    check(model, lambda images: run_onnx(path, images))


@works_with("onnx", "torch.onnx.export(dynamo=True), of the model and of a program of torch.export")
@pytest.mark.parametrize("exported", [False, True])
@merged_or_not
def test_onnx_by_exporting(r: int, exported: bool, tmp_path: Path) -> None:
    model, path = model_of("norms", r), tmp_path / "model.onnx"
    images = images_for(model, 2)
    if exported:
        torch.onnx.export(torch.export.export(model, (images,)), (), dynamo=True, verbose=False).save(path)
    else:
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    check(model, lambda images: run_onnx(path, images))


@works_with("executorch", "to_edge_transform_and_lower with XNNPACK's partitioner, and run by its runtime")
@pytest.mark.parametrize(("kind", "r"), [("token", 0), ("token", 4), ("norms", 4)])
def test_executorch(kind: str, r: int) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model = model_of(kind, r)
    program = torch.export.export(model, (images_for(model, 2),))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    check(model, lambda images: method.execute([images])[0])


@works_with("coremltools", "convert, of a program of torch.export (the conversion alone: it runs on a Mac)")
@of_every_kind
@merged_or_not
def test_coremltools(kind: str, r: int) -> None:
    import coremltools

    model = model_of(kind, r)
    program = torch.export.export(model, (images_for(model, 2),)).run_decompositions({})
    converted = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17)
    assert tuple(converted.get_spec().description.input[0].type.multiArrayType.shape) == (2, 3, 16, 16)


@works_with("coremltools", "convert, of a program of torch.jit.trace")
@pytest.mark.xfail(
    reason="coremltools 9.0 reads shapes in a way that numpy 2.4 no longer has: any traced ViT fails, timm's too",
    raises=TypeError,
    strict=True,
)
def test_coremltools_of_traced() -> None:
    import coremltools

    model = model_of("token", 0)
    images = images_for(model, 2)
    coremltools.convert(
        torch.jit.trace(model, images),
        inputs=[coremltools.TensorType(shape=images.shape)],
        minimum_deployment_target=coremltools.target.iOS17,
    )
