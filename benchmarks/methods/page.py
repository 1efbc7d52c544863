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
from tomevit.cli.options import machine, with_range
from tomevit.cli.tables import Column, Table
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
MOST_NAMED = 4  # in a sentence


def read(folder: Path = RESULTS) -> tuple[dict[str, Any], list[Group]]:
    """What a folder has: the setting, and the groups, by architecture; nothing of one that is not there."""
    if not (folder / ROWS).exists():
        return {}, []
    setting, *rows = (json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines())
    groups = groups_of(rows)
    architectures = list(dict.fromkeys(group.architecture for group in groups))
    return setting["setting"], sorted(groups, key=lambda group: architectures.index(group.architecture))


def section(setting: dict[str, Any], groups: Sequence[Group]) -> str:
    """What stands on the page: in short which way wins, pictures, and for each group a table and sentences."""
    if not groups:
        return NOTHING
    parts = [_about(setting, groups), in_short(groups)]
    pictures = dict.fromkeys(group.architecture for group in groups)
    parts += [f"![{name}: accuracy and KL over throughput](images/{picture_name(name)})" for name in pictures]
    for i, group in enumerate(groups):
        parts += [f"### {group.name}", _of_files(group), *([] if i else [LEGEND]), _equal_time(group)]
        parts += sentences(group)
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
    return f"{group.num_images} held-out images, of which the model gets {accuracy} right at r = 0."


# ------------------------------------------------------------------------------------------------------------ sentences


def sentences(group: Group) -> list[str]:
    """For each speed-up: which way has the most right, and which differ from the baseline beyond chance."""
    found, beyond = [], []
    for target in TARGETS:
        there = [way for way, places in group.places.items() if target in places]
        if not there:
            beyond.append(f"{target:g}")
            continue
        parts = [_winner(group, there, target), _least_moved(group, there, target)]
        if BASELINE in there and len(there) > 1:
            parts.append(_against_baseline(group, there, target))
        missing = [called(way) for way in group.ways if way not in there]
        if len(there) < len(missing):
            parts.append(f"Only {_list(map(called, there))} {'reaches' if len(there) == 1 else 'reach'} it.")
        elif missing:
            parts.append(f"Not reached by {_list(missing)}.")
        found.append(f"**{target:g} times** as fast as r = 0: {' '.join(parts)}")
    return found + ([f"No way is {join_with_or(beyond)} times as fast as r = 0 here."] if beyond else [])


def in_short(groups: Sequence[Group]) -> str:
    """A table: at each speed-up the way that is furthest ahead of the baseline, if one is beyond chance."""
    reached = [target for target in TARGETS if _is_reached(groups, target)]
    rows = [[group.name, *(_furthest_ahead(group, target) for target in reached)] for group in groups]
    table = Table([Column("furthest ahead"), *(Column(f"{target:g} times") for target in reached)], rows)
    return "\n".join(
        [
            f"The way furthest ahead of constant {BASELINE}, in points of accuracy, where that is beyond chance:",
            "",
            *table.markdown(),
        ]
    )


def _furthest_ahead(group: Group, target: float) -> str:
    there = [way for way, places in group.places.items() if target in places]
    if BASELINE not in there:
        return "not reached" if there else "–"
    differences = _over_baseline(group, there, target)
    ahead = {way: each for way, each in differences.items() if each.verdict == "ahead"}
    if not ahead:
        return "none"
    way = max(ahead, key=lambda way: ahead[way].value)
    return f"{way} +{ahead[way].value:.1f} ({ahead[way].lower:.1f} to {ahead[way].upper:.1f})"


def _over_baseline(group: Group, there: Sequence[str], target: float) -> dict[str, Difference]:
    return {way: group.difference(way, BASELINE, target) for way in there if way != BASELINE}


def _winner(group: Group, there: Sequence[str], target: float) -> str:
    best = max(there, key=lambda way: group.places[way][target].top1)
    others = [way for way in there if way != best]
    tied = [way for way in others if group.difference(best, way, target).verdict == "tied"]
    behind = [way for way in others if way not in tied]
    start = f"{called(best)} gets the most right, {group.places[best][target].top1:.1f} %"
    if not others:
        return f"{start}."
    if not tied:
        return f"{start}, and is ahead of all others."
    if not behind:
        return f"{start}, tied with all others."
    if len(behind) < len(tied):
        return (
            f"{start}; only {_list(map(called, behind))} {'is' if len(behind) == 1 else 'are'} behind it beyond chance."
        )
    return f"{start}, tied with {_list(map(called, tied))}."


def _least_moved(group: Group, there: Sequence[str], target: float) -> str:
    best = min(there, key=lambda way: group.places[way][target].kl)
    beside = ""
    if best != BASELINE and BASELINE in there:
        beside = f" ({called(BASELINE)}: {group.places[BASELINE][target].kl:.3f})"
    return f"Least KL: {called(best)}, {group.places[best][target].kl:.3f}{beside}."


def _against_baseline(group: Group, there: Sequence[str], target: float) -> str:
    differences = _over_baseline(group, there, target)
    ranked = sorted(differences.items(), key=lambda item: -item[1].value)
    parts = []
    for verdict, word in (("ahead", "Ahead of"), ("behind", "Behind")):
        if those := [f"{way} by {_points(each)}" for way, each in ranked if each.verdict == verdict]:
            parts.append(f"{word} {called(BASELINE)}: {'; '.join(those)}.")
    if tied := [way for way, each in ranked if each.verdict == "tied"]:
        parts.append(f"Tied with {called(BASELINE)}: {_all_or_names(tied, len(ranked))}.")
    return " ".join(parts)


def _all_or_names(tied: Sequence[str], compared: int) -> str:
    """The table's signs name them: a sentence has room for a few."""
    if len(tied) == compared:
        return "all others"
    return _list(tied) if len(tied) <= MOST_NAMED else f"the {len(tied)} others"


def _list(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def called(way: str) -> str:
    """What a way is called in a sentence."""
    return f"constant {way}" if way == BASELINE else way


def _points(each: Difference) -> str:
    sign = 1 if each.value >= 0 else -1
    ends = sorted((sign * each.lower, sign * each.upper))
    files = sorted(sign * value for value in each.by_file)
    over_files = f"; file by file {files[0]:z.1f} to {files[-1]:z.1f}" if len(files) > 1 else ""
    return f"{abs(each.value):.1f} points ({ends[0]:z.1f} to {ends[1]:z.1f}{over_files})".replace("-", "−")


# --------------------------------------------------------------------------------------------------------------- tables


LEGEND = (
    "In the tables top-1 in per cent, and after the slash the KL divergence from r = 0 in nats. ▲ ahead of and ▼ "
    f"behind constant {BASELINE} on the same images, at 95 % confidence; no sign: a tie; a dash: not reached."
)


def _equal_time(group: Group) -> str:
    """Each way's accuracy and KL at each speed-up that some way reaches."""
    reached = [target for target in TARGETS if _is_reached([group], target)]
    columns = ["way", *(f"{target:g} times" for target in reached)]
    rows = [[called(way), *(_cell(group, way, target) for target in reached)] for way in group.ways]
    return "\n".join(Table([*map(Column, columns)], rows).markdown())


def _is_reached(groups: Iterable[Group], target: float) -> bool:
    return any(target in places for group in groups for places in group.places.values())


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
    columns = (
        "weights",
        "way",
        "budget",
        "remaining tokens",
        "FLOPs",
        "speed-up",
        "images/s",
        "top-1 %",
        "agree %",
        "KL",
    )
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
    return "\n".join(Table([*map(Column, columns)], rows).markdown()) + "\n"


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
    rulers = {f"{target:g}×": first.rate * target for target in TARGETS if _is_reached(groups, target)}
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
    """For each way, marked ones last, its points by rising throughput, means over the files, of what all have."""
    found: dict[str, list[plots.Fidelity]] = {}
    for way in sorted(group.ways, key=lambda way: marked.index(way) if way in marked else -1):
        keys = dict.fromkeys(key for file in group.answers for key in file if key[0] in (UNMERGED, way))
        curve = []
        for key in keys:
            those = [file[key] for file in group.answers if key in file and file[key].schedule in group.speed_ups]
            if len(those) == len(group.answers):  # or a line would go from one file's to the other's
                curve.append(
                    plots.Fidelity(
                        group.rate * fmean(group.speed_ups[each.schedule].value for each in those),
                        fmean(each.top1.value for each in those),
                        fmean(each.kl for each in those),
                    )
                )
        found[called(way)] = sorted(curve)
    return found
