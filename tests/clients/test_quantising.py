"""Quantisation by other packages: of the model itself, and of programs made of it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests.clients.test_exporting import merged_or_not, model_of, run_onnx
from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import works_with
from tomevit.models import VisionTransformer


def check(model: VisionTransformer, quantised: Tensor) -> None:
    """Something was rounded, and nothing else happened: the logits of a small model with noise for weights are near."""
    with torch.no_grad():
        exact = model(images_for(model, 2))
    assert 1e-6 < (torch.as_tensor(quantised) - exact).norm() / exact.norm() < 0.15


def linears(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def torchao_configs() -> dict[str, Any]:
    from torchao import quantization

    return {
        "weights": quantization.Int8WeightOnlyConfig(),
        "dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    }


@works_with("torchao", "quantize_: int8 weights, and int8 activations too; run, and exported")
@pytest.mark.parametrize("kind", ["weights", "dynamic"])
@merged_or_not
def test_torchao(kind: str, r: int) -> None:
    from torchao.quantization import quantize_

    model = tiny(r)
    quantised, images = deepcopy(model), images_for(model, 2)
    quantize_(quantised, torchao_configs()[kind])
    assert all(type(layer.weight) is not nn.Parameter for layer in linears(quantised))
    with torch.no_grad():
        found = quantised(images)
        check(model, found)
        assert relative_error(quantised.forward_head(quantised.forward_features(images)), found) < 1e-4
        assert relative_error(torch.export.export(quantised, (images,)).module()(images), found) < 0.02


@works_with("torchao", "save and optimize of a quantised model: one says what a file can hold, one leaves the layers")
def test_torchao_within_tomevit(tmp_path: Path) -> None:
    from torchao.quantization import quantize_

    model = tiny(8, layer_scale=0.5)
    quantised, images = deepcopy(model), images_for(model, 2)
    quantize_(quantised, torchao_configs()["weights"])
    with pytest.raises(ValueError, match="quantis"):
        tomevit.save(quantised, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    optimized = tomevit.optimize(quantised, keep_memory=False)
    assert [type(layer.weight) for layer in linears(optimized)] == [type(layer.weight) for layer in linears(quantised)]
    with torch.no_grad():
        assert relative_error(optimized(images), quantised(images)) < 1e-4


@works_with("torchao", "quantisation-aware training, prepared and converted")
@merged_or_not
def test_torchao_trains(r: int) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_
    from torchao.quantization.qat import QATConfig

    model = tiny(r, embed_dim=32, num_heads=4)
    trained, images = deepcopy(model).train(), images_for(model, 2)
    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(trained, QATConfig(base, step="prepare"))
    trained(images).square().mean().backward()
    assert [name for name, parameter in trained.named_parameters() if parameter.grad is None] == []
    quantize_(trained, QATConfig(base, step="convert"))
    check(model, trained.eval()(images))


@works_with("torch", "torch.ao.quantization.quantize_dynamic: every linear layer")
@merged_or_not
def test_quantize_dynamic(r: int) -> None:
    from torch.ao.quantization import quantize_dynamic

    model = tiny(r)
    quantised = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dynamic = [
        module for module in quantised.modules() if type(module).__module__.endswith("quantized.dynamic.modules.linear")
    ]
    assert len(dynamic) == len(linears(model)) == 4 * model.config.depth + 1
    with torch.no_grad():
        check(model, quantised(images_for(model, 2)))


def quantised_program(model: VisionTransformer, quantizer: Any) -> Tensor:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    images = images_for(model, 2)
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    with torch.no_grad():
        prepared(images)
        return convert_pt2e(prepared)(images)


@works_with("torchao", "pt2e with X86InductorQuantizer")
@pytest.mark.parametrize("kind", ["token", "norms"])
@merged_or_not
def test_pt2e_x86(kind: str, r: int) -> None:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    model = model_of(kind, r)
    check(model, quantised_program(model, quantizer))


@works_with("executorch", "pt2e with XNNPACKQuantizer")
@pytest.mark.parametrize(("kind", "r"), [("token", 0), ("token", 4), ("norms", 4)])
def test_pt2e_xnnpack(kind: str, r: int) -> None:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    model = model_of(kind, r)
    check(model, quantised_program(model, quantizer))


@works_with(
    "onnxruntime", "quant_pre_process and quantize_static, of torch.onnx.export's and of export_program's files"
)
@pytest.mark.parametrize(("by", "kind"), [("torch", "norms"), ("tomevit", "token")])
@merged_or_not
def test_quantize_static(r: int, by: str, kind: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

    model = model_of(kind, r)
    images, path = images_for(model, 2), tmp_path / "model.onnx"

    class Calibration(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": images.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    if by == "torch":
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False, input_names=["images"])
    else:
        tomevit.export_program(model, path, raw=False)
    quant_pre_process(path, tmp_path / "prepared.onnx")
    quantize_static(
        tmp_path / "prepared.onnx", tmp_path / "int8.onnx", Calibration(), op_types_to_quantize=["MatMul", "Gemm"]
    )
    check(model, run_onnx(tmp_path / "int8.onnx", images))


@works_with("nncf", "quantize, of OpenVINO's model: post-training quantisation")
@merged_or_not
def test_nncf_openvino(r: int) -> None:
    import nncf
    import openvino

    model = model_of("token", r)
    images = images_for(model, 2)
    program = openvino.convert_model(model, example_input=images)
    quantised = nncf.quantize(program, nncf.Dataset([images.numpy()]), model_type=nncf.ModelType.TRANSFORMER)
    check(model, openvino.compile_model(quantised, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())[0])


@works_with("nncf", "quantize, of a program of torch.export, with model_type=TRANSFORMER")
@merged_or_not
def test_nncf_torch(r: int) -> None:
    import nncf

    model = model_of("token", r)
    images = images_for(model, 2)
    program = torch.export.export(model, (images,)).module()
    quantised = nncf.quantize(program, nncf.Dataset([images]), model_type=nncf.ModelType.TRANSFORMER)
    with torch.no_grad():
        check(model, quantised(images))


@works_with("nncf", "compress_weights, of the model itself")
@merged_or_not
def test_nncf_weights(r: int) -> None:
    import nncf

    model = model_of("token", r)
    images = images_for(model, 2)
    compressed = nncf.compress_weights(deepcopy(model), dataset=nncf.Dataset([images]))
    with torch.no_grad():
        check(model, compressed(images))


@works_with("optimum-quanto", "quantize, calibrate and freeze: int8 weights and activations")
@merged_or_not
def test_quanto(r: int) -> None:
    from optimum import quanto

    model = tiny(r)
    quantised, images = deepcopy(model), images_for(model, 2)
    quanto.quantize(quantised, weights=quanto.qint8, activations=quanto.qint8)
    with torch.no_grad(), quanto.Calibration():
        quantised(images)
    quanto.freeze(quantised)
    with torch.no_grad():
        check(model, quantised(images))


@works_with("hqq", "HQQLinear in the place of every linear layer of the blocks")
@merged_or_not
def test_hqq(r: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = tiny(r, embed_dim=32, num_heads=4)
    quantised, images = deepcopy(model), images_for(model, 2)
    for block in quantised.blocks:
        for parent in (block.attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(
                        parent,
                        name,
                        HQQLinear(
                            layer,
                            BaseQuantizeConfig(nbits=8, group_size=32),
                            compute_dtype=torch.float32,
                            device="cpu",
                        ),
                    )
    with torch.no_grad():
        check(model, quantised(images))
