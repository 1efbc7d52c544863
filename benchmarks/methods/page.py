"""What came of the study, in words, tables and pictures; all from what is stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.gpu.store import ROWS
from benchmarks.methods.compare import Answers, Difference, Group, groups_of
from benchmarks.methods.ways import BASELINE, TARGETS, TUNED, UNMERGED
from tomevit.cli.options import machine, markdown, with_range
from tomevit.errors import join_with_or
from tomevit.output import new_file
from tomevit.tasks import plots

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "methods"
PAGE = ROOT / "docs" / "methods.md"
START, END = "<!-- methods: start -->", "<!-- methods: end -->"
NOTHING = "Nothing is stored yet: `python -m benchmarks.methods --store` measures it."
#: What the cells of a table say beside a number.
SIGNS = {"ahead": "▲", "behind": "▼", "tied": ""}


def read(folder: Path = RESULTS) -> tuple[dict[str, Any], list[Group]]:
    """What a folder has: the setting it was measured in, and the groups; nothing of one that is not there."""
    if not (folder / ROWS).exists():
        return {}, []
    setting, *rows = (json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines())
    return setting["setting"], groups_of(rows)


def section(setting: dict[str, Any], groups: Sequence[Group]) -> str:
    """What stands on the page: for each group which way wins, and one table of all."""
    if not groups:
        return NOTHING
    parts = [_about(setting, groups)]
    for group in groups:
        parts += [f"### {group.name}", _of_files(group), *sentences(group)]
    parts += ["### All at equal time", _equal_time(groups)]
    pictures = dict.fromkeys(group.architecture for group in groups)
    parts += [f"![{name}: accuracy and KL over throughput](images/{picture_name(name)})" for name in pictures]
    return "\n\n".join(parts)


def written(page: str, text: str) -> str:
    """The page with this text between its marks."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page has no {END if start else START}")
    return f"{before}{START}\n{text}\n{END}{after}"


def picture_name(architecture: str) -> str:
    return f"methods_{architecture}.png"


def _about(setting: dict[str, Any], groups: Sequence[Group]) -> str:
    architectures = {group.architecture: group for group in groups}
    rates = "; ".join(f"{name} {group.rate:.0f}, {group.rounds} rounds" for name, group in architectures.items())
    return f"Measured {machine(setting)}. Images per second at r = 0: {rates}."


def _of_files(group: Group) -> str:
    plain = [file[UNMERGED, "0"].top1 for file in group.answers]
    if len(plain) == 1:
        accuracy = f"{plain[0].value:.2f} % ({plain[0].lower:.2f} to {plain[0].upper:.2f})"
    else:
        accuracy = f"{_mean_and_range([each.value for each in plain], 2)} % over {len(plain)} files"
    return f"{group.num_images} held-out images, of which the model has {accuracy} right at r = 0."


# ------------------------------------------------------------------------------------------------------------ sentences


def sentences(group: Group) -> list[str]:
    """For each speed-up: which way has the most right, and which differ from the baseline beyond chance."""
    found, beyond = [], []
    for target in TARGETS:
        there = {way: places[target] for way, places in group.places.items() if target in places}
        if not there:
            beyond.append(f"{target:g}")
            continue
        parts = [f"**{target:g} times** as fast as r = 0: {_winner(group, target)}"]
        if BASELINE in there:
            parts.append(_against_baseline(group, target))
        else:
            parts.append(f"Constant {BASELINE} is not so fast.")
        if missing := [way for way in group.ways if way not in there and way != BASELINE]:
            parts.append(f"Not so fast: {', '.join(missing)}.")
        found.append(" ".join(parts))
    return found + ([f"No way is {join_with_or(beyond)} times as fast as r = 0 here."] if beyond else [])


def _winner(group: Group, target: float) -> str:
    there = [way for way, places in group.places.items() if target in places]
    best = max(there, key=lambda way: group.places[way][target].top1)
    tied = [way for way in there if way != best and group.difference(best, way, target).verdict == "tied"]
    top1 = f"{group.places[best][target].top1:.1f} %"
    if not tied:
        return f"{called(best)} wins, with {top1} right{', ahead of all others' if len(there) > 1 else ''}."
    most = "a tie of all" if len(tied) == len(there) - 1 else f"a tie with {', '.join(map(called, tied))}"
    return f"{called(best)} has the most right, {top1}, in {most}."


def _against_baseline(group: Group, target: float) -> str:
    verdicts: dict[str, list[str]] = {"ahead": [], "behind": [], "tied": []}
    differences = {
        way: group.difference(way, BASELINE, target)
        for way, places in group.places.items()
        if way != BASELINE and target in places
    }
    for way, each in sorted(differences.items(), key=lambda item: -item[1].value):
        verdicts[each.verdict].append(called(way) if each.verdict == "tied" else f"{called(way)} by {_points(each)}")
    parts = []
    for verdict, word in (("ahead", "Ahead of"), ("behind", "Behind")):
        if verdicts[verdict]:
            parts.append(f"{word} constant {BASELINE}: {'; '.join(verdicts[verdict])}.")
    if verdicts["tied"]:
        parts.append(f"Tied with constant {BASELINE}: {', '.join(verdicts['tied'])}.")
    return " ".join(parts)


def called(way: str) -> str:
    """What a way is called in a sentence."""
    return f"constant {way}" if way == BASELINE else way


def _points(each: Difference) -> str:
    sign = 1 if each.value >= 0 else -1
    ends = sorted((sign * each.lower, sign * each.upper))
    files = sorted(sign * value for value in each.by_file)
    over_files = f"; file by file {files[0]:.1f} to {files[-1]:.1f}" if len(files) > 1 else ""
    return f"{abs(each.value):.1f} points ({ends[0]:.1f} to {ends[1]:.1f}{over_files})"


# --------------------------------------------------------------------------------------------------------------- tables


def _equal_time(groups: Iterable[Group]) -> str:
    """Each way's accuracy and KL at each speed-up."""
    groups = list(groups)
    reached = [t for t in TARGETS if any(t in places for group in groups for places in group.places.values())]
    columns = ["weights", "way", *(f"{target:g} times" for target in reached)]
    rows = [
        [group.name, called(way), *(_cell(group, way, target) for target in reached)]
        for group in groups
        for way in group.ways
    ]
    legend = (
        "Top-1 in per cent, and behind the stroke the KL divergence from r = 0 in nats. ▲ ahead of and ▼ behind "
        f"constant {BASELINE} on the same images, at 95 % confidence; without a sign it is a tie, or that one itself; "
        "a dash: not so fast."
    )
    return "\n".join([*markdown(columns, rows), "", legend])


def _cell(group: Group, way: str, target: float) -> str:
    if target not in group.places[way]:
        return "–"
    place = group.places[way][target]
    sign = ""
    if way != BASELINE and target in group.places.get(BASELINE, {}):
        sign = SIGNS[group.difference(way, BASELINE, target).verdict]
    return f"{place.top1:.1f}{sign} / {place.kl:.3f}"


def points(groups: Iterable[Group]) -> str:
    """Every schedule that was measured, and every ranking that was tried."""
    columns = ("weights", "way", "budget", "tokens left", "FLOPs", "speed-up", "images/s", "top-1 %", "agree %", "KL")
    rows = []
    for group in groups:
        for key in dict.fromkeys(key for file in group.answers for key in file):
            those = [file[key] for file in group.answers if key in file]
            speeds = [group.speed_ups[each.schedule] for each in those if each.schedule in group.speed_ups]
            fast = ["", ""]
            if speeds and "by:" not in key[0]:
                value = fmean(each.value for each in speeds)
                fast = [with_range(value, speeds[0].interval if len(speeds) == 1 or _same(those) else None, 2)]
                fast.append(f"{group.rate * value:.0f}")
            first = those[0]
            rows.append(
                [
                    group.name,
                    *key,
                    first.tokens if _same(those) else "",
                    f"{fmean(each.flop_ratio for each in those):.2f}",
                    *fast,
                    _accuracy(those),
                    f"{fmean(each.agreement for each in those):.1f}",
                    f"{fmean(each.kl for each in those):.4f}",
                ]
            )
    return "\n".join(markdown(columns, rows)) + "\n"


def _same(those: Sequence[Answers]) -> bool:
    return len({each.schedule for each in those}) == 1


def _accuracy(those: Sequence[Answers]) -> str:
    """With Wilson's interval of one file; of several the mean and range."""
    if len(those) > 1:
        return _mean_and_range([each.top1.value for each in those], 2)
    top1 = those[0].top1
    return with_range(top1.value, (top1.lower, top1.upper), 2)


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"


# -------------------------------------------------------------------------------------------------------------- picture


def draw(path: Path, setting: dict[str, Any], groups: Sequence[Group]) -> None:
    """Accuracy and KL over throughput, a column for each group of one architecture.

    In colour are the baseline, what was tuned, and the two other ways that have most right on the mean.
    """
    marked = _marked(groups)
    panels = {group.name: _curves(group, marked) for group in groups}
    first = groups[0]
    note = (
        f"{first.num_images} held-out images; {first.architecture}, {machine(setting)}. Medians of {first.rounds} "
        "rounds. Dotted: so many times as fast as r = 0."
    )
    rulers = {f"{target:g}×": first.rate * target for target in TARGETS}
    with new_file(path) as draft:
        plots.fidelity_throughput(draft, panels, [called(way) for way in marked], rulers, note)


def _marked(groups: Sequence[Group]) -> list[str]:
    """The ways that stand out in a picture."""

    def mean(way: str) -> float:
        """Of what is missing, as the worst of the others."""
        found = []
        for group in groups:
            for target in TARGETS:
                there = [places[target].top1 for places in group.places.values() if target in places]
                if there:
                    place = group.places.get(way, {}).get(target)
                    found.append(min(there) if place is None else place.top1)
        return fmean(found) if found else 0.0

    ways = list(dict.fromkeys(way for group in groups for way in group.ways))
    fixed = [way for way in (BASELINE, TUNED) if way in ways]
    others = sorted((way for way in ways if way not in fixed), key=mean, reverse=True)
    return [*fixed, *others[: 4 - len(fixed)]]


def _curves(group: Group, marked: Sequence[str]) -> dict[str, list[plots.Fidelity]]:
    """For each way, marked ones last, its points by rising throughput, means over the files."""
    found: dict[str, list[plots.Fidelity]] = {}
    for way in sorted(group.ways, key=lambda way: marked.index(way) if way in marked else -1):
        keys = dict.fromkeys(key for file in group.answers for key in file if key[0] in (UNMERGED, way))
        curve = []
        for key in keys:
            those = [file[key] for file in group.answers if key in file and file[key].schedule in group.speed_ups]
            if those:
                curve.append(
                    plots.Fidelity(
                        group.rate * fmean(group.speed_ups[each.schedule].value for each in those),
                        fmean(each.top1.value for each in those),
                        fmean(each.kl for each in those),
                    )
                )
        found[called(way)] = sorted(curve)
    return found
