"""Programs that were exported from a model on a device: compiled for it, or run there by onnxruntime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import relative_error, tiny
from tomevit.deploy.programs import LEAST_TORCH, export_program
from tomevit.models import VisionTransformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.__version__ < LEAST_TORCH, reason="needs torch 2.13"),
]


def model_on(device: torch.device) -> VisionTransformer:
    return tiny(8, depth=2).to(device)


def pixels_for(model: VisionTransformer, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, *model.config.img_size), generator=draw, dtype=torch.uint8)


def normalised(model: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    """As the model's own transform does it, whose size the pixels have."""
    preprocess = model.card.preprocess
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_programs_of_torch(device: torch.device, format: str, raw: bool, tmp_path: Path) -> None:  # noqa: A002
    model = model_on(device)
    path = tmp_path / "model.pt2"
    done = export_program(model, path, format, raw=raw)
    assert done.parity is not None
    assert done.parity.difference < 1e-3 * done.parity.largest
    if format == "aoti":
        run = torch._inductor.aoti_load_package(str(path))
    else:
        run = torch.export.load(path).module().to(device)
    for count in (1, 2, 5):
        pixels = pixels_for(model, count)
        images = normalised(model, pixels).to(device)
        found = run(pixels.to(device) if raw else images)
        assert found.device.type == device.type
        with torch.inference_mode():
            assert relative_error(found, model(images)) < 1e-3


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
def test_onnx_on_the_device(device: torch.device, raw: bool, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {provider}")
    model = model_on(device)
    export_program(model, tmp_path / "model.onnx", "onnx", raw=raw)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=[provider])
    assert session.get_providers()[0] == provider
    for count in (1, 2, 5):
        pixels = pixels_for(model, count)
        images = normalised(model, pixels)
        (found,) = session.run(None, {"images": (pixels if raw else images).numpy()})
        with torch.inference_mode():
            assert relative_error(torch.from_numpy(found), model(images.to(device)).cpu()) < 1e-3
