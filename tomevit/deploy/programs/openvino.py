"""Programs as OpenVINO's own files: a graph, .xml, and its weights beside it, .bin."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tomevit.deploy.programs.onnx import NEEDED, cannot_run, save_converted
from tomevit.deploy.programs.trace import Settings

if TYPE_CHECKING:
    from torch.export import ExportedProgram

METADATA = "tomevit"  # the section of the file's rt_info

#: No SmoothQuant, which NNCF uses for transformers: with it an image's answer depends on the batch (NNCF 3.4 with
#: OpenVINO 2026.4), and the error is 25 % for a small model, in place of 1 %, and 5.5 % for a ViT-S, in place of 2.2 %.
NO_SMOOTHING = -1


def check_packages(opset: int | None, dtype: str) -> None:  # noqa: ARG001
    """Raises ValueError if a package is missing."""
    # OpenVINO reads an ONNX file: its converter of torch's programs would report its use over the network.
    needed = ("openvino", *NEEDED, *(["nncf"] if dtype == "int8" else []))
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        packages = " and ".join(missing)
        raise ValueError(f"writing {dtype} for OpenVINO needs {packages}: pip install 'tomevit[openvino]'")


def write_openvino(program: ExportedProgram, path: Path, metadata: dict[str, str], settings: Settings) -> None:
    """Write the graph and, beside it, the weights: float32, or rounded to what `dtype` says, or int8 by NNCF."""
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "whole.onnx"
        save_converted(program, whole, metadata, settings.opset)
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # or the file could not be removed everywhere
        model = core.read_model(whole)
    if settings.dtype == "int8":
        model = _quantise(model, settings.calibration)
    elif settings.dtype == "bfloat16":
        _round_weights(model)
    for name, value in metadata.items():
        model.set_rt_info(value, [METADATA, name])
    openvino.save_model(model, path, compress_to_fp16=settings.dtype == "float16")


def load_openvino(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What runs the file here: OpenVINO on the CPU. Both raise ValueError if it cannot.

    It computes in float32, but in bfloat16 if the weights are that and the processor has instructions for it.
    """
    import openvino

    name = f"OpenVINO {openvino.__version__.partition('-')[0]}"
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    with _in_one_sentence(name):
        model = core.read_model(path)
        half = model.get_rt_info([METADATA, "dtype"]).astype(str) == "bfloat16" and has_bfloat16()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        }
        compiled = core.compile_model(model, "CPU", settings)

    def run(images: Tensor) -> Tensor:
        with _in_one_sentence(name):
            return torch.from_numpy(compiled({"images": images.cpu().numpy()})[0].copy())

    return name, run


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor: elsewhere it takes the hint, and uses float32."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def _in_one_sentence(runtime: str) -> Iterator[None]:
    """Turns what OpenVINO raises into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        raise cannot_run(runtime, str(error)) from error


def _round_weights(model: Any) -> None:
    """Weights, what has two dimensions or more, to bfloat16: each stored so, and converted where it is used."""
    import openvino
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        if len(node.get_output_shape(0)) < 2:
            continue
        rounded = torch.from_numpy(node.data.copy()).to(torch.bfloat16)
        stored = openvino.Tensor(openvino.Type.bf16, node.get_output_shape(0))
        stored.data.view("uint16")[...] = rounded.view(torch.uint16).numpy()
        readers = list(node.output(0).get_target_inputs())
        converted = opset13.convert(openvino.op.Constant(stored), "f32")
        for reader in readers:
            reader.replace_source_output(converted.output(0))


def _quantise(model: Any, calibration: Sequence[Tensor]) -> Any:
    """Weights of linear layers and what they multiply to 8 bits, by its range over the images to calibrate with.

    Not in the patch embedding, in attention and in matching, as in ONNX files.
    """
    nncf = _import_nncf()
    left_out = nncf.IgnoredScope(names=_products_without_weights(model), types=["Convolution"], validate=False)
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):  # its bars of progress would be among what a command prints
            return nncf.quantize(
                model,
                nncf.Dataset([batch.numpy() for batch in calibration]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(calibration),
                ignored_scope=left_out,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                        matmul=NO_SMOOTHING, convolution=NO_SMOOTHING
                    )
                ),
            )
    finally:
        logger.setLevel(level)


def _products_without_weights(model: Any) -> list[str]:
    return [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() == "MatMul"
        and all(value.get_node().get_type_name() != "Constant" for value in node.input_values())
    ]


def _import_nncf() -> Any:
    """NNCF, imported here for the first time, must not report its use over the network: by the variable it reads."""
    if "nncf" not in sys.modules and "NNCF_CI" not in os.environ:
        os.environ["NNCF_CI"] = "1"
        try:
            import nncf
        finally:
            del os.environ["NNCF_CI"]
    import nncf

    return nncf
