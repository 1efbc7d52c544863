"""Ways to merge at equal measured time, on the same images.

Between two schedules of one way lies what a share of the images by the one and the rest by the other gives: time and
accuracy are then means of both, so that a way's accuracy at a speed-up is read off a line over time. Intervals are of
the bootstrap, which draws images and rounds anew, the same for all ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.methods.ways import TARGETS, UNMERGED
from tomevit.measure.timing import ratio_interval
from tomevit.tasks.evaluate import Share, wilson

Array = npt.NDArray[np.float64]
DRAWS = 1000


class SpeedUp(NamedTuple):
    """Of a schedule over r = 0, in the rounds in which both took their turns."""

    value: float  # the median of r = 0 over its own
    interval: tuple[float, float] | None  # of 95 % confidence; None: too few rounds
    draws: Array  # (DRAWS,), with the rounds drawn anew


@dataclass(frozen=True)
class Answers:
    """Of one file's model at one candidate."""

    way: str
    budget: str
    schedule: str
    tokens: int  # leaving the last block
    flop_ratio: float
    right: Array  # (images,), 1 where the class is right
    agreement: float  # per cent with the class of r = 0
    kl: float  # from r = 0, in nats

    @property
    def top1(self) -> Share:
        """With Wilson's interval, in per cent."""
        return wilson(int(self.right.sum()), len(self.right))


class Place(NamedTuple):
    """What a way gives at one speed-up: means over the files."""

    top1: float  # per cent
    by_file: tuple[float, ...]
    agreement: float
    kl: float
    draws: Array  # (DRAWS,) of top1, with images and rounds drawn anew


class Difference(NamedTuple):
    """Of the accuracies of two ways at one speed-up, in points."""

    value: float
    lower: float  # the interval of 95 % confidence
    upper: float
    by_file: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Ahead, behind, or tied: the interval has both."""
        return "ahead" if self.lower > 0 else "behind" if self.upper < 0 else "tied"


@dataclass(frozen=True)
class Group:
    """Files of weights that are alike but for the seed they began with."""

    name: str
    architecture: str
    files: tuple[str, ...]
    answers: tuple[dict[tuple[str, str], Answers], ...]  # of each file, by way and budget
    speed_ups: dict[str, SpeedUp] = field(default_factory=dict)  # by schedule
    rate: float = 0.0  # images per second at r = 0
    rounds: int = 0

    @property
    def num_images(self) -> int:
        return len(next(iter(self.answers[0].values())).right)

    @property
    def ways(self) -> list[str]:
        """Those that merge and were timed, in the order in which they were measured."""
        return list(dict.fromkeys(each.way for each in self.timed if each.way != UNMERGED))

    @property
    def timed(self) -> list[Answers]:
        """Answers of all files whose schedule was timed."""
        return [each for file in self.answers for each in file.values() if each.schedule in self.speed_ups]

    @cached_property
    def drawn(self) -> Array:
        """(DRAWS, images + 2), how often each image is drawn.

        The last two are imagined, and differ between any two ways, once for each: Bonett and Price (2012) add them,
        since else a few images that differ would settle what is better.
        """
        cells = self.num_images + 2
        counts = np.random.default_rng(0).multinomial(cells, np.full(cells, 1 / cells), size=DRAWS)
        return counts.astype(np.float64)

    @cached_property
    def places(self) -> dict[str, dict[float, Place]]:
        """By way and target, as far as every file's model gets there."""
        found: dict[str, dict[float, Place]] = {}
        for way in self.ways:
            by_file = [self._along(file, way) for file in self.answers]
            found[way] = {
                target: Place(
                    fmean(each[target][0] for each in by_file),
                    tuple(each[target][0] for each in by_file),
                    fmean(each[target][1] for each in by_file),
                    fmean(each[target][2] for each in by_file),
                    np.mean([each[target][3] for each in by_file], axis=0),
                )
                for target in TARGETS
                if all(target in each for each in by_file)
            }
        return found

    def _along(self, file: dict[tuple[str, str], Answers], way: str) -> dict[float, tuple[float, float, float, Array]]:
        """Of one file: accuracy, agreement, KL and draws of the accuracy at each target that the way reaches."""
        those = [each for each in file.values() if each.way in (UNMERGED, way) and each.schedule in self.speed_ups]
        speeds = [self.speed_ups[each.schedule] for each in those]
        times = 1 / np.array([each.value for each in speeds])
        reached = np.array([target for target in TARGETS if 1 / target >= times.min() - 1e-9])
        order = np.argsort(times)
        top1, agreement, kl = (
            np.interp(1 / reached, times[order], np.array(values)[order])
            for values in (
                [100 * each.right.mean() for each in those],
                [each.agreement for each in those],
                [each.kl for each in those],
            )
        )
        right = np.stack([each.right for each in those])
        accuracies = 100 * self.drawn[:, :-2] @ right.T / self.drawn.shape[1]
        drawn_times = 1 / np.stack([each.draws for each in speeds], axis=1)
        draws = np.empty((DRAWS, len(reached)))
        for i, (at, values) in enumerate(zip(drawn_times, accuracies, strict=True)):
            order = np.argsort(at)
            draws[i] = np.interp(1 / reached, at[order], values[order])
        return {
            float(target): (float(top1[i]), float(agreement[i]), float(kl[i]), draws[:, i])
            for i, target in enumerate(reached)
        }

    def difference(self, way: str, other: str, target: float) -> Difference:
        """Of two ways that both get there, the first less the second."""
        ours, theirs = self.places[way][target], self.places[other][target]
        imagined = 100 * (self.drawn[:, -2] - self.drawn[:, -1]) / self.drawn.shape[1]
        lower, upper = np.quantile(ours.draws - theirs.draws + imagined, (0.025, 0.975))
        by_file = tuple(a - b for a, b in zip(ours.by_file, theirs.by_file, strict=True))
        return Difference(ours.top1 - theirs.top1, float(lower), float(upper), by_file)


def groups_of(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """What is stored, as far as answers and times of a group are there."""
    rows = list(rows)
    classes = {row["key"].removeprefix("images/"): row["classes"] for row in rows if row["kind"] == "images"}
    found: dict[tuple[str, str], dict[str, dict[tuple[str, str], Answers]]] = {}
    for weights in (row for row in rows if row["kind"] == "weights"):
        if answers := _answers([row for row in rows if row.get("weights") == weights["weights"]], classes):
            group = found.setdefault((weights["group"], weights["architecture"]), {})
            name = weights["file"]
            group[name if name not in group else f"{name} ({weights['weights']})"] = answers
    groups = []
    for (name, architecture), files in found.items():
        times = [row for row in rows if row["kind"] == "round" and row["architecture"] == architecture]
        plain = next(iter(files.values()))[UNMERGED, "0"].schedule
        if times:
            speed_ups = _speed_ups([row["seconds"] for row in times], plain)
            seconds = float(np.median([row["seconds"][plain] for row in times]))
            group_of = Group(
                name,
                architecture,
                tuple(files),
                tuple(files.values()),
                speed_ups,
                times[0]["batch"] / seconds,
                len(times),
            )
            groups.append(group_of)
    return groups


def _answers(rows: Sequence[dict[str, Any]], classes: dict[str, str]) -> dict[tuple[str, str], Answers]:
    """Of one file's model, on the most images of which r = 0 is known."""
    answers = [row for row in rows if row["kind"] == "answers"]
    plain = max((row for row in answers if row["way"] == UNMERGED), key=lambda row: len(row["classes"]), default=None)
    if plain is None:
        return {}
    labels = _array(classes[plain["images"]])
    found = {}
    for row in answers:
        if row["images"] == plain["images"]:
            given = _array(row["classes"])
            found[row["way"], row["budget"]] = Answers(
                row["way"],
                row["budget"],
                row["schedule"],
                row["tokens"],
                row["flop_ratio"],
                (given == labels).astype(np.float64),
                100 * float((given == _array(plain["classes"])).mean()),
                row["kl"],
            )
    return found


def _array(classes: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(classes.encode("ascii"), dtype=np.uint8)


def _speed_ups(rounds: Sequence[dict[str, float]], plain: str) -> dict[str, SpeedUp]:
    """Of each schedule, over r = 0 in the same rounds."""
    found = {}
    for name in dict.fromkeys(name for each in rounds for name in each):
        those = [each for each in rounds if name in each]
        ours, theirs = (np.array([each[which] for each in those]) for which in (name, plain))
        # Of as many rounds the same are drawn for every schedule.
        chosen = np.random.default_rng(len(those)).integers(len(those), size=(DRAWS, len(those)))
        draws = np.median(theirs[chosen], axis=1) / np.median(ours[chosen], axis=1)
        value = float(np.median(theirs) / np.median(ours))
        interval = None if name == plain else ratio_interval([theirs.tolist()], ours.tolist())
        found[name] = SpeedUp(value, interval, draws)
    return found
