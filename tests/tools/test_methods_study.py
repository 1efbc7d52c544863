"""The study of ways to merge at equal time: what is measured stays, and what the page says follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tomevit
from benchmarks.gpu.store import Store
from benchmarks.methods import __main__ as study
from benchmarks.methods import page, work
from benchmarks.methods.compare import Group, groups_of
from benchmarks.methods.rankings import RANKINGS, ranked, ranked_by
from benchmarks.methods.ways import WAYS, Candidate, candidates, schedule_name
from benchmarks.methods.work import Settings, Subject

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
pytest.importorskip("matplotlib", reason="the study draws pictures")

from tomevit.training.digits import load_split

QUICK = ["--weights", "digits_p1.plain", "--limit", "12", "--rounds", "2", "--batch", "2", "--budgets", "1.5x"]


def run(out: Path, *options: str) -> None:
    study.main([*QUICK, "--tune-images", "0", "--out", str(out), *options])


def stored(out: Path) -> dict[str, Any]:
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: row for row in map(json.loads, lines[1:])}


# ------------------------------------------------------------------------------------------------------------ measuring


def test_what_was_measured_stays_whenever_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, allowed = Store.put, 20

    def killed(self: Store, row: dict[str, Any]) -> None:
        if len(self.rows) == allowed:
            raise SystemExit
        put(self, row)

    for allowed in (9, 19):  # amid answers, and after the first round  # noqa: B007
        monkeypatch.setattr(Store, "put", killed)
        with pytest.raises(SystemExit):
            run(tmp_path)
    before = stored(tmp_path)
    assert sum(row["kind"] == "round" for row in before.values()) == 1
    monkeypatch.setattr(Store, "put", put)
    run(tmp_path)
    after = stored(tmp_path)
    assert {key: after[key] for key in before} == before
    assert sum(row["kind"] == "round" for row in after.values()) == 2
    assert {row["way"] for row in after.values() if row["kind"] == "answers"} == {"r = 0", *WAYS}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("rows.jsonl", "points.md", "methods.md", "methods_digits_p1.png")
    }
    assert "### digits_p1.plain" in (tmp_path / "methods.md").read_text(encoding="utf-8")


def test_more_rounds_leave_answers_and_earlier_rounds(tmp_path: Path) -> None:
    run(tmp_path)
    before = stored(tmp_path)
    run(tmp_path, "--rounds", "3")
    new = {key: row for key, row in stored(tmp_path).items() if key not in before}
    assert [row["kind"] for row in new.values()] == ["round"]


def test_minutes_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--minutes", "0")
    assert "steps are left: the same command goes on" in capsys.readouterr().out
    assert {row["kind"] for row in stored(tmp_path).values()} == {"images", "weights"}


def test_answers_are_those_of_the_model(tmp_path: Path) -> None:
    run(tmp_path)
    model, held_out = tomevit.create("digits_p1.plain", pretrained=True), load_split()[1]
    images = tomevit.transform(model)(held_out.images[:12])
    (row,) = (row for row in stored(tmp_path).values() if row.get("way") == "redundant")
    with torch.inference_mode():
        answers = model(images, r="1.5x redundant").argmax(1)
    assert row["classes"] == "".join(map(str, answers.tolist()))
    assert schedule_name(model, json.loads(row["schedule"])) == row["schedule"]


def test_the_search_sees_no_image_that_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def searched(model: Any, images: torch.Tensor, **_: Any) -> Any:
        seen.append(images)

        def at(speed_up: float) -> Any:
            if speed_up > 1.5:
                raise ValueError
            return SimpleNamespace(r=[16, "8 redundant", 0, 0])

        return SimpleNamespace(at=at, points=[SimpleNamespace(r=0), SimpleNamespace(r=["8 pitome"])], note="")

    monkeypatch.setattr(tomevit, "tune", searched)
    run(tmp_path, "--tune-images", "64")
    held_out = Subject("digits_p1.plain", Settings()).images.flatten(1)
    (images,) = seen
    assert len(images) == 64
    assert not (images.flatten(1)[:, None] == held_out).all(2).any()
    tuned = [row["schedule"] for row in stored(tmp_path).values() if row.get("way") == "tuned"]
    assert tuned == ['[16, "8 redundant", 0, 0]', '["8 pitome", 0, 0, 0]']


def test_weights_are_those_of_a_digits_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tomevit.save(tomevit.create("deit_ti16", img_size=32), path)
    with pytest.raises(SystemExit):
        study.main(["--weights", str(path), "--out", str(tmp_path / "out")])
    assert "is of deit_ti16, and the study is of digits_p1 and digits_p2" in capsys.readouterr().err


def test_each_way_has_its_budgets_once() -> None:
    found = candidates(tomevit.create("digits_p1"))
    assert {each.way for each in found} == {"r = 0", *WAYS}
    assert [each.budget for each in found if each.way == "deferred"] == ["1.25x", "1.5x"]  # no more can be had
    assert [each.budget for each in found if each.way == "grid"] == ["1.25x", "1.75x"]  # the others are these


def test_rankings_change_what_merges_as_long_as_they_last() -> None:
    subject = Subject("digits_p1.plain", Settings(limit=12, rankings=True))
    assert [each.ranking for each in ranked([Candidate("diffrate", "2x", "2x diffrate")])] == [*RANKINGS]
    usual = subject.log_probabilities("2x diffrate")
    with ranked_by("norm of the token"):
        other = subject.log_probabilities("2x diffrate")
    assert not torch.equal(usual, other)
    assert torch.equal(usual, subject.log_probabilities("2x diffrate"))
    timed = work.waiting(Store(Path("nowhere"), {}), [subject], Settings(tune_images=0, rankings=True))[-1]
    assert (
        timed.label
        == f"digits_p1: rounds of {len({schedule_name(subject.model, c.r) for c in subject.candidates})} schedules"
    )


# ------------------------------------------------------------------------------------------------------------ comparing

IMAGES = 200


def rows_of(
    ways: dict[str, list[tuple[float, int]]], *, files: int = 1, rounds: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows as the study stores them.

    Args:
        ways: for each its points, the speed-up and how many images are wrong; other images at each point.
    """
    rows: list[dict[str, Any]] = [{"key": "images/digits/200", "kind": "images", "classes": "1" * IMAGES}]
    seconds = {"[0]": 1.0}
    for file in range(files):
        about = {"kind": "weights", "group": "model.plain", "architecture": "model", "file": f"seed{file}"}
        rows.append({"key": f"weights/{file}", "weights": str(file), **about})
        start = 0
        for way, points in {"r = 0": [(1.0, 0)], **ways}.items():
            for i, (speed_up, wrong) in enumerate(points):
                schedule = "[0]" if way == "r = 0" else f"{way} {i}"
                seconds[schedule] = 1 / speed_up
                wrong += file
                classes = "1" * start + "2" * wrong + "1" * (IMAGES - start - wrong)
                start += wrong
                rows.append(
                    {"key": f"answers/{file}/{schedule}", "kind": "answers", "weights": str(file), "way": way}
                    | {"images": "digits/200", "budget": "0" if way == "r = 0" else str(i), "schedule": schedule}
                    | {"tokens": 9, "flop_ratio": speed_up, "kl": wrong / 100, "classes": classes}
                )
    about = {"kind": "round", "architecture": "model", "batch": 10}
    return rows + [{"key": f"round/{i}", **about, "seconds": seconds} for i in range(rounds)]


def group_of(ways: dict[str, list[tuple[float, int]]], **options: int) -> Group:
    (group,) = groups_of(rows_of(ways, **options))
    return group


def test_what_lies_between_two_schedules_is_a_share_of_the_images_by_each() -> None:
    group = group_of({"bipartite": [(1.25, 10), (2.0, 40)]})
    places = group.places["bipartite"]
    assert places[1.25].top1 == pytest.approx(95)
    assert places[2.0].top1 == pytest.approx(80)
    share = (1 / 1.25 - 1 / 1.5) / (1 / 1.25 - 1 / 2)  # of the images by the faster one
    assert places[1.5].top1 == pytest.approx((1 - share) * 95 + share * 80)
    assert places[1.5].kl == pytest.approx((1 - share) * 0.1 + share * 0.4)
    assert group.rate == pytest.approx(10)


def test_what_is_too_slow_is_not_there() -> None:
    group = group_of({"bipartite": [(1.6, 10)], "late": [(1.4, 3)], "random": [(0.8, 3)]})
    assert [[*places] for places in group.places.values()] == [[1.25, 1.5], [1.25], []]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(20, 20, "tied"), (0, 4, "tied"), (4, 0, "tied"), (0, 12, "ahead"), (12, 0, "behind"), (0, 0, "tied")],
)
def test_a_few_images_settle_nothing(ours: int, theirs: int, verdict: str) -> None:
    """McNemar's exact test has p = 0.125 for 4 images of one kind, and less than 0.001 for 12."""
    group = group_of({"bipartite": [(2.0, theirs)], "late": [(2.0, ours)]})
    found = group.difference("late", "bipartite", 2.0)
    assert found.verdict == verdict
    assert found.value == pytest.approx(100 * (theirs - ours) / IMAGES)
    assert found.lower <= found.value <= found.upper


def test_times_that_are_not_known_well_widen_the_interval() -> None:
    rows = rows_of({"bipartite": [(1.6, 0)], "late": [(1.3, 0), (1.9, 60)]})
    (steady,) = groups_of(rows)
    for i, row in enumerate(row for row in rows if row["kind"] == "round"):
        slow = 1.3 if i % 2 else 0.7
        row["seconds"] = {name: value * (slow if "late" in name else 1) for name, value in row["seconds"].items()}
    (unsteady,) = groups_of(rows)
    first, second = (each.difference("late", "bipartite", 1.5) for each in (steady, unsteady))
    assert second.upper - second.lower > 1.2 * (first.upper - first.lower)


def test_files_of_one_kind_are_seeds() -> None:
    group = group_of({"bipartite": [(2.0, 10)]}, files=2)
    assert group.places["bipartite"][2.0].by_file == pytest.approx((95, 94.5))
    assert group.places["bipartite"][2.0].top1 == pytest.approx(94.75)
    assert "99.75 [99.50–100.00] % over 2 files" in page.section(SETTING, [group])
    assert "94.75 [94.50–95.00]" in page.points([group])


def test_a_curve_has_the_points_that_all_files_have() -> None:
    rows = rows_of({"tuned": [(1.5, 10), (2.0, 40)]}, files=2)
    (group,) = groups_of([row for row in rows if row["key"] != "answers/1/tuned 1"])
    assert len(page._curves(group, ["tuned"])["tuned"]) == 2  # r = 0, and one point


def test_schedules_that_came_later_are_compared_in_their_own_rounds() -> None:
    rows = rows_of({"bipartite": [(2.0, 10)], "late": [(2.0, 10)]})
    for i, row in enumerate(row for row in rows if row["kind"] == "round"):
        early = i < 2  # when the machine was slow
        scale = 5 if early else 1
        row["seconds"] = {n: scale * v for n, v in row["seconds"].items() if not (early and "late" in n)}
    (group,) = groups_of(rows)
    assert group.speed_ups["late 0"].value == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------------------------- the page

SETTING = {"device": "a processor", "threads": "1", "torch": "2", "python": "3", "tomevit": "0"}


def test_sentences_say_who_wins_by_how_much_and_what_is_a_tie() -> None:
    ways = {"bipartite": [(2.0, 30)], "redundant": [(2.0, 4)], "late": [(2.0, 32)], "random": [(2.0, 60)]}
    said = page.sentences(group_of(ways | {"deferred": [(1.3, 1)]}))[-1]
    assert said.startswith(
        "**2 times** as fast as r = 0: redundant gets the most right, 98.0 %, and is ahead of all others. Least KL: "
        "redundant, 0.040 (constant bipartite: 0.300). Ahead of constant bipartite: redundant by 13.0 points ("
    )
    assert "Behind constant bipartite: random by 15.0 points (" in said
    assert said.endswith("Tied with constant bipartite: late. Not reached by deferred.")


def test_a_tie_of_all_is_called_one() -> None:
    said = page.sentences(group_of({"bipartite": [(1.3, 3)], "late": [(1.3, 2)]}))
    assert "late gets the most right, 99.1 %, tied with all others." in said[0]
    assert "Tied with constant bipartite: all others." in said[0]
    assert said[1:] == ["No way is 1.5, 1.75 or 2 times as fast as r = 0 here."]


def test_the_table_has_a_sign_for_what_differs() -> None:
    text = page.section(SETTING, [group_of({"bipartite": [(2.0, 30)], "redundant": [(2.0, 4)], "late": [(1.3, 2)]})])
    assert "| redundant | 99.2▲ / 0.016 | 98.7▲ / 0.027 | 98.3▲ / 0.034 | 98.0▲ / 0.040 |" in text
    assert "| late | 99.1▲ / 0.017 | – | – | – |" in text
    assert "Measured on a processor, 1 thread" in text


def test_in_short_there_is_a_winner_where_one_is_beyond_chance() -> None:
    ways = {"bipartite": [(1.6, 30)], "redundant": [(1.6, 4)], "late": [(1.6, 9), (2.0, 9)], "random": [(1.3, 1)]}
    text = page.in_short([group_of(ways), group_of({"bipartite": [(1.3, 9)], "late": [(1.3, 8)]})])
    wins, none = text.splitlines()[-2:]
    assert wins.startswith("| model.plain | random +7.6 (")
    assert "| redundant +11.6 (" in wins
    assert wins.endswith("| not reached | not reached |")
    assert none == "| model.plain | none | – | – | – |"


def test_the_page_is_made_from_what_is_stored() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.written(text, page.section(*page.read())), "stale: python -m benchmarks.methods --store"


def test_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    shown = tmp_path / "methods.md"
    shown.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", shown)
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    study.main([*QUICK, "--tune-images", "0", "--store"])
    text = shown.read_text(encoding="utf-8")
    assert text == page.written(text, page.section(*page.read(tmp_path / "results")))
    assert "### digits_p1.plain" in text
    assert (tmp_path / "images" / "methods_digits_p1.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="methods: start"):
        page.written("no marks", "")
