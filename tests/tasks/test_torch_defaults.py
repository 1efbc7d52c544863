"""What torch's default dtype and device are changes no answer: other libraries set them when they are imported."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten, tree_leaves

import tomevit
from benchmarks.peers import timm
from tests.helpers import images_for, tiny
from tests.matchings import OWN
from tomevit.measure.bench import bench
from tomevit.tasks.demo import held_out
from tomevit.tasks.embed import embed as embed_images
from tomevit.tasks.embedding_files import read
from tomevit.tasks.evaluate import evaluate
from tomevit.tasks.plots import draw_attention, draw_groups
from tomevit.tasks.visualize import observe

PIXELS, LABELS = held_out()
PHOTO = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MODEL = tiny(8, drop_path=0.5, dropout=0.1, attn_dropout=0.1, matching="random")
IMAGES = images_for(MODEL)
COLOUR = tomevit.create("vit_ti16", img_size=32)
SCALED = tiny(8, layer_scale=0.1)


def own_matching(key: torch.Tensor, r: int, num_prefix: int) -> tomevit.Merge:
    return tomevit.layers.bipartite_soft_matching(key, r, num_prefix)


MATCHING = [tiny(8, matching=matching) for matching in (*OWN, own_matching)]
MATCHING.append(tiny(["grid", "3+2 diffrate", 2]))
FOREIGN = timm.models.VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def create(_: Path) -> Any:
    models = [tomevit.create(name, img_size=32, drop_path=0.3) for name in ("deit_distilled_ti16", "mae_cls_b16")]
    models[0].reset_classifier(5)
    models.append(tomevit.create("digits_p1", pretrained=True, num_classes=3, img_size=12))
    return [([block.drop_path.probability for block in model.blocks], model.state_dict()) for model in models]


def as_picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def transform(_: Path) -> Any:
    ours = tomevit.transform(MODEL)
    return ours(PHOTO), ours(as_picture(PHOTO))


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


def resize(_: Path) -> Any:
    """Pictures that are resized in each of the ways there are: to a size beyond the crop, by little, by much, not."""
    ours = tomevit.transform(COLOUR)
    line = PHOTO[:, :1].repeat(1, 1, 60)
    return [ours(each) for image in (PHOTO, line, line.mT) for each in (image, as_picture(image))]


def optimize(_: Path) -> Any:
    fast = tomevit.optimize(SCALED, packed=False)
    return fast(IMAGES), fast.state_dict(), fast.optimizations


def embed(path: Path) -> Any:
    model = tomevit.create("digits_p1.plain", pretrained=True, r=8)
    path = path / f"{len(list(path.iterdir()))}"
    path.mkdir()
    for i, pixels in enumerate(PIXELS[:5]):
        Image.fromarray(pixels[0].numpy()).save(path / f"{i}.png")
    (path / "5.png").write_bytes(b"no image")
    embed_images(model, [path], path / "out.safetensors", batch=2)
    return read(path / "out.safetensors").vectors


def matchings(_: Path) -> Any:
    return [model(IMAGES) for model in MATCHING]


def measure(_: Path) -> Any:
    rows = bench(SCALED, [8], batch=2, rounds=1)
    return [(row.tokens, row.gflops, row.gflops_computed, row.flop_ratio) for row in rows]


def learn(_: Path) -> Any:
    model = deepcopy(SCALED).train()
    model(IMAGES).square().mean().backward()
    groups = [{**group, "params": len(group["params"])} for group in tomevit.param_groups(model, 0.1, 0.1, 0.75)]
    return [parameter.grad for parameter in model.parameters()], groups


def from_module(_: Path) -> Any:
    return tomevit.from_module(FOREIGN, r=8).state_dict()


@pytest.mark.parametrize(
    "entry",
    [
        create,
        transform,
        resize,
        forward,
        pretrain,
        files,
        tasks,
        optimize,
        embed,
        matchings,
        measure,
        learn,
        from_module,
    ],
)
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


@pytest.mark.parametrize("entry", [transform, resize, tasks, optimize, embed, measure])
def test_torchs_default_generator_is_left_alone(entry: Callable[[Path], Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    entry(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("r", [0, 8, [8, 0, 3], (8, -1.0), 0.3])
@pytest.mark.parametrize(
    "fields", [{}, {"pool": "map", "pool_heads": 2}, {"dist_token": True}, {"pool": "avg", "act": "quick_gelu"}]
)
def test_models_run_on_the_meta_device(r: Any, fields: dict[str, Any]) -> None:
    model = tiny(r, **fields)
    images, expected = images_for(model), model(images_for(model))
    traced = model.forward_features(images)
    model.to("meta")
    images = images.to("meta")
    assert model(images).shape == expected.shape
    features = model.forward_features(images)
    assert [part.shape for part in features if part is not None] == [part.shape for part in traced if part is not None]
    assert len(model.forward_intermediates(images)) == model.config.depth
    assert tomevit.unmerge(features).device.type == "meta"
    sum(answer.sum() for answer in tree_leaves(model.train()(images))).backward()


@pytest.mark.parametrize("matching", tomevit.layers.MATCHINGS)
def test_every_matching_runs_on_the_meta_device(matching: str) -> None:
    model = (tiny(["grid", 8]) if matching == "grid" else tiny(8, matching=matching)).to("meta")
    assert model(images_for(MODEL).to("meta")).device.type == "meta"


def test_a_masked_autoencoder_is_where_its_encoder_is() -> None:
    images = images_for(MODEL)
    for device, dtype in (("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float32)):
        autoencoder = tomevit.MaskedAutoencoder(
            deepcopy(SCALED).to(device, dtype), decoder_dim=16, decoder_depth=1, decoder_heads=2
        )
        assert {(p.device.type, p.dtype) for p in autoencoder.parameters()} == {(device, dtype)}
        assert autoencoder(images.to(device, dtype)).pred.dtype == dtype
