"""What torch's default dtype and device are changes no answer: other libraries set them when they are imported."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten

import tomevit
from tests.helpers import images_for, tiny
from tomevit.tasks.demo import held_out
from tomevit.tasks.evaluate import evaluate
from tomevit.tasks.plots import draw_attention, draw_groups
from tomevit.tasks.visualize import observe

PIXELS, LABELS = held_out()
PHOTO = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MODEL = tiny(8, drop_path=0.5, dropout=0.1, attn_dropout=0.1, matching="random")
IMAGES = images_for(MODEL)


def create(_: Path) -> Any:
    models = [tomevit.create(name, img_size=32, drop_path=0.3) for name in ("deit_distilled_ti16", "mae_cls_b16")]
    models[0].reset_classifier(5)
    models.append(tomevit.create("digits_p1", pretrained=True, num_classes=3, img_size=12))
    return [([block.drop_path.probability for block in model.blocks], model.state_dict()) for model in models]


def transform(_: Path) -> Any:
    ours = tomevit.transform(MODEL)
    return ours(PHOTO), ours(Image.fromarray(PHOTO.permute(1, 2, 0).numpy()))


def forward(_: Path) -> Any:
    model = deepcopy(MODEL)
    learning = model.train()(IMAGES)
    tokens = model.eval().forward_features(IMAGES)
    return learning, model(IMAGES), tokens, tomevit.unmerge(tokens), model.forward_intermediates(IMAGES, (8, -1.0))


def pretrain(_: Path) -> Any:
    encoder = deepcopy(MODEL)
    autoencoder = tomevit.MaskedAutoencoder(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    return autoencoder(IMAGES), autoencoder.state_dict()


def files(path: Path) -> Any:
    tomevit.save(MODEL, path / "model.safetensors")
    checks = [check.found for check in tomevit.verify(path / "model.safetensors")]
    tomevit.export("digits_p1.plain", path / "model.pth", "timm")
    read = tomevit.create("digits_p1", pretrained=path / "model.pth")
    return checks, tomevit.load(path / "model.safetensors").state_dict(), read.state_dict()


def tasks(path: Path) -> Any:
    model = tomevit.create("digits_p1.plain", pretrained=True, r=8)
    answers = [answer._replace(seconds=None) for answer in tomevit.classify(model, list(PIXELS[:3]), top=2)]
    seen = observe(model, PIXELS[0], [8])
    run = seen.runs[0]
    assert run.attention is not None
    pictures = draw_groups(seen.image, run.groups[-1]), draw_attention(seen.image, run.groups[-1], run.attention[-1])
    paths = [str(path / f"{i}.png") for i in range(4)]
    for pixels, name in zip(PIXELS, paths, strict=False):
        Image.fromarray(pixels[0].numpy()).save(name)
    rows = evaluate(model, paths, LABELS[:4].tolist(), [0, 8], batch=2).rows
    return answers, seen.image, pictures, [(row.top1, row.top5, row.agreement) for row in rows]


@pytest.mark.parametrize("entry", [create, transform, forward, pretrain, files, tasks])
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_answers_do_not_depend_on_torchs_defaults(
    entry: Callable[[Path], Any], other: torch.dtype | str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    expected, shape = tree_flatten(entry(tmp_path))
    torch.manual_seed(0)
    try:
        if isinstance(other, torch.dtype):
            torch.set_default_dtype(other)
        else:
            torch.set_default_device(other)
        found, same_shape = tree_flatten(entry(tmp_path))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert same_shape == shape
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs
