"""Evaluating, classifying and embedding on a device: what the CPU says, but for rounding."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tomevit
from tests.helpers import tiny
from tomevit.models import VisionTransformer
from tomevit.tasks.classify import classify
from tomevit.tasks.embed import embed
from tomevit.tasks.embedding_files import read
from tomevit.tasks.evaluate import evaluate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_spec("PIL") is None, reason="needs Pillow")]
COUNT = 21  # in batches of 8 the last one is smaller


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    from PIL import Image

    found = []
    for i in range(COUNT):
        draw = torch.Generator().manual_seed(i)
        coarse = torch.randint(0, 256, (6, 7, 3), generator=draw, dtype=torch.uint8)
        path = tmp_path / f"{i:02}.png"
        Image.fromarray(coarse.numpy()).resize((70, 60), Image.Resampling.BICUBIC).save(path)
        found.append(str(path))
    return found


def two(device: torch.device) -> tuple[VisionTransformer, VisionTransformer]:
    """The same model on the CPU and on the device."""
    return tiny(), tiny().to(device)


@pytest.mark.parametrize("workers", [0, 2])
def test_vectors(device: torch.device, files: list[str], workers: int, tmp_path: Path) -> None:
    found = []
    for i, model in enumerate(two(device)):
        report = embed(model, files, tmp_path / f"{i}.safetensors", r=8, batch=8, workers=workers)
        assert report.rows == COUNT
        found.append(read(tmp_path / f"{i}.safetensors"))
    assert list(found[0].keys) == list(found[1].keys)
    ours, theirs = (torch.as_tensor(each.vectors) for each in reversed(found))
    # At a near tie another token may merge, in an image or two.
    apart = (ours - theirs).abs().amax(1) / theirs.abs().max()
    assert apart.median() < 1e-4
    assert (apart > 1e-3).sum() <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation(device: torch.device, files: list[str], workers: int) -> None:
    labels = [i % 7 for i in range(COUNT)]
    cpu, gpu = (evaluate(model, files, labels, [0, 8], batch=8, workers=workers) for model in two(device))
    assert (cpu.evaluated, gpu.evaluated) == (COUNT, COUNT)
    for ours, theirs in zip(gpu.rows, cpu.rows, strict=True):
        assert ours.r == theirs.r
        assert abs(ours.top1.value - theirs.top1.value) <= (0.1 if theirs.r == 0 else 5.0)  # one image is 4.8 %


def test_answers(device: torch.device, files: list[str]) -> None:
    cpu, gpu = (list(classify(model, files, r=0, top=3, batch=8)) for model in two(device))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.image == theirs.image
        assert [g.class_index for g in ours.top] == [g.class_index for g in theirs.top]
        for a, b in zip(ours.top, theirs.top, strict=True):
            assert abs(a.probability - b.probability) < 1e-4


def test_the_shipped_model_reads_digits(device: torch.device) -> None:
    from tomevit.tasks.demo import accuracy, held_out

    images, labels = held_out()
    cpu, there = (tomevit.create("digits_p1", pretrained=True).to(each) for each in ("cpu", device))
    for r in (0, 16):
        found = accuracy(there, images, labels, r)
        assert found > 90
        assert abs(found - accuracy(cpu, images, labels, r)) < 1


def test_images_on_the_cpu_are_told_apart(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.randn(1, 3, 32, 32))
