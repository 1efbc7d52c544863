"""The search for schedules: what it promises of its front, with times made up; once with real ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tomevit
from tests.helpers import PLAIN, images_for, tiny
from tomevit.layers.matching import bipartite_soft_matching
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule, Step, resolve_steps, schedule_from_json
from tomevit.tasks import demo, plots
from tomevit.tasks.tune import Front, Point, answers, choices, costs, tune
from tomevit.tasks.tune.costs import BlockRun, Drift, Seconds, block_runs, probes
from tomevit.tasks.tune.front import best_of, drift_at
from tomevit.tasks.tune.search import exchanges, is_possible, shortest_path, shortest_paths, spread, undominated
from tomevit.tasks.tune.setting import num_searched

SMALL: dict[str, Any] = {"img_size": (16, 16), "embed_dim": 8, "num_heads": 2}


# --------------------------------------------------------------------------------------------------------- a made clock


def block_seconds(tokens: int, merge: int, matching: str | None) -> float:
    match = 0.0 if not merge else {"pitome": 0.5, "importance": 0.3}.get(str(matching), 0.2)
    return 1e-3 * (tokens + tokens**2 / 64 + match - 2 * merge / 3)


def clock(model: VisionTransformer) -> Callable[..., Any]:
    """Times by a formula instead of a clock, for blocks and whole forwards alike."""

    def of(key: Any) -> float:
        if isinstance(key, BlockRun):
            return 1e-3 * key.tokens / 2 if key.last else block_seconds(key.tokens, key.merge, key.matching)
        r = 0 if key is None else schedule_from_json(json.loads(key))
        counts, steps = model.token_counts(r), model.steps(r)
        searched = len(counts) - 1 - (model.config.num_read is not None)
        whole = sum(block_seconds(n, s.total, s.matching) for n, s in list(zip(counts, steps, strict=False))[:searched])
        return 1e-3 + whole + 1e-3 * counts[-2] / 2

    def time_rounds(calls: Any, *, rounds: int, device: object, tell: Any = lambda *_: None) -> dict[Any, list[float]]:
        tell(0, 1)
        for call in calls.values():
            call()
        tell(1, 1)
        return {key: [of(key) * (1 + i / 100) for i in range(rounds)] for key in calls}

    return time_rounds


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VisionTransformer]:
    def make(**fields: Any) -> VisionTransformer:
        model = tiny(**SMALL | fields)
        monkeypatch.setattr(costs, "time_rounds", clock(model))
        return model

    return make


def quickly(
    model: VisionTransformer, images: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
) -> Front:
    small: dict[str, Any] = {"batch": 2, "rounds": 6, "matchings": ("bipartite", "diffrate")}
    return tune(model, images_for(model, 40) if images is None else images, labels, **small | kwargs)


# ------------------------------------------------------------------------------------------------------ shortest paths


def test_the_shortest_path_is_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        matchings, blocks, states = 2, 3, 5
        times = draw.random((matchings, states, states))
        for i, j in itertools.product(range(states), repeat=2):
            if j < i or j - i > 2:
                times[:, i, j] = np.inf
        drifts, last, weight = draw.random((matchings, blocks, states)).cumsum(2), draw.random(states), draw.random()

        def cost(
            path: Any, times: Any = times, drifts: Any = drifts, last: Any = last, weight: float = weight
        ) -> float:
            at, whole = 0, 0.0
            for block, (m, to) in enumerate(path):
                whole += times[m, at, to] + weight * (drifts[m, block, to] - drifts[m, block, at])
                at = to
            return whole + last[at]

        moves = itertools.product(range(matchings), range(states))
        best = min(map(cost, itertools.product(list(moves), repeat=blocks)))
        assert cost(shortest_path(times, drifts, last, weight)) == pytest.approx(best)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_paths_go_from_none_to_all_and_can_be_run(pool: str) -> None:
    config = tiny(pool=pool).config
    timed = {run: block_seconds(run.tokens, run.merge, run.matching) for run in block_runs(config, (None, "pitome"))}
    seconds = Seconds(config, timed, whole=1.0)
    drift = Drift(
        config,
        {
            m: {(p.block, p.merged): factor * (p.merged / 64) ** 2 / (1 + p.block) for p in probes(config, m)}
            for m, factor in ((None, 1.0), ("pitome", 1.5))
        },
    )
    found = shortest_paths(config, seconds, drift, (None, "pitome"))
    times, drifts = [seconds.forward(steps) for steps in found], [drift.of(steps) for steps in found]
    assert sorted(times, reverse=True) == times
    assert sorted(drifts) == pytest.approx(drifts)  # each is the best at its time, so the front of the two falls
    assert drifts[0] == 0
    assert len(found) > 5
    for steps in found:
        assert is_possible(steps, config)
        entries = [step.entry for step in steps]
        resolved = resolve_steps(entries, config.depth, config.num_tokens, config.num_prefix)
        assert [step.total for step in resolved] == [step.total for step in steps]
        assert pool == "avg" or not steps[-1].total
    counts = []
    for steps in found[1:]:
        near = list(exchanges(steps, config, seconds, (None, "pitome")))
        counts.append(len(near))
        assert all(is_possible(each, config) and each != steps for each in near)
        assert all(seconds.forward(each) <= seconds.forward(steps) for each in near)
    assert max(counts) >= 5


def test_the_times_of_a_block_say_what_a_schedule_takes() -> None:
    config = tiny().config
    timed = {run: block_seconds(run.tokens, run.merge, run.matching) for run in block_runs(config, (None,))}
    timed |= {run: 0.25 for run in timed if run.last}
    seconds = Seconds(config, timed, whole=3.0)
    exact = 3 * block_seconds(65, 0, None) + 0.25
    assert seconds.forward([Step()] * 4) == pytest.approx(3.0)
    assert seconds.rest == pytest.approx(3.0 - exact)
    # A quadratic through lines between twenty counts, and a line in what merges.
    for tokens, merge in ((65, 8), (50, 20), (37, 3)):
        assert seconds.block(tokens, merge) == pytest.approx(block_seconds(tokens, merge, None), rel=0.015)
    assert Seconds(config, timed, whole=0.0).rest == 0.0


def test_drift_passes_through_what_was_measured() -> None:
    config = tiny().config
    measured = {(p.block, p.merged): (1 + p.block) * (p.merged / 64) ** 1.5 for p in probes(config, None)}
    drift = Drift(config, {None: measured})
    for probe in probes(config, None):
        first = probe.steps[: probe.block + 1]
        if probe.merged == first[-1].merge:
            assert drift.of(first) == pytest.approx(measured[probe.block, probe.merged])
    assert drift.of([Step(20), Step(10)]) > drift.of([Step(20)]) > drift.of([Step(5)]) > 0
    assert drift.of([Step()] * 4) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_undominated(those: list[tuple[int, int]]) -> None:
    kept = undominated(those, lambda each: each)
    for each in those:
        assert any(k[0] <= each[0] and k[1] <= each[1] for k in kept)
    for a, b in itertools.permutations(kept, 2):
        assert not (a[0] <= b[0] and a[1] <= b[1])


def test_few_of_many_keep_the_ends() -> None:
    assert spread([3.0, 1.0], float, 5) == [3.0, 1.0]
    found = spread([float(i) for i in range(1, 101)], float, 5)
    assert (found[0], found[-1], len(found)) == (1.0, 100.0, 5)


# ------------------------------------------------------------------------------------------------------------ the front


def test_nothing_on_the_front_is_worse_than_constant_r(clocked: Callable[..., VisionTransformer]) -> None:
    model = clocked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    front = quickly(model, labels=torch.arange(40) % 7)
    measured = [*front.points, *front.others]
    assert front.points[0].kind == "unmerged"
    assert {"constant", "unmerged", "found"} <= {point.kind for point in measured}
    assert len({str(point.r) for point in measured}) == len(measured)
    for point in measured:
        if point.kind == "constant" and point.speed_up >= 1:
            assert front.at(speed_up=point.speed_up).drift <= point.drift
            assert front.at(latency=point.seconds).drift <= point.drift
            drop = max(0.0, front.points[0].kept - point.kept)
            assert front.at(max_drop=drop).seconds <= point.seconds
    assert model.r == 0
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for point in front.points:
        model.r = point.r
        assert model.token_counts()[-1] == point.tokens
        model(images_for(model))
    images = front.setting["images"]
    assert (images["count"], images["search"], images["held_back"]) == (40, 20, 20)
    assert num_searched(512) == 128


def test_the_figures_are_those_of_the_images_held_back(clocked: Callable[..., VisionTransformer]) -> None:
    model, images, labels = clocked(), images_for(tiny(**SMALL), 40), torch.arange(40) % 7
    front = quickly(model, images, labels, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    theirs = images[order[20:]]
    plain = model(theirs, r=0).double().log_softmax(1)
    for point in (*front.points, *front.others):
        merged = model(theirs, r=point.r).double().log_softmax(1)
        kl = (plain.exp() * (plain - merged)).sum(1).mean().item()
        assert point.kl == pytest.approx(kl, abs=1e-9)
        classes = merged.argmax(1)
        assert point.agreement == pytest.approx(100 * (classes == plain.argmax(1)).double().mean().item())
        assert point.top1 == pytest.approx(100 * (classes == labels[order[20:]]).double().mean().item())
        assert point.speed_up == pytest.approx(front.points[0].seconds / point.seconds)


def test_images_held_back_take_no_part_in_the_search(
    clocked: Callable[..., VisionTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = clocked()
    images = images_for(model, 40)
    seen: list[tuple[str, set[int]]] = []
    stage = "first"
    before = VisionTransformer.forward

    def spy(self: VisionTransformer, given: Tensor, r: Schedule | None = None) -> Tensor:
        seen.append((stage, {i for i, image in enumerate(images) for one in given if image.equal(one)}))
        return before(self, given, r)

    def progress(name: str, done: int, total: int) -> None:
        nonlocal stage
        assert 0 <= done <= total
        stage = name

    monkeypatch.setattr(VisionTransformer, "forward", spy)
    quickly(model, images, progress=progress)
    late = ("comparing answers", "timing schedules")
    search, held_back = (
        set().union(*(found for name, found in seen if (name in late) is is_late)) for is_late in (False, True)
    )
    assert len(search) == len(held_back) == 20
    assert not search & held_back
    assert {name for name, _ in seen} >= {"trying single merges", "trying schedules", "exchanging", *late}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_classes": 0},
        {"num_classes": 1},
        {"pool": "avg", "pool_norm": "after", "prop_attn": False},
        {"class_token": False, "pool": "avg"},
        {"dist_token": True, "reg_tokens": 2},
        {"matching": lambda key, r, num_prefix: bipartite_soft_matching(key, r, num_prefix)},
        {"rope": "dinov3", "pos_embed": "none", "embed_dim": 16},
        {"depth": 2},
        {"img_size": (8, 8), "depth": 3},
    ],
    ids=["embedding", "one class", "mae", "no class token", "distilled", "own matching", "rope", "shallow", "small"],
)
def test_every_kind_of_model_can_be_tuned(clocked: Callable[..., VisionTransformer], fields: dict[str, Any]) -> None:
    model = clocked(**fields)
    front = quickly(model)
    headless = model.config.num_classes == 0
    for point in (*front.points, *front.others):
        assert (point.kl is None) is headless
        assert (point.cosine is None) is not headless
        model.r = point.r
    assert front.at(max_drop=0).agreement == pytest.approx(100)
    assert Front.from_json(json.loads(json.dumps(front.to_json()))) == front


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(clocked: Callable[..., VisionTransformer], dtype: torch.dtype) -> None:
    front = quickly(clocked().to(dtype))
    assert front.setting["dtype"] == str(dtype).removeprefix("torch.")


def test_presets_are_measured_beside(clocked: Callable[..., VisionTransformer]) -> None:
    model = clocked()
    r = (4, "2+1 diffrate", 1, 0)
    preset = tomevit.Preset(name="diffrate-1g", r=r, num_tokens=17, source="here")
    other = replace(preset, name="diffrate-2g", num_tokens=99)
    model.card = replace(model.card, presets=(preset, other))
    front = quickly(model)
    (found,) = (point for point in (*front.points, *front.others) if point.kind == "preset")
    assert found.r == list(r)
    assert found.matchings == ("bipartite", "diffrate")


def test_what_was_not_asked_for_is_not_searched(clocked: Callable[..., VisionTransformer]) -> None:
    assert choices(tiny().config, ["pitome", "bipartite"]) == ("bipartite", ("pitome", None))
    front = quickly(clocked(), matchings=["pitome"])
    found = [point for point in (*front.points, *front.others) if point.kind in ("found", "shape")]
    assert found
    assert {name for point in found for name in point.matchings} == {"pitome"}


def test_where_the_search_gains_nothing_there_is_constant_r() -> None:
    constant = [made(seconds=4 - i, drift=i / 10, kind="constant" if i else "unmerged", r=i) for i in range(4)]
    worse = made(seconds=1.5, drift=0.5, kind="found", r=[5])
    best, note = best_of([*constant, worse])
    assert best == constant
    assert "nothing better than constant r" in note
    unsure = made(seconds=2.5, drift=0.1, kind="found", r=[6], speed_up_range=(0.9, 2.0))
    assert best_of([*constant, unsure]) == (constant, note)
    better = made(seconds=2.5, drift=0.1, kind="found", r=[6])
    best, note = best_of([*constant, worse, better])
    assert best == [constant[0], better, constant[2], constant[3]]
    assert "no constant r (1) move the answers 0.67 times as far" in note
    best, note = best_of([*constant, worse, better, made(seconds=1.5, drift=0.2, kind="preset", r=[7])])
    assert "no constant r (2) move the answers 0.67 to 0.80 times as far" in note
    assert drift_at(constant, 2.5) == pytest.approx(0.15)
    assert drift_at(constant, 0.5) == float("inf")
    assert drift_at(constant, 9.0) == 0
    faster = made(seconds=0.5, drift=0.6, kind="found", r=[7])
    assert "faster than any constant r: r = [7], 8.00 times" in best_of([*constant, faster])[1]


# ------------------------------------------------------------------------------------------------------------- promises


def made(
    *, seconds: float, drift: float, kind: Any = "found", r: Schedule = 1, base: float = 4.0, **fields: Any
) -> Point:
    given: dict[str, Any] = {"agreement": 100 - 20 * drift, "top1": None, "speed_up_range": None} | fields
    return Point(
        r=r,
        kind=kind,
        matchings=(),
        tokens=1,
        flop_ratio=1.0,
        seconds=seconds,
        seconds_range=(seconds, seconds),
        speed_up=base / seconds,
        kl=drift,
        cosine=None,
        **given,
    )


WHERE = {"device": "a chip", "dtype": "float32", "batch": 8, "mode": "eager", "model": "m"}
WHERE |= {"tokens": 65, "prefix": 1, "depth": 4, "matching": "bipartite"}
NUMBERS = st.floats(0.01, 10, allow_nan=False)


@st.composite
def fronts(draw: st.DrawFn) -> Front:
    labelled = draw(st.booleans())
    points = [made(seconds=4.0, drift=0.0, kind="unmerged", r=0, top1=90.0 if labelled else None)]
    for i, (seconds, drift) in enumerate(draw(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8)), 1):
        kept = draw(st.floats(0, 100))
        lower = draw(st.floats(0.5, 1.5))
        kind = draw(st.sampled_from(["constant", "found", "shape", "preset"]))
        points.append(
            made(
                seconds=seconds,
                drift=drift,
                kind=kind,
                r=[i],
                agreement=draw(st.floats(0, 100)),
                top1=kept if labelled else None,
                speed_up_range=draw(st.sampled_from([None, (lower, lower + 1)])),
            )
        )
    best, note = best_of(points)
    return Front(setting=WHERE, points=tuple(best), others=tuple(p for p in points if p not in best), note=note)


@settings(deadline=None)
@given(fronts(), NUMBERS)
def test_a_point_keeps_the_promise_that_it_was_asked_for(front: Front, number: float) -> None:
    constant = [p for p in (*front.points, *front.others) if p.kind in ("unmerged", "constant")]
    sure = [p for p in front.points if p.speed_up_range is None or p.speed_up_range[0] >= 1]
    if max(p.speed_up for p in sure) < number:
        with pytest.raises(ValueError, match=f"the most is {max(p.speed_up for p in sure):.2f}"):
            front.at(speed_up=number)
    else:
        point = front.at(speed_up=number)
        assert point in sure
        assert point.speed_up >= number
        assert not any(p.drift < point.drift and p.speed_up >= number and p.speed_up_range is None for p in constant)
    point = front.at(max_drop=number)
    assert point.kept >= front.points[0].kept - number - 1e-6
    assert not any(p.seconds < point.seconds and p.kept >= front.points[0].kept - number for p in constant)
    if min(p.seconds for p in front.points) > number:
        with pytest.raises(ValueError, match="the fastest takes"):
            front.at(latency=number)
    else:
        point = front.at(latency=number)
        assert point.seconds <= number
        assert not any(p.drift < point.drift and p.seconds <= number for p in constant)


@given(fronts())
def test_a_front_survives_json(front: Front) -> None:
    assert Front.from_json(json.loads(json.dumps(front.to_json()))) == front


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give one of speed_up, max_drop or latency, and not none"),
        ({"speed_up": 2.0, "latency": 1.0}, "not speed_up and latency"),
        ({"speed_up": 0}, "must be a number above 0"),
        ({"speed_up": float("nan")}, "must be a number above 0"),
        ({"max_drop": -0.5}, "must be a number of at least 0"),
        ({"speed_up": 3.0}, "no schedule is 3 times as fast .* a chip, float32, batch 8: the most is 2.00, with r = 8"),
        ({"latency": 0.02}, "no schedule takes 20 ms or less .*: the fastest takes 2e.03 ms, with r = 8"),
    ],
)
def test_what_cannot_be_had_is_said_with_what_can(asked: dict[str, float], message: str) -> None:
    points = made(seconds=4.0, drift=0.0, kind="unmerged", r=0), made(seconds=2.0, drift=0.1, kind="constant", r=8)
    with pytest.raises(ValueError, match=message):
        Front(setting=WHERE, points=points).at(**asked)


def test_a_speed_up_that_may_be_none_is_none() -> None:
    unsure = made(seconds=2.0, drift=0.1, r=8, speed_up_range=(0.9, 3.0))
    front = Front(setting=WHERE, points=(made(seconds=4.0, drift=0.0, kind="unmerged", r=0), unsure))
    with pytest.raises(ValueError, match=r"the most is 1.00, with r = 0"):
        front.at(speed_up=1.5)


def test_a_front_is_for_models_of_its_shape() -> None:
    front = Front(setting=WHERE, points=(made(seconds=4.0, drift=0.0, kind="unmerged", r=0),))
    front.check(tiny())
    for other, words in (
        (tiny(depth=3), "4 blocks, m, and this one has 3"),
        (tiny(img_size=(16, 16)), "65 tokens, m, and this one has 17"),
        (tiny(matching="random"), "whose matching is 'bipartite', and this one's is 'random'"),
    ):
        with pytest.raises(ValueError, match=words):
            front.check(other)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("stop", [3, 30, 60, 10**6])
def test_a_search_that_was_interrupted_goes_on_where_it_was(
    clocked: Callable[..., VisionTransformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    model, path = clocked(), tmp_path / "front.json"
    whole = quickly(model)
    tried: list[tuple[float, str]] = []
    compare = answers.Faithfulness._compare

    def watched(self: answers.Faithfulness, r: Schedule) -> Any:
        if len(tried) == stop:
            tried.append((0.0, "the interrupt"))
            raise KeyboardInterrupt
        tried.append((self.images.sum().item(), str(r)))
        return compare(self, r)

    monkeypatch.setattr(answers.Faithfulness, "_compare", watched)
    if stop == 10**6:  # the clock is stopped instead, at the end
        made_clock, runs = costs.time_rounds, []

        def stopping(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            if len(runs) == 2:
                raise KeyboardInterrupt
            return made_clock(*args, **kwargs)

        monkeypatch.setattr(costs, "time_rounds", stopping)
    with pytest.raises(KeyboardInterrupt):
        quickly(model, file=path)
    known = json.loads(path.read_text())
    assert not known["finished"]
    assert known["measured"]["blocks"]
    with pytest.raises(ValueError, match=r"was interrupted: tune with file='.*front.json' to go on"):
        Front.load(path)
    assert quickly(model, file=path) == whole
    assert Front.load(path) == whole
    assert len(set(tried)) == len(tried)  # nothing is measured twice
    count = len(tried)
    assert quickly(model, file=path) == whole
    assert len(tried) == count
    fresh = tmp_path / "fresh.json"
    stop = -1
    quickly(model, file=fresh)
    assert fresh.read_bytes() == path.read_bytes()


def test_a_file_of_another_setting_is_left_alone(clocked: Callable[..., VisionTransformer], tmp_path: Path) -> None:
    model, path = clocked(), tmp_path / "front.json"
    images = images_for(model, 40)
    quickly(model, images, file=path)
    before = path.read_bytes()
    for other, message in (
        ({"batch": 4}, "batch = 2, and this call has 4"),
        ({"seed": 1}, "seed = 0, and this call has 1"),
        ({"matchings": ["bipartite"]}, "matchings = "),
        ({"labels": torch.zeros(40, dtype=torch.int64)}, "other labels"),
        ({"images": images + 1}, "other images"),
    ):
        with pytest.raises(ValueError, match=message):
            quickly(model, **{"images": images, "file": path} | other)
    with pytest.raises(ValueError, match="other weights"):
        quickly(tiny(seed=1, **SMALL), images, file=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no front"),
        ("[]", "is no front"),
        ('{"schema": 2, "finished": true, "setting": {}}', "is of version 2"),
        ('{"schema": 1, "finished": true, "setting": {}}', "is damaged: it lacks 'model'"),
    ],
)
def test_what_is_no_front(
    clocked: Callable[..., VisionTransformer], tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "front.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Front.load(path)
    with pytest.raises(ValueError, match=message if "damaged" not in message else "was measured with model"):
        quickly(clocked(), file=path)
    assert path.read_text() == content


def test_a_damaged_record_is_named(clocked: Callable[..., VisionTransformer], tmp_path: Path) -> None:
    model, path = clocked(), tmp_path / "front.json"

    def stop(name: str, done: int, total: int) -> None:
        if name == "trying single merges":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quickly(model, file=path, progress=stop)
    found = json.loads(path.read_text())
    found["measured"]["blocks"][0] = [1, 2]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"front.json is damaged \(measured.blocks"):
        quickly(model, file=path)


def test_a_front_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = (
        made(seconds=4.0, drift=0.0, kind="unmerged", r=0),
        made(seconds=2.0, drift=0.1, r=[8], speed_up_range=(1.9, 2.1)),
    )
    others = (made(seconds=2.1, drift=0.2, kind="constant"), made(seconds=3.0, drift=0.2, kind="preset"))
    front = Front(setting=WHERE | {"images": {"held_back": 20}}, points=points, others=others)
    front.plot(tmp_path / "front.png")
    front.plot(tmp_path / "front.svg")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "agreement" in (tmp_path / "front.svg").read_text() or (tmp_path / "front.svg").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"\.svg"):
        front.plot(tmp_path / "front.txt")
    with pytest.raises(ValueError, match=r"\.json"):
        front.save(tmp_path / "front.png")


def test_the_line_of_a_front_never_turns_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = (
        made(seconds=4.0, drift=0.0, kind="unmerged", r=0, top1=90.0),
        made(seconds=3.0, drift=0.1, r=4, top1=80.0),  # the most faithful by KL, and less accurate than what is faster
        made(seconds=2.0, drift=0.2, r=8, top1=85.0),
    )
    drawn = {}
    monkeypatch.setattr(plots, "require_matplotlib", lambda: None)
    monkeypatch.setattr(plots, "faithfulness", lambda path, kind, lines, *_: (drawn.update(lines), path.touch()))
    Front(setting=WHERE | {"images": {"held_back": 20}}, points=points).plot(tmp_path / "front.png")
    assert [(point.kept, point.speed_up) for point in drawn["front"]] == [(90.0, 1.0), (85.0, 2.0)]


# ------------------------------------------------------------------------------------------------------ wrong arguments


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    images = images_for(tiny(**SMALL), 40)
    yield {"images": images[:31]}, "31 images are too few to tell schedules apart: give 32 at least"
    yield {"images": images[..., :8]}, "16"
    yield {"images": images.to(torch.uint8)}, "normalise them first"
    yield {"labels": torch.zeros(40)}, "labels are torch.float32"
    yield {"labels": torch.zeros(39, dtype=torch.int64)}, r"of shape \(39,\)"
    yield {"labels": torch.full((40,), 7)}, "labels must lie between 0 and 6"
    yield {"mode": "fast"}, "there is no mode 'fast'; there is eager"
    yield {"batch": 0}, "batch is 0"
    yield {"rounds": 0}, "rounds is 0"
    yield {"matchings": ["best"]}, "matchings has 'best'"
    yield {"matchings": ["grid"]}, "matchings has 'grid'"
    yield {"matchings": "bipartite"}, "must list"
    yield {"matchings": []}, "must list"
    yield {"images": images / 0}, "not all finite"


@pytest.mark.parametrize(("arguments", "message"), [*wrong()])
def test_wrong_arguments_are_said(
    clocked: Callable[..., VisionTransformer], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quickly(clocked(), **arguments)


def test_models_in_which_nothing_merges(clocked: Callable[..., VisionTransformer]) -> None:
    with pytest.raises(ValueError, match="nothing can merge"):
        quickly(clocked(depth=1))
    with pytest.raises(ValueError, match="labels are for a model with a head"):
        quickly(clocked(num_classes=0), labels=torch.zeros(40, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be a VisionTransformer"):
        tune(torch.nn.Linear(2, 2), torch.zeros(40, 2))


# ------------------------------------------------------------------------------------------------------------- for real


def test_the_digits_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "COUNTS", 5)
    model = tomevit.create(PLAIN, pretrained=True)
    images, labels = demo.held_out()
    with demo.one_thread():
        front = tomevit.tune(
            model,
            tomevit.transform(model)(images[:64]),
            labels[:64],
            batch=4,
            matchings=["bipartite"],
            rounds=6,
            file=tmp_path / "front.json",
        )
    assert front.setting["threads"] == "1"
    assert front.points[0].top1 is not None
    assert front.points[0].top1 > 90
    assert front.at(max_drop=100).seconds == min(point.seconds for point in front.points)
    model.r = front.at(max_drop=5).r
    assert tomevit.Front.load(tmp_path / "front.json") == front


def test_every_mode_can_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "COUNTS", 2)
    model = tiny(**SMALL)
    front = quickly(model, mode="optimized", rounds=1, matchings=["bipartite"])
    assert front.setting["mode"] == "optimized"
    assert all(point.speed_up_range is None for point in front.points)
