"""The benchmark: what it compares, what it says, and what it does when something comes between."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tomevit.measure.bench
import tomevit.measure.bounds
from benchmarks.peers import timm
from tests.helpers import images_for, randomise, tiny
from tests.tasks.test_cli import run
from tomevit import flops
from tomevit.config import Config, Figure
from tomevit.measure.bench import Candidate, Comparison, Fidelity, Row, candidates, compare, suggest, sweep, timm_twin
from tomevit.measure.bounds import Bounds, Limits, bounds
from tomevit.measure.defaults import default_r
from tomevit.measure.published import Expected, published_by_schedule
from tomevit.measure.timing import Quartiles, Turn, interleave, ratio_interval, turns
from tomevit.schedule import format_schedule


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of memory takes a large copy; where the figure does not matter, a small one will do."""
    monkeypatch.setattr(tomevit.measure.bounds, "COPIED", 2**20)


# -------------------------------------------------------------------------------------------------------------- flops


class CountProducts(TorchDispatchMode):
    """torch's FlopCounterMode hooks onto every module, and a layer with hooks is called whole."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, kind, aten = func(*args, **(kwargs or {})), func._overloadpacket, torch.ops.aten
        if kind in (aten.addmm, aten.mm, aten.convolution):
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"pool": "avg"}], ids=["token", "distilled", "avg"])
@pytest.mark.parametrize("r", [0, 5])
def test_computed_flops_are_those_of_the_linear_layers_that_run(fields: dict[str, Any], r: int) -> None:
    model = tiny(r, **fields, num_classes=0)
    config, counts = model.config, model.token_counts()
    products = CountProducts()
    with torch.no_grad(), products:
        model(images_for(model, 1))
    linear = products.flops // 2
    read = counts[-2] if config.pool == "avg" else 1 + config.dist_token
    attention = sum(n * n for n in counts[:-2]) + counts[-2] * read
    assert flops(config, r, computed=True) == linear + 2 * attention * config.embed_dim


def test_flops_computed_and_published_differ_where_the_class_token_is_read() -> None:
    by_token, by_mean = Config(), Config(pool="avg")
    assert flops(by_mean, 16, computed=True) == flops(by_mean, 16)
    ratio = flops(by_token, computed=True) / flops(by_token, 16, computed=True)
    assert ratio / (flops(by_token) / flops(by_token, 16)) == pytest.approx(0.94, abs=0.005)


# ------------------------------------------------------------------------------------------------------------- timing


def interval(first: list[float], second: list[float]) -> tuple[float, float]:
    found = ratio_interval([first], second)
    assert found is not None
    return found


def test_the_range_of_a_ratio_is_narrow_where_rounds_agree_and_holds_the_truth() -> None:
    draw = random.Random(1)
    steady = [1.0 + 0.01 * draw.random() for _ in range(20)]
    lower, upper = interval([2 * seconds for seconds in steady], steady)  # slow together, fast together
    assert lower > 1.98
    assert upper < 2.02
    assert ratio_interval([[3.0] * 5], [2.0] * 9) is None
    assert ratio_interval([[9.0] * 6, [3.0] * 7], [2.0] * 6) == (1.5, 1.5)
    # Where one of two is the faster by chance, what is drawn anew is that too.
    apart = [[1.0 if i % 2 else 2.0 for i in range(20)], [2.0 if i % 2 else 1.0 for i in range(20)]]
    assert interval(apart[0], [1.0] * 20)[1] == 2.0
    assert ratio_interval(apart, [1.0] * 20) == (1.0, 1.5)
    held = 0
    for _ in range(60):
        first, second = ([mean * (1 + draw.gauss(0, 0.1)) for _ in range(15)] for mean in (1.5, 1.0))
        lower, upper = interval(first, second)
        held += lower <= 1.5 <= upper
        assert upper - lower > 0.03
    assert held >= 50  # of 60; 57 are expected


def test_candidates_take_turns() -> None:
    order: list[str] = []
    found = list(turns({name: partial(order.append, name) for name in "abc"}, rounds=4, warmup=2))
    assert [turn.key for turn in found] == order
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert [turn.counts for turn in found] == [False] * 6 + [True] * 12
    assert interleave({"nap": lambda: time.sleep(0.01)}, rounds=3)["nap"] == pytest.approx(0.01, rel=0.5)


def test_quartiles() -> None:
    assert Quartiles.of([3.0]) == (3.0, 3.0, 3.0)
    assert Quartiles.of([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


# --------------------------------------------------------------------------------------------------------- comparison


def test_merge_efficiency_is_over_the_fastest_that_merges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    runs = [("timm", "eager", 0, 10.0), ("timm", "compiled", 0, 4.0), ("tomevit", "eager", 0, 8.0)]
    runs += [("tomevit", "eager", 8, 2.5)]
    those = [Candidate(*name, lambda images: None, 1, None) for *name, _ in runs]

    def clock(calls: Any, *, rounds: int, device: object) -> Iterator[Turn[int]]:
        return (Turn(i, runs[i][-1] + change, True) for i in calls for change in (-1.0, 0.0, 1.5))

    monkeypatch.setattr(tomevit.measure.bench, "turns", clock)
    result = compare(those, model, batch=2)
    merged = result.rows[-1]
    assert result.best is result.rows[1]
    assert [row.merges for row in result.rows] == [False, False, False, True]
    assert [row.speed_up for row in result.rows] == [0.4, 1.0, 0.5, 1.6]
    assert merged.images_per_second == 2 / 2.5
    assert merged.seconds == (2.0, 2.5, 3.25)
    ratio = flops(model.config, computed=True) / flops(model.config, 8, computed=True)
    assert merged.efficiency == pytest.approx(1.6 / ratio)
    assert merged.tokens == model.token_counts(8)[-1]


def test_timms_model_has_the_very_weights_and_answers_alike() -> None:
    model = tomevit.create("deit_ti16", img_size=32, num_classes=5)
    randomise(model)
    theirs, images = timm_twin(model), images_for(model)
    assert isinstance(theirs, timm.models.VisionTransformer)
    assert {p.data_ptr() for p in theirs.parameters()} == {p.data_ptr() for p in model.parameters()}
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of a model is for the tests of execution."""
    real = torch.compile

    def compile_(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs | {"backend": "eager", "mode": None})

    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("mode", tomevit.measure.bench.MODES)
def test_every_mode_runs_the_model_on_its_weights_and_leaves_it_as_it_is(mode: str) -> None:
    model = tiny(depth=1, pool="avg")
    images = images_for(model)
    found = candidates(model, [3], modes=[mode])
    assert [each.r for each in found] == [0, 3]
    with torch.inference_mode():
        for each in found:
            torch.testing.assert_close(each.forward(images), model(images, each.r))
        if mode != "optimized":  # which folds weights into others, and has its own
            model.head.weight.zero_()
            model.head.bias.fill_(3.0)
            assert all(each.forward(images).eq(3).all() for each in found)
    assert not [block for block in model.blocks if block._compiled_call_impl]


def row(r: int, speed_up: float) -> Row:
    config = Config()
    cost, ratio = flops(config, r) / 1e9, flops(config) / flops(config, r)
    return Row(
        "tomevit",
        "eager",
        r,
        r,
        (r,) * config.depth,
        1,
        cost,
        cost,
        Quartiles(1, 1, 1),
        1.0,
        speed_up,
        (speed_up, speed_up),
        ratio,
        ratio,
        r > 0,
    )


def published(r: int, top1: float) -> tuple[tuple[int | str, ...], Expected]:
    return (r,) * Config().depth, Expected(r, top1, "a paper")


@pytest.mark.parametrize(
    ("speed_ups", "figures", "target", "r", "says"),
    [
        ({8: 0.7, 16: 0.9}, {13: 80.0}, None, 0, "does not pay here: the best, r = 16, has 0.90"),
        ({8: 0.7, 16: 0.9}, {}, 1.5, 0, "does not pay"),
        (
            {8: 1.2, 16: 1.8},
            {},
            None,
            None,
            "no r is suggested: the accuracy of those that pay is not known; measure it",
        ),
        ({8: 1.2, 16: 1.8}, {0: 84.0, 13: 82.5}, None, None, "not known, and is published for r = 13; measure it"),
        ({8: 1.2, 16: 1.8}, {}, 1.5, 16, "its accuracy is not published: measure it"),
        ({8: 1.2, 13: 1.5, 16: 1.8}, {0: 84.0, 13: 82.5}, None, 13, "82.50 % top-1 against 84.00 % at r = 0"),
        ({8: 1.2, 13: 1.5, 16: 1.8}, {}, 1.2, 8, "reaches 1.2 times: 1.20 times"),
        ({8: 1.2, 13: 1.5, 16: 1.8}, {}, 1.25, 13, "1.50 times"),
        ({8: 1.2, 13: 1.5, 16: 1.8}, {}, 2.5, 16, "2.5 times is not reached; the most is 1.80"),
        ({}, {}, None, 0, "nothing that merges"),
    ],
)
def test_suggestions(
    speed_ups: dict[int, float], figures: dict[int, float], target: float | None, r: int | None, says: str
) -> None:
    rows = [row(0, 1.0), *(row(*pair) for pair in speed_ups.items())]
    known = [published(r, top1) for r, top1 in figures.items()]
    found = suggest(rows, known, target)
    assert found.r == r
    assert says in found.why


@pytest.mark.parametrize(
    ("kept", "target", "r", "says"),
    [
        ({8: 99.5, 13: 99.0, 16: 90.0}, None, 13, "loses 1 point at most: 1.50 times the best unmerged"),
        ({8: 97.0, 13: 98.0, 16: 90.0}, None, 13, "all that pay lose more than 1 point; the most faithful has 1.50"),
        ({8: 97.0, 13: 98.0, 16: 98.5}, 1.2, 16, "the most faithful that reaches 1.2 times: 1.80"),
        ({8: 97.0}, 1.5, 13, "the least merging that reaches 1.5 times: 1.50"),
        ({16: 99.5}, 2.5, 16, "not reached; the most is 1.80 times the best unmerged (tomevit eager), for 99.50 %"),
        ({24: 100.0}, None, 8, "the r whose accuracy is published: 1.20"),
        ({16: 99.5}, None, 16, "for 99.50 % agreement against 100.00 % at r = 0, on 64 images"),
    ],
)
def test_what_was_measured_goes_before_what_is_published(
    kept: dict[int, float], target: float | None, r: int, says: str
) -> None:
    rows = [row(0, 1.0), row(8, 1.2), row(13, 1.5), row(16, 1.8)]
    fidelity = {(at,) * Config().depth: Fidelity(percent, 100.0, "agreement", 64) for at, percent in kept.items()}
    found = suggest(rows, [published(8, 80.0)], target, fidelity)
    assert found.r == r
    assert says in found.why


def test_suggestions_know_figures_by_what_happens_in_each_block() -> None:
    figures = (Figure(r="diffrate-2.9g", top1=82.0, source="a paper"), Figure(r=13, top1=83.0, source="a paper"))
    card = replace(tomevit.card("deit_s16"), figures=figures)
    known = published_by_schedule(card)
    (preset,) = [preset for preset in card.presets if preset.name == "diffrate-2.9g"]
    assert [schedule for schedule, _ in known] == [preset.r, (13,) * 12]
    unlisted = row(16, 1.9)._replace(r=[16, "8 pitome"], plain=[16, "8 pitome"])
    for r in ("diffrate-2.9g", list(preset.r)):  # by its name, and block by block
        named = row(8, 1.4)._replace(r=r, plain=list(preset.r), schedule=preset.r)
        assert suggest([row(0, 1.0), named, unlisted], known).r == r
        found = suggest([row(0, 1.0), row(13, 1.5)._replace(r="1.9x"), named], known)
        assert (found.r, found.plain) == ("1.9x", 13)
        assert "83.00 % top-1, as published" in found.why
    assert default_r(card) == [8, 13, 16, "diffrate-2.9g"]


def test_words_are_measured_as_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("bench", "deit_ti16", "--img-size", "64", "--no-timm", "--batch", "1", "--rounds", "1")
    words += ("--r", "1.2x", "1.1x late", "1 pitome")
    status, out, _ = run(capsys, *words, "--json", "--target", "1000")
    assert status == 0
    model = tomevit.create("deit_ti16", img_size=64)
    (comparison,) = json.loads(out)["comparisons"]
    assert [row["r"] for row in comparison["rows"]] == [0, "1.2x", "1.1x late", "1 pitome"]
    for row in comparison["rows"]:
        assert row["plain"] == model.plain(row["r"])
        assert row["schedule"] == [step.entry for step in model.steps(row["r"])]
        assert row["tokens"] == model.token_counts(row["r"])[-1]
        assert row["gflops_computed"] == flops(model.config, row["plain"], computed=True) / 1e9
        assert row["merges"] == (row["r"] != 0)
    suggestion = comparison["suggestion"]
    assert suggestion["plain"] == (model.plain(suggestion["r"]) if suggestion["r"] else 0)
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert f"1.2x (r = {model.plain('1.2x')}): " in out
    assert f"1.1x late (r = {format_schedule(model.plain('1.1x late'))}): " in out


def test_default_r_leaves_next_to_nothing_at_most_and_has_what_is_published() -> None:
    assert default_r(tomevit.card("vit_b16")) == [8, 13, 16]
    card = tomevit.card("vit_l16_384")
    assert {figure.r for figure in card.figures} - {0} <= set(default_r(card))
    assert max(default_r(tomevit.card("vit_h14"))) == 256 // 32


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")],
)
def test_a_batch_that_does_not_fit_ends_that_batch_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(depth=1)
    forward = type(model).forward

    def small_memory(self: Any, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(images) == 4:
            raise error
        return forward(self, images, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", small_memory)
    found = list(sweep(model, [8], batches=[1, 4, 2], rounds=1))
    assert [len(each.rows) for each in found] == [2, 0, 2]
    assert [each.note for each in found] == ["", "a batch of 4 does not fit into the memory of cpu", ""]
    with pytest.raises(ValueError, match="batch of 4 does not fit"):
        tomevit.measure.bench.bench(model, [8], batch=4, rounds=1)


def interrupted_after(count: int) -> Callable[..., Any]:
    """`turns`, in which the user presses Ctrl-C."""
    left = Counter(turns=count)

    def until(*args: Any, **kwargs: Any) -> Any:
        for turn in turns(*args, **kwargs):
            yield turn
            left["turns"] -= 1
            if not left["turns"]:
                before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
                try:
                    signal.raise_signal(signal.SIGINT)
                finally:
                    signal.signal(signal.SIGINT, before)

    return until


def test_an_interrupt_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tomevit.measure.bench, "turns", interrupted_after(14 + 2 * 2 + 5))
    found: list[Comparison] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(iter_into(found, sweep(tiny(depth=1), [8], batches=[1, 2, 3], rounds=5)))
    assert [each.batch for each in found] == [1, 2]
    assert [len(each.rows) for each in found] == [2, 2]
    assert (found[1].rounds, found[1].note) == (2, "interrupted after 2 of 5 rounds")


def iter_into(found: list[Comparison], those: Any) -> list[Comparison]:
    for each in those:
        found.append(each)  # noqa: PERF402
    return []


# ------------------------------------------------------------------------------------------------------------- bounds

LAYERS = Config(embed_dim=256, num_heads=4)


@pytest.fixture(scope="module")
def limits() -> Limits:
    found = Limits("cpu")
    assert min(found.bandwidth, found.overhead, found.fault) > 0  # before a test has copies small
    return found


def bound_by(forward: Callable[[], object], limits: Limits, count: int) -> str:
    taken = interleave({0: forward}, rounds=5)[0]
    work = {"config": LAYERS, "dtype": torch.float32, "tokens": 512}
    return bounds(forward, taken, limits, **work, flops=count, weights=0).bound_by


def test_products_are_bound_by_arithmetic(limits: Limits) -> None:
    x, weight = torch.randn(512, 256), torch.randn(1024, 256)
    assert bound_by(lambda: [F.linear(x, weight) for _ in range(8)], limits, 8 * 512 * weight.numel()) == "arithmetic"


def test_additions_are_bound_by_memory(limits: Limits) -> None:
    x = torch.zeros(2**25)
    assert bound_by(lambda: x.add_(1), limits, 0) == "memory"


def test_many_small_operators_are_bound_by_launches(limits: Limits) -> None:
    x = torch.zeros(1)
    assert bound_by(lambda: [x.add_(1) for _ in range(1000)], limits, 0) == "launches"


def test_memory_fetched_anew_is_bound_by_allocation(limits: Limits) -> None:
    def fetch() -> None:
        torch.empty(2**24, dtype=torch.float32)[::1024].fill_(1)

    assert bound_by(fetch, limits, 0) == "allocation"


def test_an_expanded_tensor_counts_as_what_is_in_memory(limits: Limits) -> None:
    x = torch.zeros(1).expand(2**28)
    work = {"config": LAYERS, "dtype": torch.float32, "tokens": 512, "flops": 0}
    found = bounds(lambda: x.narrow(0, 0, 1).clone(), 1e-3, limits, **work, weights=0)
    assert found.memory is not None
    assert found.memory < 0.01


def test_what_binds_is_not_told_by_a_probe_that_was_disturbed() -> None:
    measured = row(0, 1.0)
    likely, impossible = Bounds(0.9, 0.1, 0.2, 0.0, 1e9, 1e9), Bounds(30.49, 0.1, 10.83, 0.0, 1e9, 1e9)
    first, *_ = tomevit.measure.bench._binding([measured._replace(bounds=likely)])
    assert "is bound by arithmetic (arithmetic 90 %, memory 10 %" in first
    (told,) = tomevit.measure.bench._binding([measured._replace(bounds=impossible)])
    assert told.startswith("what binds cannot be told: the device was busy")
    assert "arithmetic 3049 %" in told


# ------------------------------------------------------------------------------------------------------------- command

SMALL = ("bench", "deit_ti16", "--img-size", "32", "--rounds", "2")


def test_json_has_every_comparison_and_its_setting(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *SMALL, "--json", "--timm", "--batch", "1", "2", "--r", "1", "1,-1", "--no-timm")
    result = json.loads(out)
    assert status == 0
    assert {"schema", "model", "img_size", "rounds", "device", "threads", "torch", "python", "tomevit"} < result.keys()
    assert [(each["dtype"], each["batch"]) for each in result["comparisons"]] == [("float32", 1), ("float32", 2)]
    for comparison in result["comparisons"]:
        rows = comparison["rows"]
        assert [row["r"] for row in rows] == [0, 1, {"mean": 1, "inflection": -1.0}]
        assert rows[0]["speed_up"] == 1.0
        for row in rows:
            assert row["seconds"]["lower"] <= row["seconds"]["median"] <= row["seconds"]["upper"]
            assert row["flop_ratio"] == pytest.approx(rows[0]["gflops"] / row["gflops"])
            assert row["efficiency"] == pytest.approx(row["speed_up"] / row["flop_ratio_computed"])
            assert row["bounds"]["bound_by"] in tomevit.measure.bounds.ADVICE


def test_markdown_and_a_plot_against_timm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture, table = tmp_path / "bench.png", tmp_path / "bench.md"
    wanted = ("--markdown", "-o", str(table), "--plot", str(picture), "--target", "9", "--dtype", "float32", "bfloat16")
    status, out, err = run(capsys, *SMALL, *wanted, "--r", "1", "--batch", "2")
    assert (status, out) == (0, "")
    assert len(err.splitlines()) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.md", "bench.png"]
    text = table.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * (2 + 3)
    assert len({line.count("|") for line in lines}) == 1
    assert f"timm {timm.__version__}" in text
    for says in ("torch", "thread", "32x32", "**bfloat16, batch 2**", "timm eager", "bound by", "suggested: r = "):
        assert says in text


def test_where_nothing_can_be_measured_the_status_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: Any, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, *args, **kwargs)

    forward = tomevit.VisionTransformer.forward
    monkeypatch.setattr(tomevit.VisionTransformer, "forward", no_memory)
    status, out, err = run(capsys, *SMALL, "--json", "--no-timm", "--r", "1", "--batch", "2")
    assert json.loads(out)["comparisons"][0]["rows"] == []
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("tomevit: nothing was measured")
    assert run(capsys, *SMALL, "--no-timm", "--r", "1", "--batch", "1", "2")[0] == 0


def test_a_file_is_measured_and_text_is_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tomevit.save(tiny(), tmp_path / "mine.safetensors")
    status, out, _ = run(
        capsys, "bench", "--rounds", "1", "--batch", "1", "--r", "3", str(tmp_path / "mine.safetensors")
    )
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("tomevit eager ")][:2] == [
        ["tomevit", "eager", "*"],
        ["tomevit", "eager", "3"],
    ]
    assert "Not compared with timm's model: timm has no name for this model." in out


def test_ctrl_c_prints_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tomevit.measure.bench, "turns", interrupted_after(2 * 2 + 5))
    status, out, err = run(capsys, *SMALL, "--no-timm", "--batch", "1", "2", "--r", "1", "--rounds", "9")
    assert status == 130
    assert err.strip() == "tomevit: interrupted"
    assert "interrupted after 2 of 9 rounds" in out
    assert len([line for line in out.splitlines() if line.startswith("tomevit eager ")]) == 2


@pytest.mark.usefixtures("no_inductor")
def test_the_compiled_model_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    tomevit.save(tiny(depth=1), path)
    status, out, _ = run(capsys, "bench", str(path), "--batch", "2", "--rounds", "1", "--r", "0", "--compile")
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("tomevit")]
    assert [row[:4] for row in rows[:1]] == [["tomevit", "compiled", "*", "0"]]


def test_a_place_that_cannot_be_written_is_told_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, *SMALL, "--rounds", "1000000", "-o", str(tmp_path))
    assert (status, out) == (2, "")
    assert str(tmp_path) in err
