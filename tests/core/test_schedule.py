"""r in words: read and written, resolved to plain numbers for a model, and kept so wherever r goes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tomevit
from benchmarks.peers import timm
from tests.helpers import images_for, tiny
from tomevit.cards import Card
from tomevit.config import Config, Preset
from tomevit.flops import flops, plain_schedule
from tomevit.layers import MATCHINGS
from tomevit.schedule import (
    Schedule,
    Step,
    check_schedule,
    distinct_schedules,
    format_schedule,
    parse_schedule,
    resolve_steps,
    schedule_from_json,
    schedule_to_json,
    token_counts,
)
from tomevit.words import MATCHING_NAMES, SHAPES, format_words, parse_words, shaped

PLAIN_MATCHINGS = [name for name in MATCHING_NAMES if name != "grid"]
inflections = st.floats(-1, 1) | st.sampled_from([-1, -0.5, 0, 0.1, 1 / 3, 1])
counts = st.integers(0, 300) | st.integers(0, 2**63 - 1)
entries = (
    st.integers(0, 200)
    | st.builds("{} {}".format, st.integers(0, 200), st.sampled_from(PLAIN_MATCHINGS))
    | st.builds("{}+{} diffrate".format, st.integers(0, 200), st.integers(0, 200))
    | st.just("grid")
)


@st.composite
def worded(draw: st.DrawFn) -> str:
    """Words of every kind that is one."""
    matching = draw(st.just("") | st.sampled_from(PLAIN_MATCHINGS).map(" {}".format))
    budget = draw(
        st.floats(1, 1e6).map("{!r}x".format)
        | st.sampled_from(["2x", "1.5x", "1x", "60%", "99.9%", "100%"])
        | st.integers(1, 100).map("{}%".format)
    )
    amount = draw(st.just(budget) | counts.map(str))
    kind = draw(st.sampled_from(["flat", "share", "line", "late", "deferred", "grid", "preset"]))
    if kind == "share":
        return f"{draw(st.floats(0, 0.5, exclude_min=True))!r}{matching}"
    if kind == "line":
        return f"{amount},{draw(inflections)!r}{matching}"
    if kind == "late":
        number = draw(st.just("") | st.floats(0, 100, exclude_min=True).map(":{!r}".format))
        return f"{amount} late{number}{matching}"
    if kind == "deferred":
        return f"{amount} deferred{draw(st.just('') | st.integers(0, 10**9).map(':{}'.format))}{matching}"
    if kind == "grid":
        return f"{budget} grid"
    if kind == "preset":
        return f"{draw(st.sampled_from(PLAIN_MATCHINGS))}-{draw(st.sampled_from(['2.9', '11', '0.5']))}g"
    return f"{amount}{matching}"


schedules = (
    counts
    | st.tuples(counts, inflections)
    | st.lists(entries, max_size=12)
    | st.floats(0, 0.5, exclude_min=True)
    | worded()
)


@st.composite
def configs(draw: st.DrawFn, max_depth: int = 24) -> Config:
    class_token = draw(st.booleans())
    pool = draw(st.sampled_from(["token", "avg"])) if class_token else "avg"
    return Config(
        img_size=(16 * draw(st.integers(1, 16)), 16 * draw(st.integers(1, 16))),
        depth=draw(st.integers(1, max_depth)),
        embed_dim=draw(st.sampled_from([64, 192, 768])),
        num_heads=4,
        mlp=draw(st.sampled_from(["mlp", "swiglu"])),
        mlp_ratio=draw(st.sampled_from([8 / 3, 4.0])),
        class_token=class_token,
        dist_token=class_token and pool == "token" and draw(st.booleans()),
        reg_tokens=draw(st.integers(0, 4)),
        pool=pool,
    )


def answer(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or of its ValueError the message."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def suggested(message: str) -> str:
    """What can be had, as the message of what cannot says it."""
    return message.partition("as they are computed: '")[2].partition("'")[0]


def saved(config: Config, r: Schedule) -> Fraction:
    """How many times fewer FLOPs, as they are computed."""
    return Fraction(flops(config, computed=True), flops(config, r, computed=True))


def reaches(config: Config, r: Schedule, ratio: float) -> bool:
    return saved(config, r) >= ratio * (1 - 1e-12)  # but for the rounding of 100 / 60 and the like


# ----------------------------------------------------------------------------------------------------- read and written


def test_the_names_are_those_of_the_matchings() -> None:
    assert tuple(MATCHINGS) == MATCHING_NAMES


@given(text=worded())
def test_words_are_written_as_they_are_read(text: str) -> None:
    words = parse_words(text)
    assert parse_words(format_words(words)) == words
    assert parse_words(f"  {text.upper()} ") == words._replace(amount=parse_words(text.upper()).amount)


@given(r=schedules)
def test_every_r_comes_back_from_text_and_from_json(r: Schedule) -> None:
    checked = check_schedule(r, 12)
    assert check_schedule(checked, 12) == checked
    for again in (
        check_schedule(parse_schedule(format_schedule(checked)), 12),
        schedule_from_json(json.loads(json.dumps(schedule_to_json(checked))), 12),
    ):
        assert again == checked
        assert type(again) is type(checked)


def test_words_that_say_no_more_than_a_number_are_numbers() -> None:
    assert check_schedule("8", 4) == 8
    assert check_schedule(" 8, -1 ", 4) == (8, -1.0)
    assert check_schedule(("8", -1), 4) == (8, -1.0)
    assert check_schedule("0.25", 4) == 0.25
    assert check_schedule("[20, 0, 7]", 4) == [20, 0, 7]
    assert check_schedule('[3, "GRID", "08+3  Diffrate", "0 pitome"]', 4) == [3, "grid", "8+3 diffrate", 0]
    assert check_schedule(("2X", Fraction(-1, 4)), 4) == "2x,-0.25"
    assert check_schedule("2\N{MULTIPLICATION SIGN}  LATE:2.0", 4) == "2x late:2"


WRONG_WORDS = ["", " ", "x", "%", "x2", "-2x", "0x", "0.9x", "infx", "nanx", "1e999x", "1e-320%", "0%", "101%", "-5%"]
WRONG_WORDS += ["2x,2", "2x,", "2x,1,1", "2x,nan", "8,-1.01", "0.3,0.5", "0.7", "8.0", "-1", "1e400", "9" * 25, "1_0"]
WRONG_WORDS += ["2x late late", "2x pitome late", "2x pitome pitome", "late", "pitome", "2x 3x", "2x late:0", "8 late:"]
WRONG_WORDS += ["2x late:101", "2x late:x", "2x late:1e999", "8 deferred:1e999", "8 deferred:-1", "8 deferred:1.5"]
WRONG_WORDS += [
    "0.3 late",
    "2x,0.5 late",
    "8,1 deferred",
    "grid",
    "8 grid",
    "2x late grid",
    "2x,1 grid",
    "2x grid late",
]
WRONG_WORDS += [
    "diffrate-g",
    "diffrate-2.9",
    "no-2.9g",
    "diffrate-2.9g late",
    "\N{ARABIC-INDIC DIGIT TWO}x",
    "²",
    "2\0x",
]
WRONG_WORDS += [
    "[",
    "[1",
    "[1,]",
    "[1]]",
    "[1.0]",
    "[NaN]",
    "[true]",
    "[null]",
    '["8"]',
    '["2x"]',
    '["8 grid"]',
    "[{}]",
]
WRONG_WORDS += ['["8+3 pitome"]', '["grid 8"]', '["8 pitome late"]', '["-1 pitome"]', f'["{"9" * 25} pitome"]', '[""]']
WRONG_WORDS += [f"[{'9' * 25}]", f"[{'9' * 5000}]", "[1] late", "[" + "0," * 12 + "0]"]
WRONG_LONG = [
    "[" * 10**6,
    "9" * 10**6 + "x",
    "2x " + "late " * 10**5,
    "a" * 10**6,
    "0," * 10**6,
    "8 late:" + "1" * 10**6,
]
WRONG_LONG += [
    f'["{"9" * 10**6} pitome"]',
    f"[{'9' * 10**6}]",
    "diffrate-" + "1" * 10**6 + "g",
    "[" + "0," * 10**6 + "0]",
]


@pytest.mark.parametrize("text", [*WRONG_WORDS, *WRONG_LONG], ids=lambda text: repr(text[:30]))
def test_wrong_words_are_value_errors_of_one_sentence(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"\br\b|inflection|^r\[\d+\] is") as error:
        check_schedule(text, 12)
    assert time.process_time() - start < 2
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(text, depth=12)


alphabet = st.sampled_from([*"0123456789.,:+-%xXeg[]\"' \t\n", *MATCHING_NAMES, *SHAPES, "2x", "60%", " "])


@settings(max_examples=500)
@given(text=st.text(max_size=30) | st.lists(alphabet, max_size=12).map("".join))
def test_any_text_is_an_r_or_a_value_error(text: str) -> None:
    r, message = answer(lambda: check_schedule(text, 12))
    if r is None:
        assert message.count("\n") == 0 < len(message) < 500
        return
    assert check_schedule(r, 12) == r
    assert check_schedule(parse_schedule(format_schedule(r)), 12) == r
    plain, message = answer(lambda: plain_schedule(r, Config()))
    if plain is None:
        assert suggested(message) or any(part in message for part in ("preset", "leaves", "whole grid"))
    else:
        assert plain_schedule(plain, Config()) == plain


def test_distinct_schedules_are_each_there_once() -> None:
    assert distinct_schedules([8, "2x", 8, (8, 0.0), "2x", [8]]) == [8, "2x", (8, 0.0), [8]]


# -------------------------------------------------------------------------------------------------------------- budgets


RATIOS = ["1x", "1.01x", "1.2x", "1.5x", "2x", "3x", "10x", "1000x", "100%", "90%", "60%", "50%", "7%"]


def resolved(config: Config, r: Any) -> tuple[Any, float]:
    """An r in plain numbers, and the ratio that was asked for; or, if it cannot be had, what can."""
    asked = parse_words(check_schedule(r, config.depth))
    plain, message = answer(lambda: plain_schedule(r, config))
    if plain is not None:
        return plain, asked.ratio
    words = parse_words(suggested(message))
    assert 1 <= words.ratio < asked.ratio
    assert words._replace(amount="", ratio=0) == asked._replace(amount="", ratio=0)
    return plain_schedule(suggested(message), config), words.ratio


@given(config=configs(), budget=st.sampled_from(RATIOS) | st.floats(1, 4).map("{!r}x".format))
def test_a_budget_is_the_least_constant_r_that_reaches_it(config: Config, budget: str) -> None:
    r, ratio = resolved(config, budget)
    assert type(r) is int
    assert reaches(config, r, ratio)
    assert r == 0 or saved(config, r - 1) < ratio
    assert plain_schedule(r, config) == r


@given(config=configs(), budget=st.sampled_from(RATIOS), inflection=inflections)
def test_a_budget_with_an_inflection_is_the_least_such_line(config: Config, budget: str, inflection: float) -> None:
    (mean, line), ratio = resolved(config, (budget, inflection))
    assert line == inflection
    assert reaches(config, (mean, line), ratio)
    assert mean == 0 or saved(config, (mean - 1, line)) < ratio
    assert plain_schedule((mean, line), config) == (mean, line)


@given(
    config=configs(max_depth=14),
    budget=st.sampled_from(RATIOS),
    shape=st.sampled_from(["", "late", "late:1", "late:0.5", "late:4", "deferred", "deferred:0", "deferred:1"]),
    matching=st.sampled_from(["", *PLAIN_MATCHINGS]),
)
def test_a_budget_in_a_shape_and_by_a_matching(config: Config, budget: str, shape: str, matching: str) -> None:
    if shape == "deferred:1" and config.depth == 1:
        with pytest.raises(ValueError, match="leaves 1 blocks alone, and the model has 1"):
            plain_schedule(f"{budget} {shape}", config)
        return
    r, ratio = resolved(config, f"{budget} {shape} {matching}")
    assert reaches(config, r, ratio)
    assert plain_schedule(r, config) == r
    if not shape and not matching:
        return
    assert type(r) is list
    assert len(r) == config.depth
    steps = resolve_steps(r, config.depth, config.num_tokens, config.num_prefix, config.grid)
    assert {step.matching for step in steps if step.total} <= {matching or None}
    assert [step.entry for step in steps] == r
    constant, _ = resolved(config, budget)
    if matching and not shape:  # one matching takes away as many tokens as another
        assert [step.total for step in steps] == counts_of(constant, config)
    if shape.startswith("deferred"):
        first = config.depth // 4 if shape == "deferred" else int(shape[-1])
        assert not any(step.total for step in steps[:first])


def counts_of(r: Schedule, config: Config) -> list[int]:
    steps = resolve_steps(r, config.depth, config.num_tokens, config.num_prefix, config.grid)
    return [step.total for step in steps]


@given(config=configs(), budget=st.sampled_from(RATIOS))
def test_a_grid_merges_once_as_late_as_it_can(config: Config, budget: str) -> None:
    if config.num_patches == 1:
        with pytest.raises(ValueError, match="2x2"):
            plain_schedule(f"{budget} grid", config)
        return
    r, ratio = resolved(config, f"{budget} grid")
    assert reaches(config, r, ratio)
    assert len(r) == config.depth
    assert sorted(map(str, r)) == ["0"] * (config.depth - 1) + ["grid"]
    block = r.index("grid")
    if block < config.depth - 1:
        assert saved(config, [0] * (block + 1) + ["grid"]) < ratio
    assert plain_schedule(r, config) == r


def test_budgets_of_vit_b16() -> None:
    config = Config()
    assert 1.9 < saved(config, plain_schedule("1.9x", config)) < 2.0
    for text in ("50%", "2.0x", " 2X "):
        assert plain_schedule(text, config) == plain_schedule("2x", config)
    assert plain_schedule("2x", config) == 18
    assert plain_schedule("2x", Config(img_size=(384, 384))) > 40
    with pytest.raises(ValueError, match=r"'50x' cannot be reached: at 224x224 pixels .* '[0-9.]+x' can be had"):
        plain_schedule("50x", config)


@pytest.mark.parametrize("kind", ["late", "late:1", "deferred:0", ",1", ",-0.5"])
def test_what_cannot_be_reached_is_beyond_all_that_can_merge(kind: str) -> None:
    # A line or a shape can be made so steep that half of the tokens merge in every block that may.
    config = Config(img_size=(96, 96), pool="avg")
    first = 1 if kind == ",1" else 0
    most = saved(config, [0] * first + [10**6] * (config.depth - first))
    words = "{}x" + (kind if kind[0] == "," else f" {kind}")
    assert reaches(config, plain_schedule(words.format(float(most) * 0.999), config), float(most) * 0.999)
    with pytest.raises(ValueError, match=f"can have {math.floor(most * 100) / 100:.2f} times fewer"):
        plain_schedule(words.format(float(most) * 1.001), config)


PRESET = Preset(name="diffrate-2.9g", r=(0, "20+3 diffrate", 5), num_tokens=5, source="here")


def test_a_preset_is_for_one_number_of_tokens() -> None:
    config = Config(img_size=(32, 32), depth=3)
    assert plain_schedule("DiffRate-2.9g ", config, [PRESET]) == [0, "20+3 diffrate", 5]
    with pytest.raises(ValueError, match="is no preset of this model; it has none"):
        plain_schedule("diffrate-2.9g", config)
    with pytest.raises(ValueError, match=r"is no preset of this model; it has 'diffrate-2\.9g'"):
        plain_schedule("diffrate-3g", config, [PRESET])
    for other in (Config(img_size=(48, 48), depth=3), Config(img_size=(32, 32), depth=4)):
        with pytest.raises(ValueError, match=r"is for 5 tokens and 3 blocks, .* '2x diffrate' and the like fit any"):
            plain_schedule("diffrate-2.9g", other, [PRESET])


# ----------------------------------------------------------------------------------------------------- shapes and steps


@given(
    total=st.integers(0, 5000),
    depth=st.integers(1, 48),
    shape=st.sampled_from(SHAPES),
    number=st.none() | st.floats(0.1, 100) | st.integers(0, 60),
)
def test_shapes_sum_to_the_total(total: int, depth: int, shape: str, number: float | None) -> None:
    if shape == "deferred" and number is not None and int(number) >= depth:
        with pytest.raises(ValueError, match=f"leaves {int(number)} blocks alone, and the model has {depth}"):
            shaped(total, depth, shape, number)
        return
    if shape == "late" and number == 0:
        number = 1
    out = shaped(total, depth, shape, number)
    assert len(out) == depth
    assert sum(out) == total
    assert all(type(count) is int and count >= 0 for count in out)
    if shape == "late":
        # Sums up to each block are rounded: a block is off by less than one token.
        assert all(after >= before - 1 for before, after in itertools.pairwise(out))
    else:
        first = depth // 4 if number is None else int(number)
        assert not any(out[:first])
        assert max(out[first:]) - min(out[first:]) <= 1
    more = shaped(total + 1, depth, shape, number)
    assert all(sum(more[:i]) >= sum(out[:i]) for i in range(depth + 1))


@given(
    r=schedules,
    depth=st.integers(12, 16),
    edges=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prefix=st.integers(0, 5),
)
def test_steps_leave_a_patch_and_merge_at_most_half(
    r: Schedule, depth: int, edges: tuple[int, int], prefix: int
) -> None:
    patches = left = edges[0] * edges[1]
    words = parse_words(r) if isinstance(r, str) else None
    if words is not None and (words.ratio is not None or words.preset is not None):
        with pytest.raises(ValueError, match="plain_schedule makes a plain r of it"):
            resolve_steps(r, depth, patches + prefix, prefix, edges)
        return
    steps, message = answer(lambda: resolve_steps(r, depth, patches + prefix, prefix, edges))
    if steps is None:
        assert "whole grid of patches" in message or "blocks alone" in message
        return
    assert len(steps) == depth
    grid: tuple[int, int] | None = edges
    for block, step in enumerate(steps):
        assert type(step.merge) is type(step.drop) is int
        assert step.depth == block / depth
        if step.matching == "grid":
            assert step.grid == grid  # whole, halved by those before
            grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            assert step.total == left - grid[0] * grid[1]
        else:
            assert step.grid is None
            assert step.drop == 0 or step.matching == "diffrate"
            assert 0 <= step.drop < left
            assert 0 <= step.merge <= (left - step.drop) // 2
            grid = None if step.total else grid
        left -= step.total
        assert left >= 1
    assert token_counts(r, depth, patches + prefix, prefix, edges)[-1] == left + prefix
    # As a list of its entries it is the same again.
    entries = [step.entry for step in steps]
    again = resolve_steps(entries, depth, patches + prefix, prefix, edges)
    assert [step.entry for step in again] == entries
    assert [step[:2] for step in again] == [step[:2] for step in steps]


@pytest.mark.parametrize(
    ("r", "block", "left"),
    [([1, "grid"], 1, 15), (["grid", "1 pitome", 0, "grid"], 3, 3), (["grid", "grid", "grid"], 2, 1)],
    ids=repr,
)
def test_neighbours_merge_only_in_a_whole_grid(r: list[int | str], block: int, left: int) -> None:
    with pytest.raises(ValueError, match=f"block {block} cannot merge .* whole grid of patches, and here {left} "):
        resolve_steps(r, 4, 17, 1, (4, 4))
    assert [step.total for step in resolve_steps(["grid", 0, "grid"], 4, 17, 1, (4, 4))] == [12, 0, 3, 0]
    assert [step.total for step in resolve_steps(["grid"], 1, 16, 1, (3, 5))] == [9]


def test_visible_subsets_have_no_grid() -> None:
    model = tiny(["grid"])
    images = images_for(model)
    visible = torch.arange(64).expand(3, -1)
    with torch.inference_mode():
        assert model.forward_features(images).x.shape[1] == 17
        with pytest.raises(ValueError, match="block 0 cannot merge neighbours 2x2: they need the whole grid"):
            model.forward_features(images, visible=visible[:, ::2])
        with pytest.raises(ValueError, match="whole grid"):
            model.token_counts(num_tokens=33)
        assert model.forward_features(images, "8 late", visible=visible[:, ::2]).x.shape[1] < 33


def test_no_model_merges_neighbours_everywhere() -> None:
    with pytest.raises(ValueError, match="merges once, in a block that r names"):
        tiny(4, matching="grid")


def test_entries_of_a_list() -> None:
    model = tiny(["3 random", "8+5 diffrate", 4, "2 pitome"], pool="avg")
    assert model.schedule() == (3, 13, 4, 2)
    assert model.token_counts() == (65, 62, 49, 45, 43)
    assert [step[:3] for step in model.steps()] == [
        (3, 0, "random"),
        (8, 5, "diffrate"),
        (4, 0, None),
        (2, 0, "pitome"),
    ]
    assert model.steps(["grid"])[0] == Step(48, 0, "grid", (8, 8), 0.0)
    with torch.inference_mode():
        for r in (None, ["grid", "8+5 diffrate"], "4 late importance", "0.2 diffrate"):
            layers = model.forward_intermediates(images_for(model), r)
            assert [tokens.x.shape[1] for tokens in layers] == list(model.token_counts(r)[1:])


# ---------------------------------------------------------------------------------------- plain numbers wherever r goes

BUDGETS: list[Any] = ["1.3x", "80%", ("1.2x", -0.5), "1.3x late", "1.2x deferred:1", "1.2x pitome", "1.3x grid"]


def is_plain(r: Schedule) -> bool:
    return not isinstance(r, str)


@pytest.mark.parametrize("r", BUDGETS, ids=repr)
def test_a_model_keeps_plain_numbers(r: Any, tmp_path: Path) -> None:
    model = tiny(pool="avg")
    plain = plain_schedule(r, model.config)
    assert is_plain(plain)
    assert plain != 0
    images = images_for(model)
    with torch.inference_mode():
        called = model(images, r=r)
        assert torch.equal(called, model(images, r=plain))
        assert not torch.equal(called, model(images))
        model.r = r
        assert model.r == plain
        assert torch.equal(model(images), called)
    assert model.schedule() == model.schedule(r) == model.schedule(plain)
    assert model.token_counts() == model.token_counts(r)
    assert f"r={plain}" in model.extra_repr()
    tomevit.save(model, tmp_path / "model.safetensors")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        tomevit.load(tmp_path / "model.safetensors"),
        tiny(r, pool="avg"),
        tomevit.from_module(model, r=r),
    ):
        assert other.r == plain
        assert torch.equal(other(images), model(images))
    assert Card(name="tiny", config=model.config, r=r).r == plain


def test_what_cannot_be_reached_leaves_r_as_it_was() -> None:
    model = tiny(3)
    for r in ("50x", "diffrate-2.9g", ("9x", 1.0), "3x late"):
        with pytest.raises(ValueError, match=r"\br\b"):
            model.r = r
        with pytest.raises(ValueError, match=r"\br\b"):
            model(images_for(model), r=r)
    assert model.r == 3


def test_models_by_name_have_budgets_for_their_size() -> None:
    small = tomevit.create("vit_ti16", r="1.5x", img_size=96)
    large = tomevit.create("vit_ti16", r="1.5x", img_size=224)
    assert 0 < small.r < large.r
    for model in (small, large):
        assert reaches(model.config, model.r, 1.5)
        assert saved(model.config, model.r - 1) < 1.5
    with pytest.raises(ValueError, match="cannot be reached: at 96x96 pixels"):
        tomevit.create("vit_ti16", r="50x", img_size=96)


def test_models_of_other_libraries_have_budgets() -> None:
    module = timm.models.VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    model = tomevit.from_module(module, r="1.3x late")
    assert is_plain(model.r)
    assert reaches(model.config, model.r, 1.3)
    with pytest.raises(ValueError, match="cannot be reached"):
        tomevit.from_module(module, r="50x")


def test_a_preset_of_the_card_is_an_r_of_the_model() -> None:
    model = tiny(depth=3, img_size=(8, 8))
    model.card = Card(name="tiny", config=model.config, presets=(PRESET,), r="diffrate-2.9g")
    assert model.card.r == [0, "20+3 diffrate", 5]
    model.r = "diffrate-2.9g"
    assert model.r == [0, "20+3 diffrate", 5]
    assert model.token_counts() == (5, 5, 2, 2)  # 3 dropped, and the one that is left stays
    with torch.inference_mode():
        features = model.forward_features(images_for(model))
    assert (features.slots == -1).sum(1).eq(3).all()
    assert tomevit.unmerge(features)[features.slots == -1].eq(0).all()
