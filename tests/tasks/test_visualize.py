"""What merging does to an image: as data, as pictures, and by the command. The page is tested in test_page.py."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tests.tasks.test_cli import run
from tomevit.cli.options import R
from tomevit.config import Preprocess
from tomevit.flops import flops_by_step
from tomevit.measure.defaults import default_r
from tomevit.models import build_meta
from tomevit.schedule import Schedule, format_schedule
from tomevit.tasks import plots
from tomevit.tasks.visualize import (
    Observation,
    attention_weights,
    film,
    group_sizes,
    observe,
    pictures,
    undo_normalisation,
)
from tomevit.transform import Transform

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without proportional attention": {"prop_attn": False},
    "norms and scales": {"qk_norm": True, "layer_scale": 0.1, "qkv_bias": False},
    "distilled": {"dist_token": True},
    "registers": {"reg_tokens": 4},
    "mean patch, as MAE": {"pool": "avg", "pool_norm": "after"},
    "not square": {"img_size": (16, 40)},
    "grey": {"in_chans": 1},
}
SCHEDULES: tuple[Schedule, ...] = (0, 8, (8, -1.0), [20, 0, 7], 0.08)

models = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())


def photograph(height: int = 60, width: int = 90, seed: int = 0) -> Image.Image:
    """Coarse noise, so that neighbouring patches differ, and some are similar."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def prepared(model: tomevit.VisionTransformer, image: Image.Image) -> Tensor:
    return tomevit.transform(model)(image)[None]


def model_of(fields: dict[str, Any], r: Schedule = 0) -> tomevit.VisionTransformer:
    model = tiny(r, **fields)
    if model.config.in_chans == 1:
        model.card = tomevit.create("digits_p1").card
    return model


# ---------------------------------------------------------------------------------------------------------------- data


@models
def test_groups_are_the_models_own(fields: dict[str, Any]) -> None:
    model, image = model_of(fields), photograph()
    found = observe(model, image, SCHEDULES)
    prefix = model.config.num_prefix
    assert [run.r for run in found.runs] == list(SCHEDULES)
    for run_ in found.runs:
        steps = model.forward_intermediates(prepared(model, image), run_.r)
        assert run_.tokens == model.token_counts(run_.r)
        assert torch.equal(run_.groups[0].flatten(), torch.arange(model.config.num_patches))
        for groups, step in zip(run_.groups[1:], steps, strict=True):
            assert groups.shape == model.config.grid
            assert step.slots is not None
            assert torch.equal(groups.flatten() + prefix, step.slots[0, prefix:])
            if step.size is not None:
                assert torch.equal(group_sizes(groups).flatten().float(), step.size[0, step.slots[0, prefix:], 0])
        # Tokens only ever join: two patches of one token stay together.
        for before, after in zip(run_.groups, run_.groups[1:], strict=False):
            pairs = torch.stack([before.flatten(), after.flatten()]).unique(dim=1)
            assert pairs.shape[1] == before.max() + 1


DROPPING: tuple[Schedule, ...] = (["8+5 diffrate", 4, "10+9 diffrate"], "1.3x diffrate", [0, "4+12 diffrate", 0, 8])


@models
@pytest.mark.parametrize("r", DROPPING)
def test_dropped_patches_are_in_no_group_and_have_no_attention(fields: dict[str, Any], r: Schedule) -> None:
    model, image = model_of(fields), photograph()
    (seen,) = observe(model, image, [r]).runs
    prefix, drops = model.config.num_prefix, [step.drop for step in model.steps(r)]
    steps = model.forward_intermediates(prepared(model, image), r)
    assert (seen.r, seen.plain, seen.tokens) == (r, model.plain(r), model.token_counts(r))
    assert seen.flops == flops_by_step(model.config, seen.plain)
    assert seen.dropped[0] == 0
    assert [now > before for before, now in pairwise(seen.dropped)] == [drop > 0 for drop in drops]
    for groups, step, dropped in zip(seen.groups[1:], steps, seen.dropped[1:], strict=True):
        assert step.slots is not None
        assert step.size is not None or not dropped
        flat, slots = groups.flatten(), step.slots[0, prefix:]
        assert torch.equal(flat < 0, slots < 0)
        assert torch.equal(flat[flat >= 0] + prefix, slots[slots >= 0])
        assert int((flat < 0).sum()) == dropped
        assert torch.equal(flat[flat >= 0].unique(), torch.arange(step.x.shape[1] - prefix))
        if step.size is not None:
            sizes = torch.where(slots < 0, 0.0, step.size[0, slots.clamp(min=0), 0])
            assert torch.equal(group_sizes(groups).flatten().float(), sizes)
            assert int(step.size[0, prefix:].sum()) + dropped == model.config.num_patches
    assert seen.attention is not None
    assert seen.prefix_attention is not None
    assert (seen.attention[seen.groups[:-1] < 0] == 0).all()
    assert (seen.attention[seen.groups[:-1] >= 0] > 0).all()
    total = seen.attention.sum((1, 2)) + seen.prefix_attention.sum(1)
    torch.testing.assert_close(total, torch.ones(model.config.depth))


@models
def test_answers_are_the_models_own(fields: dict[str, Any]) -> None:
    model, image = model_of(fields), photograph()
    for run_ in observe(model, image, SCHEDULES).runs:
        best = model(prepared(model, image), run_.r)[0].softmax(0).topk(3)
        assert [answer.number for answer in run_.answers] == best.indices.tolist()
        assert [answer.probability for answer in run_.answers] == pytest.approx(best.values.tolist(), rel=1e-4)
        names = model.card.class_names
        for answer in run_.answers:
            assert answer.name == (names[answer.number] if names else f"class {answer.number}")


@models
def test_attention_is_a_share_of_one_and_the_same_within_a_token(fields: dict[str, Any]) -> None:
    model = model_of(fields)
    for run_ in observe(model, photograph(), SCHEDULES).runs:
        assert run_.attention is not None
        assert run_.prefix_attention is not None
        assert run_.attention.shape == (model.config.depth, *model.config.grid)
        assert run_.prefix_attention.shape == (model.config.depth, model.config.num_prefix)
        total = run_.attention.sum((1, 2)) + run_.prefix_attention.sum(1)
        torch.testing.assert_close(total, torch.ones(model.config.depth))
        for share, groups in zip(run_.attention, run_.groups, strict=False):  # the groups that enter
            for token in range(int(groups.max()) + 1):
                assert len(share[groups == token].unique()) == 1


@models
def test_attention_is_what_the_block_computes(fields: dict[str, Any]) -> None:
    """The weights, times the values, through the projection, are what fused attention gives, merged tokens and all."""
    model = model_of(fields)
    tokens = model.forward_intermediates(images_for(model), [20, 0, 7])
    for block, entering in zip(model.blocks[1:], tokens, strict=False):
        assert entering.size is not None
        x = block.norm1(entering.x)
        ours = attention_weights(block, entering, num_queries=5)
        values = block.attn.qkv(x)[..., 2 * x.shape[2] :].unflatten(2, (-1, block.attn.head_dim)).transpose(1, 2)
        attended = block.attn.proj((ours @ values).transpose(1, 2).flatten(2))
        fused = block.attn(x, entering.size if block.prop_attn else None).x
        assert relative_error(attended, fused[:, :5]) < 1e-5
        torch.testing.assert_close(ours[:, :, :1], attention_weights(block, entering))
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]))


def test_attention_is_what_the_block_computes_where_weights_are_no_counts() -> None:
    model = tiny(prop_attn=False)
    tokens = model.forward_intermediates(images_for(model), ["8+5 diffrate", 4, "10+9 diffrate"])
    for block, entering in zip(model.blocks[1:], tokens, strict=False):
        assert entering.weight is not None
        assert not torch.equal(entering.weight, entering.size)
        x = block.norm1(entering.x)
        values = block.attn.qkv(x)[..., 2 * x.shape[2] :].unflatten(2, (-1, block.attn.head_dim)).transpose(1, 2)
        ours = attention_weights(block, entering, num_queries=5)
        attended = block.attn.proj((ours @ values).transpose(1, 2).flatten(2))
        assert relative_error(attended, block.attn(x, entering.weight).x[:, :5]) < 1e-5


def test_attention_is_shown_as_density() -> None:
    """A block whose queries are zero attends to every patch alike, with sizes counted: merging does not show."""
    model = tiny(8)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:24] = 0
            block.attn.qkv.bias[:24] = 0
    run_ = observe(model, photograph(), [8]).runs[0]
    assert run_.tokens[-1] == 65 - 4 * 8
    torch.testing.assert_close(run_.attention, torch.full((4, 8, 8), 1 / 65))
    torch.testing.assert_close(run_.prefix_attention, torch.full((4, 1), 1 / 65))


def test_half_precision_and_optimized_models_show_the_same() -> None:
    model, image = tiny(), photograph()
    expected = observe(model, image, [0]).runs[0]
    assert expected.attention is not None
    half = observe(tiny().bfloat16(), image, [0]).runs[0]
    assert half.attention is not None
    assert half.attention.dtype == torch.float32
    torch.testing.assert_close(half.attention, expected.attention, rtol=0.1, atol=1e-3)
    merged = observe(model, image, [8]).runs[0]
    fast = observe(tomevit.optimize(model, keep_memory=False), image, [8]).runs[0]
    assert torch.equal(fast.groups, merged.groups)
    torch.testing.assert_close(fast.attention, merged.attention, rtol=1e-4, atol=1e-6)


def test_costs_add_up() -> None:
    model = tiny()
    for run_ in observe(model, photograph(), SCHEDULES).runs:
        assert len(run_.flops) == model.config.depth + 1
        assert sum(run_.flops) == tomevit.flops(model.config, run_.r)
    for computed in (False, True):
        assert sum(flops_by_step(model.config, 8, computed=computed)) == tomevit.flops(
            model.config, 8, computed=computed
        )


@pytest.mark.parametrize(("preprocess", "channels"), [(Preprocess(), 3), (Preprocess(mean=(0.3,), std=(0.07,)), 1)])
def test_the_pixels_shown_are_those_that_the_model_saw(preprocess: Preprocess, channels: int) -> None:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(channels, -1, -1)
    prepare = Transform(preprocess, (16, 16))
    whole = Transform(Preprocess(**{**vars(preprocess), "crop_pct": 1.0}), (16, 16))
    assert torch.equal(undo_normalisation(whole(every_value), whole), every_value)
    image = photograph() if channels == 3 else photograph().convert("L")
    shown = undo_normalisation(prepare(image), prepare)
    assert torch.equal(prepare.__class__(preprocess, (16, 16))(image), prepare(image))
    # The crop of the resized image, by Pillow alone.
    edge = int(16 / preprocess.crop_pct)
    resized = image.resize((int(edge * 90 / 60), edge), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 16) / 2), round((edge - 16) / 2)
    cropped = np.asarray(resized.crop((left, top, left + 16, top + 16))).reshape(16, 16, channels)
    assert torch.equal(shown, torch.tensor(cropped).permute(2, 0, 1))


def test_the_model_stays_as_it_was() -> None:
    model = tiny(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [vars(module).copy() for module in model.modules()]
    called = []
    observe(model, photograph(), SCHEDULES, progress=lambda: called.append(1))
    assert len(called) == len(SCHEDULES)
    assert model.r == 5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [vars(module) for module in model.modules()] == attributes


def test_models_without_a_class_token_or_a_head_have_none_to_show() -> None:
    run_ = observe(tiny(class_token=False, pool="avg"), photograph(), [8]).runs[0]
    assert run_.attention is None
    assert run_.prefix_attention is None
    assert run_.answers != ()
    assert observe(tiny(num_classes=0), photograph(), [8]).runs[0].answers == ()
    assert len(observe(tiny(num_classes=2), photograph(), [8]).runs[0].answers) == 2


@pytest.mark.parametrize(
    ("model", "image", "r_values", "says"),
    [
        (tiny().train(), photograph(), [8], r"call model\.eval"),
        (tiny(in_chans=4), photograph(), [8], "takes 4"),
        (tiny(), photograph(), [], "one r at least"),
        (tiny(), photograph(), [8, -1], "negative"),
        (tiny(), photograph(), [[1, 1, 1, 1, 1]], "the model has 4"),
        (tiny(), photograph(), [8, "9x"], "cannot be reached"),
        (tiny(), photograph(), [8, [4, "grid"]], "cannot merge neighbours 2x2"),
        (tiny(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [8], r"one image, \(C, H, W\)"),
        (tiny(), torch.zeros(3, 64, 64), [8], "uint8"),
        (tiny(), "dog.jpg", [8], "PIL image"),
        (model_of({"in_chans": 1}), torch.zeros(3, 64, 64, dtype=torch.uint8), [8], "3 channels"),
    ],
)
def test_what_cannot_be_shown_is_named(model: Any, image: Any, r_values: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        observe(model, image, r_values)


@pytest.mark.parametrize("r", SCHEDULES)
def test_r_is_written_as_it_is_read(r: Schedule) -> None:
    assert R().convert(format_schedule(r), None, None) == r


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def observation() -> Observation:
    return observe(tiny(img_size=(16, 40)), photograph(), [0, 8, [9, 3], 4])


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.mark.parametrize("show", pictures.SHOW)
def test_pictures_have_a_row_for_each_r(tmp_path: Path, observation: Observation, show: pictures.Show) -> None:
    pictures.draw(tmp_path / "a.png", ".png", observation, "$5$ of a_name^2", show=show)
    width, height = size_of(tmp_path / "a.png")
    single = Observation(
        card=observation.card, config=observation.config, image=observation.image, runs=observation.runs[1:2]
    )
    pictures.draw(tmp_path / "b.png", ".png", single, "$5$ of a_name^2", show=show)
    one = size_of(tmp_path / "b.png")
    assert (width > 1.5 * one[0]) == (show == "picture")
    assert (height > 1.5 * one[1]) == (show != "picture")


def test_dropped_patches_are_dark_and_hatched() -> None:
    image = torch.full((3, 8, 12), 200, dtype=torch.uint8)
    groups = torch.tensor([[0, 0, -1], [1, -1, -1]])
    picture = plots.draw_groups(image, groups, scale=24, width=2)
    patches = (
        picture.unflatten(2, (3, 24)).unflatten(1, (2, 24)).permute(1, 3, 0, 2, 4).flatten(3)
    )  # rows, columns, 3, P
    dropped, kept = patches[groups < 0], patches[groups >= 0]
    for patch in dropped:
        levels = (patch[0] * 255).round().unique().tolist()
        assert levels == [60, 136 + 1], "a patch of one colour: dark, with lines"
        assert 0.1 < (patch[0] > 0.4).float().mean() < 0.4
    assert all(((patch * 255).round() == 200).any() for patch in kept)
    plain = plots.draw_groups(image, torch.tensor([[0, 0, 2], [1, 3, 4]]), scale=24, width=2)
    there = groups.repeat_interleave(24, 0).repeat_interleave(24, 1) >= 0
    assert torch.equal(picture[:, there], plain[:, there]), "what is kept looks the same"

    share = torch.where(groups < 0, 0.0, 0.25)
    attention = plots.draw_attention(image, groups, share, scale=24)
    assert attention[:, ~there].max() < attention[:, there].min() + 0.3
    assert len(attention[0][~there].unique()) == 2


def test_pictures_say_what_was_dropped(tmp_path: Path, observation: Observation) -> None:
    model = tiny(img_size=(16, 40))
    seen = observe(model, photograph(), [0, ["3+4 diffrate", 0, "2+6 diffrate"]])
    for show in pictures.SHOW:
        pictures.draw(tmp_path / "a.svg", ".svg", seen, "title", show=show)
        text = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert "atched patches are dropped" in text
        assert (f"{seen.runs[1].tokens[4]} tokens, {seen.runs[1].dropped[4]} dropped" in text) == (show != "attention")
        pictures.draw(tmp_path / "b.svg", ".svg", observation, "title", show=show)
        assert "dropped" not in (tmp_path / "b.svg").read_text(encoding="utf-8")


def test_a_strip_shows_the_blocks_asked_for(tmp_path: Path, observation: Observation) -> None:
    assert pictures.blocks_to_show(tiny(depth=12).config, "strip") == [3, 6, 9, 12]
    assert pictures.blocks_to_show(tiny(depth=2).config, "strip") == [1, 2]
    pictures.draw(tmp_path / "a.svg", ".svg", observation, "title", blocks=[3])
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<!-- after block 3 -->" in text
    assert "<!-- after block 2 -->" not in text
    assert f"<!-- {observation.runs[1].tokens[3]} tokens -->" in text
    for block in (0, 5):
        with pytest.raises(ValueError, match="1 to 4"):
            pictures.draw(tmp_path / "b.png", ".png", observation, "title", blocks=[block])
    assert not (tmp_path / "b.png").exists()


def test_attention_glows_where_it_is() -> None:
    image = torch.full((3, 16, 16), 90, dtype=torch.uint8)
    share = torch.zeros(4, 4)
    share[1, 2] = 0.5
    share[3, 0] = 0.1
    drawn = plots.draw_attention(image, torch.arange(16).view(4, 4), share, scale=12, width=1)
    assert drawn.shape == (3, 48, 48)
    inner = drawn.unfold(1, 12, 12).unfold(2, 12, 12)[..., 2:-2, 2:-2].mean((0, 3, 4))  # (4, 4)
    assert inner.flatten().topk(2).indices.tolist() == [6, 12]
    assert drawn.min() >= 0
    assert drawn.max() <= 1


@pytest.mark.parametrize("columns", range(2, 40))
def test_neighbours_have_hues_far_apart(columns: int) -> None:
    """Tokens of two patches side by side, on grids of any width."""
    groups = torch.arange(2 * columns).view(2, columns).repeat_interleave(2, 0).repeat_interleave(2, 1)
    image = torch.zeros(3, 4, 2 * columns, dtype=torch.uint8)
    edges = plots.draw_groups(image, groups, scale=3, width=1)[:, 0::6, 0::6]  # (3, 2, columns)
    assert (edges[:, 1] - edges[:, 0]).norm(dim=0).min() > 0.4
    assert (edges[:, :, 1:] - edges[:, :, :-1]).norm(dim=0).min() > 0.4


def test_tokens_of_one_patch_are_as_they_were_and_merged_ones_translucent() -> None:
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([[0, 0, 1, 2], [0, 0, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    drawn = plots.draw_groups(image, groups, scale=4, width=1)
    photo = image / 255
    alone = groups.repeat_interleave(4, 0).repeat_interleave(4, 1) > 0
    torch.testing.assert_close(drawn[:, alone], photo[:, alone])
    inside, below = drawn[:, 1:7, 1:7], photo[:, 1:7, 1:7]
    mean = photo[:, :8, :8].mean((1, 2), keepdim=True)
    torch.testing.assert_close(inside, below + plots.OPACITY * (mean - below))
    assert len(drawn[:, 0, :8].unique(dim=1).T) == 1, "a line of one colour around it"


def test_even_attention_leaves_the_image_to_be_seen() -> None:
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    even = plots.draw_attention(image, torch.arange(16).view(4, 4), torch.full((4, 4), 0.06), scale=4)
    contrast, whole = (picture - picture.mean((1, 2), keepdim=True) for picture in (even, image / 255))
    torch.testing.assert_close(contrast, (1 - plots.LIT) * whole)


def test_counts_of_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    """Whoever reads a picture finds the counts of token_counts, and that the class token is among them."""
    model = tiny(reg_tokens=2)
    seen = observe(model, photograph(), [0, 8])
    for show in ("picture", "strip"):
        pictures.draw(tmp_path / "a.svg", ".svg", seen, "title", show=show)
        text = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert f"<!-- {model.config.num_tokens} tokens" in text
        assert f"{model.token_counts(8)[-1]} tokens" in text
        assert "counted with the class and register tokens, which never merge." in text
        assert text.count("<!-- image -->") == 1
        assert "<!-- r = 0" not in text, "the image stands for it"


@pytest.mark.parametrize("show", ["strip", "attention"])
def test_an_animation_goes_through_the_blocks(tmp_path: Path, observation: Observation, show: pictures.Show) -> None:
    path = tmp_path / "a"
    pictures.animation(path, ".gif", observation, "$5$ of a_name^2", show=show)
    with Image.open(path) as film_:
        frames, durations = [], []
        for frame in range(film_.n_frames):
            film_.seek(frame)
            durations.append(film_.info["duration"])
            frames.append(np.asarray(film_.convert("RGB")))
        assert film_.info["loop"] == 0, "for ever"
    assert len(frames) == (5 if show == "strip" else 4)
    assert durations[-1] == 1000 * pictures.LAST > max(durations[:-1])
    changed = np.stack([(frame != frames[0]).any(-1) for frame in frames]).any(0)
    assert changed.any()
    assert not changed[:, : changed.shape[1] // 5].any(), "the image beside it stays, and does not flicker"


def test_an_mp4_lasts_as_long(tmp_path: Path, observation: Observation) -> None:
    av = pytest.importorskip("av", reason="MP4 is written by PyAV: pip install 'tomevit[video]'")
    pictures.animation(tmp_path / "a", ".mp4", observation, "title")
    with av.open(str(tmp_path / "a")) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        seconds = 4 * pictures.FRAME + pictures.LAST
        assert float(container.duration / av.time_base) == pytest.approx(seconds, abs=0.1)


def test_lines_over_a_photograph_keep_their_colours_in_a_small_gif(tmp_path: Path, monkeypatch) -> None:
    photo = Image.fromarray(load_sample_images().images[0])
    seen = observe(tiny(img_size=(224, 224), patch_size=16, depth=12), photo, [2])
    drawn: list[np.ndarray] = []
    write = film.write

    def write_and_keep(path: Path, suffix: str, frames: list[np.ndarray], seconds: list[float]) -> None:
        drawn.extend(frames)
        write(path, suffix, frames, seconds)

    monkeypatch.setattr(film, "write", write_and_keep)
    pictures.animation(tmp_path / "a.gif", ".gif", seen, "china.jpg")
    assert (tmp_path / "a.gif").stat().st_size < 1_500_000
    with Image.open(tmp_path / "a.gif") as written:
        written.seek(12)
        apart = np.abs(np.asarray(written.convert("RGB"), float) - drawn[12]).max(-1)
    lines = drawn[12].max(-1).astype(int) - drawn[12].min(-1) > 150  # nothing else is so bright a colour
    assert (apart[lines] > 64).mean() < 0.02


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo of $5.png"
    photograph(24, 20).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", []),
        ("a.png", ["--show", "attention", "--block", "1", "3"]),
        ("a.PNG", ["--show", "picture"]),
        ("a.pdf", ["--show", "strip", "--r", "8"]),
        ("a.html", ["--r", "0", "8,-1", "[20,0,7]", "0.08"]),
        ("a.gif", []),
        ("a.GIF", ["--show", "attention", "--r", "8", "16"]),
    ],
)
def test_the_command_writes_one_file(capsys, photo: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    out = tmp_path / "out" / name
    out.parent.mkdir()
    status, printed, err = run(
        capsys, "visualize", str(photo), "--model", "digits_p1.tome_r16", *options, "-o", str(out)
    )
    assert (status, printed) == (0, "")
    assert err == f"written to {out}\n"
    assert [file.name for file in out.parent.iterdir()] == [name]
    magic = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF", ".html": b"<!doctype html>", ".gif": b"GIF89a"}
    assert out.read_bytes().startswith(magic[out.suffix.lower()])


def test_photographs_stand_upright(capsys, tmp_path: Path) -> None:
    upright = photograph(24, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    pages = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.html"
        status, *_ = run(
            capsys, "visualize", str(tmp_path / f"{name}.png"), "--model", "digits_p1.plain", "-o", str(out)
        )
        assert status == 0
        pages.append(out.read_text(encoding="utf-8").replace("b.png", "a.png"))
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{photo}"], "--out"),
        (["{tmp}/no.jpg", "-o", "{tmp}/a.png"], "No such file"),
        (["{tmp}", "-o", "{tmp}/a.png"], "directory"),
        (["{text}", "-o", "{tmp}/a.png"], "not an image"),
        (["{photo}", "-o", "/nowhere/a.png"], "no directory /nowhere"),
        (["{photo}", "-o", "{tmp}"], "directory"),
        (["{photo}", "-o", "{tmp}/a.xyz"], ".html"),
        (["{photo}", "-o", "{tmp}/a"], "no suffix"),
        (["{photo}", "-o", "{tmp}/a.html", "--show", "strip"], "--show is for pictures"),
        (["{photo}", "-o", "{tmp}/a.html", "--block", "3"], "--block is for pictures"),
        (["{photo}", "-o", "{tmp}/a.png", "--show", "picture", "--block", "3"], "--block is for strips"),
        (["{photo}", "-o", "{tmp}/a.gif", "--block", "3"], "a.gif is an animation over all blocks"),
        (["{photo}", "-o", "{tmp}/a.png", "--block", "5"], "1 to 4"),
        (["{photo}", "-o", "{tmp}/a.png", "--show", "film"], "attention"),
        (["{photo}", "-o", "{tmp}/a.png", "--r", "-1"], "negative"),
        (["{photo}", "-o", "{tmp}/a.png", "--r", "[1,1,1,1,1]"], "the model has 4"),
        (["{photo}", "-o", "{tmp}/a.png", "--device", "abacus"], "abacus"),
        (["{photo}", "-o", "{tmp}/a.png", "--img-size", "big"], "224x320"),
        (["{photo}", "-o", "{tmp}/a.png", "--model", "vit_b61"], "did you mean vit_b16"),
    ],
)
def test_a_mistake_gets_one_clear_line(capsys, photo: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    before = sorted(tmp_path.iterdir())
    arguments = [argument.format(photo=photo, tmp=tmp_path, text=text) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", "digits_p1.plain"]
    status, out, err = run(capsys, "visualize", *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_pictures_say_what_to_install(capsys, monkeypatch, photo: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    rest = (str(photo), "--model", "digits_p1.plain", "-o")
    status, _, err = run(capsys, "visualize", *rest, str(tmp_path / "a.png"))
    assert status == 2
    assert "pip install 'tomevit[plot]'" in err
    assert run(capsys, "visualize", *rest, str(tmp_path / "a.html"))[0] == 0


def test_without_an_encoder_films_say_what_to_install(capsys, monkeypatch, photo: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(film, "find_spec", lambda _: None)
    status, _, err = run(capsys, "visualize", str(photo), "--model", "digits_p1.plain", "-o", str(tmp_path / "a.mp4"))
    assert (status, len(err.splitlines())) == (2, 1)
    assert "pip install 'tomevit[video]'; a .gif needs nothing more" in err


def test_a_plot_of_info_shows_the_r_that_fit(capsys, tmp_path: Path) -> None:
    out = tmp_path / "tokens.svg"
    status, printed, _ = run(capsys, "info", "vit_b16", "--plot", str(out))
    assert status == 0
    drawn = out.read_text(encoding="utf-8")
    for r in (0, *default_r(tomevit.card("vit_b16"))):
        assert f"<!-- r = {format_schedule(r)}: " in drawn
        assert f"\nr = {format_schedule(r)} " in printed
    status, printed, _ = run(capsys, "info", "vit_b16")
    assert "\nr = 8 " not in printed


def test_info_compares_schedules(capsys, tmp_path: Path) -> None:
    out = tmp_path / "tokens.svg"
    r_values = {"8": 8, "8,-1": (8, -1.0), "0.08": 0.08}
    arguments = ("info", "vit_b16", "--r", *r_values, "--plot", str(out))
    status, printed, err = run(capsys, *arguments)
    assert (status, err) == (0, f"written to {out}\n")
    drawn = out.read_text(encoding="utf-8")
    model = build_meta(tomevit.card("vit_b16").config)
    for text, r in r_values.items():
        assert f"tokens {' '.join(map(str, model.token_counts(r)))}" in printed
        assert f"<!-- r = {text}: {tomevit.flops(model.config, r) / 1e9:.4g} GFLOPs -->" in drawn
    status, printed, _ = run(capsys, *arguments, "--json")
    found = json.loads(printed)
    assert [tuple(at["tokens"]) for at in found["schedules"]] == list(map(model.token_counts, r_values.values()))
    assert found["tokens"] == found["schedules"][0]["tokens"]


def test_a_plot_of_info_is_refused_before_anything_is_printed(capsys, tmp_path: Path) -> None:
    status, printed, err = run(capsys, "info", "vit_b16", "--plot", str(tmp_path / "a.xyz"))
    assert (status, printed) == (2, "")
    assert ".png, .svg or .pdf" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(capsys, monkeypatch, photo: Path, tmp_path: Path) -> None:
    def interrupted(*_: Any, progress: Any) -> None:
        progress()
        raise KeyboardInterrupt

    monkeypatch.setattr("tomevit.tasks.visualize.observe", interrupted)
    status, out, err = run(
        capsys, "visualize", str(photo), "--model", "digits_p1.plain", "-o", str(tmp_path / "a.html")
    )
    assert (status, out, err.strip()) == (130, "", "tomevit: interrupted")
    assert list(tmp_path.iterdir()) == [photo]
