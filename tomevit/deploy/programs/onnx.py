"""Programs as ONNX files, of operators that onnxruntime, OpenVINO and TensorRT (10 and later) all have."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tomevit.deploy.programs.trace import Settings, quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NEEDED = ("onnx", "onnxscript")
LEAST_OPSET = 18  # what torch's exporter writes without converting, which may fail

FATAL = 4  # of onnxruntime's severities: it would print its errors besides raising them

#: Weights beyond this, in bytes, go to a file of their own: protobuf ends at 2 GiB.
ONE_FILE = 2**31 - 2**27


def check_packages(opset: int | None, dtype: str) -> None:
    """Raises ValueError if a package is missing, or does not know the opset."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"writing ONNX needs {' and '.join(missing)}: pip install 'tomevit[export]'")
    if dtype == "int8" and find_spec("onnxruntime") is None:
        raise ValueError("quantising needs onnxruntime: pip install 'tomevit[export]'")
    from onnx.defs import onnx_opset_version

    if opset is not None and not LEAST_OPSET <= opset <= onnx_opset_version():
        raise ValueError(f"opset is {opset}, and must be from {LEAST_OPSET} to {onnx_opset_version()}")


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str], settings: Settings) -> None:
    """Write one ONNX file, with OUT.data beside it if it would be too large, and check it."""
    import onnx

    if settings.dtype == "int8":
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / "whole.onnx"
            save_converted(program, whole, metadata, settings.opset)
            _quantise(whole, path, settings.calibration, large=is_large(program))
    else:
        save_converted(program, path, metadata, settings.opset)
    onnx.checker.check_model(path, full_check=True)


def save_converted(program: ExportedProgram, path: Path, metadata: dict[str, str], opset: int | None) -> None:
    """A program of torch's as an ONNX file, with its weights beside it in OUT.data if they do not fit."""
    output = metadata["output"].partition(":")[0]
    with quiet():
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[output],
            opset_version=opset,
            custom_translation_table=_translations(),
        )
    assert converted is not None
    model = converted.model
    if opset is not None and model.opset_imports[""] != opset:
        raise ValueError(f"opset is {opset}, and torch could convert this model to {model.opset_imports['']} only")
    _name_batch(model)
    model.producer_name, model.producer_version = "tomevit", metadata["tomevit"]
    model.metadata_props.update(metadata)
    converted.save(path, external_data=is_large(program))


def is_large(program: ExportedProgram) -> bool:
    """Whether its weights do not fit one file of protobuf's."""
    return sum(tensor.nbytes for tensor in program.state_dict.values()) > ONE_FILE


def load_onnx(path: Path) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """What runs the file here: onnxruntime on the CPU, if it is installed. Both raise ValueError if it cannot."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    name = f"onnxruntime {version_of(onnxruntime)}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = FATAL
    with _in_one_sentence(name):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        with _in_one_sentence(name):
            (output,) = session.run(None, {"images": images.cpu().numpy()})
        return torch.from_numpy(output)

    return name, run


@contextmanager
def _in_one_sentence(runtime: str) -> Iterator[None]:
    """Turns what onnxruntime raises, classes of its own without a base, into a ValueError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime."):
            raise
        # "[ONNXRuntimeError] : 1 : FAIL : why"
        raise cannot_run(runtime, str(error).rpartition(" : ")[2]) from error


def cannot_run(runtime: str, why: str) -> ValueError:
    """What is raised of a program that a runtime refuses; `why` with spaces and line breaks as they come."""
    return ValueError(f"{runtime} cannot run this program, and nothing was written: {' '.join(why.split())}")


def version_of(module: Any) -> str:
    return str(getattr(module, "__version__", None) or version(module.__name__))


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that torch's exporter lacks, or writes in a way that runtimes find hard to read."""
    import onnxscript

    op: Any = onnxscript.opset18  # its types are those of tensors, and these functions are traced

    def topk(self: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:  # noqa: A002
        return op.TopK(self, op.Constant(value_ints=[k]), axis=dim, largest=int(largest), sorted=int(sorted))

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        # The exporter's own derives the shape of the transposed keys as it runs, which hides attention from the passes
        # by which runtimes fuse it.
        assert not dropout_p
        assert not is_causal
        assert not enable_gqa
        factor = op.CastLike(op.Constant(value_float=scale or query.shape[-1] ** -0.5), query)
        scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    aten = torch.ops.aten
    return {
        aten.topk.default: topk,  # with a constant, as TensorRT wants it
        aten.scaled_dot_product_attention.default: attention,
    }


def _name_batch(model: Any) -> None:
    """Call the open dimension `batch`, which torch calls by a number of its own."""
    import onnx_ir

    size = model.graph.inputs[0].shape[0]
    if isinstance(size, int):
        return
    symbol = re.compile(rf"\b{re.escape(str(size.value))}\b")
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                dim if isinstance(dim, int) or dim.value is None else symbol.sub("batch", str(dim.value))
                for dim in value.shape
            )


def _quantise(source: Path, out: Path, calibration: Sequence[Tensor], *, large: bool) -> None:
    """Weights of linear layers to 8 bits, by channel.

    What they multiply is quantised as it comes, each time by its own range; or, with images to calibrate with, by the
    range that it had for those. Attention and matching, where two values are multiplied, stay float32, and so do sums,
    norms and the outputs of linear layers: of what is rounded there, nothing is multiplied in 8 bits.
    """
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic, quantize_static

    prepared = source.with_name(f"{source.name}.prepared")
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True, save_as_external_data=large)
    _leave_shapes_to_weights(prepared)
    how: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "reduce_range": True,  # 7 bits: with 8, processors without VNNI would saturate sums
        "weight_type": QuantType.QInt8,
        "use_external_data_format": large,
    }
    if calibration:
        how["nodes_to_quantize"] = _linear_layers(prepared)
        _keep_biases_apart(prepared, set(how["nodes_to_quantize"]))
        options = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
        reader = _reader_of(calibration)
        quantize_static(prepared, out, reader, activation_type=QuantType.QUInt8, extra_options=options, **how)
    else:
        quantize_dynamic(prepared, out, **how)


def _leave_shapes_to_weights(path: Path) -> None:
    """Say no shape a second time of what has one: biases get another here, and onnxruntime up to 1.28 turns weights."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)
    onnx.save(model, path)


def _keep_biases_apart(path: Path, products: set[str]) -> None:
    """Give the biases after products of three dimensions as many, in the file.

    Where shapes are fixed, onnxruntime makes one operator of a product and a bias of one dimension, before it looks for
    products in 8 bits: that operator would multiply in float32, and take longer than a model that was not quantised.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    outputs = {node.output[0] for node in graph.node if node.name in products and ranks.get(node.output[0]) == 3}
    readers = [node for node in graph.node if node.op_type == "Add" and outputs.intersection(node.input)]
    biases = {name for node in readers for name in node.input}
    for tensor in graph.initializer:
        if tensor.name in biases and len(tensor.dims) == 1:
            tensor.dims[:] = [1, 1, *tensor.dims]
    onnx.save(model, path)


def _linear_layers(path: Path) -> list[str]:
    """The products with weights: not those of attention and of matching."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def _reader_of(batches: Sequence[Tensor]) -> Any:
    """Batches of images as onnxruntime asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()
