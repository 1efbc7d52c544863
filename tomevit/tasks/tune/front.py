"""What was measured, and the best of it: points of speed and faithfulness, on one device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tomevit.errors import check_path, join_with_or, printable
from tomevit.models import VisionTransformer
from tomevit.notebook import html_table
from tomevit.opening import read_small_file
from tomevit.output import is_stream, new_file
from tomevit.schedule import Schedule, Step, check_schedule, format_schedule, schedule_from_json, schedule_to_json
from tomevit.tasks import plots
from tomevit.tasks.tune.search import undominated
from tomevit.typed import conform, parse_json

SCHEMA = 1
#: So many times as far must constant r move the answers at equal time: what is less may be noise of times and images.
LEAST_GAIN = 1.1
NO_GAIN = "The search found nothing better than constant r at any speed: these are the points of constant r."


@dataclass(frozen=True, kw_only=True)
class Point:
    """A schedule, measured on images that took no part in the search."""

    r: Schedule = 0  # as `model.r` takes it
    kind: Literal["unmerged", "constant", "shape", "preset", "found"]  # where it comes from
    matchings: tuple[str, ...]  # by which tokens merge, in the order in which they come
    tokens: int  # that remain after the last block
    flop_ratio: float  # r = 0 over this, as they are computed
    seconds: float  # the median of a call, which is a batch
    seconds_range: tuple[float, float]  # its quartiles
    speed_up: float  # the median of r = 0 over this one
    speed_up_range: tuple[float, float] | None  # of 95 % confidence; None: too few rounds
    agreement: float  # per cent of the images whose class is that of r = 0; without a head the mean cosine, in per cent
    kl: float | None  # mean KL divergence of the classes from those of r = 0, in nats; None: no head
    cosine: float | None  # mean cosine to the embedding of r = 0; None: there is a head
    top1: float | None  # per cent of the images with the right class; None: no labels

    @property
    def drift(self) -> float:
        """How far the answers moved: the KL divergence, or 1 less the cosine."""
        return self.kl if self.kl is not None else 1 - (self.cosine or 0.0)

    def __repr__(self) -> str:
        return (
            f"<Point r = {format_schedule(self.r)}: {self.speed_up:.2f} times as fast, "
            f"agreement {self.agreement:.2f} %, {self.tokens} remaining tokens>"
        )

    @property
    def kept(self) -> float:
        """What may drop, in per cent: the accuracy where there are labels, else the agreement."""
        return self.agreement if self.top1 is None else self.top1


@dataclass(frozen=True, kw_only=True)
class Front:
    """How fast a model can be on one device, and how faithful, as `tomevit.tune` measured it.

    Attributes:
        setting: what its figures must be read with: model, device, dtype, batch, mode, versions, digests.
        points: to which no other that was measured is at least as good in speed and in faithfulness, r = 0 first
            and the fastest last.
        others: all else that was measured at the same time, constant r among it.
        note: whether the search gained anything over constant r, in a sentence.
    """

    setting: dict[str, Any]
    points: tuple[Point, ...]
    others: tuple[Point, ...] = ()
    note: str = ""

    def at(
        self, *, speed_up: float | None = None, max_drop: float | None = None, latency: float | None = None
    ) -> Point:
        """The best point that keeps one promise, as it was measured.

        Args:
            speed_up: the most faithful point, of the least drift, whose median is so many times as fast as that of
                r = 0, and of whose 95 % interval the lower end is not below 1.
            max_drop: the fastest point whose accuracy, or without labels agreement, is at most so many points below
                that of r = 0.
            latency: the most faithful point whose call, which is a batch, takes so many seconds at most, by the median.

        Raises:
            ValueError: none or several are given, or no point keeps it; the message says what can be had.
        """
        name, value = promise_of(speed_up=speed_up, max_drop=max_drop, latency=latency)
        if name == "max_drop":
            least = self.points[0].kept - value - 1e-9  # a difference of two per cents may be off by a digit
            return min((p for p in self.points if p.kept >= least), key=lambda p: (p.seconds, p.drift))
        kept: Callable[[Point], bool] = is_fast_enough(value) if name == "speed_up" else lambda p: p.seconds <= value
        fit = [point for point in self.points if kept(point)]
        if fit:
            return min(fit, key=lambda p: (p.drift, p.seconds))
        where = f"on {self.setting['device']}, {self.setting['dtype']}, batch {self.setting['batch']}"
        if name == "speed_up":
            best = max(filter(is_fast_enough(0), self.points), key=lambda p: p.speed_up)
            raise ValueError(
                f"no schedule is {value:g} times as fast as r = 0 {where}: the most is {best.speed_up:.2f}, with "
                f"r = {format_schedule(best.r)}"
            )
        best = min(self.points, key=lambda p: p.seconds)
        raise ValueError(
            f"no schedule takes {1000 * value:g} ms or less {where}: the fastest takes {1000 * best.seconds:.3g} ms, "
            f"with r = {format_schedule(best.r)}"
        )

    def __repr__(self) -> str:
        first, last = self.points[0], self.points[-1]
        return (
            f"<Front of {self._where()}: {len(self.points)} points, {first.speed_up:.2f} to {last.speed_up:.2f} times "
            f"as fast, agreement {first.agreement:.2f} to {last.agreement:.2f} %>"
        )

    def _repr_html_(self) -> str:
        labelled = self.points[0].top1 is not None
        heading = ("r", "kind", "times as fast", "agreement, %", "remaining tokens", "top-1, %")
        rows = (
            (
                format_schedule(point.r),
                point.kind,
                f"{point.speed_up:.2f}",
                f"{point.agreement:.2f}",
                point.tokens,
                "" if point.top1 is None else f"{point.top1:.2f}",
            )
            for point in self.points
        )
        columns = len(heading) if labelled else 5
        return html_table(self._where(), heading[:columns], (row[:columns] for row in rows), self.note)

    def _where(self) -> str:
        said = self.setting
        model = said["model"] or "a model without a name"
        return printable(f"{model} on {said['device']}, {said['dtype']}, batch {said['batch']}")

    def check(self, model: VisionTransformer) -> None:
        """That a model has the shape of the one that was measured: its schedules mean something else on others.

        Raises:
            ValueError: it has another number of tokens, of those at the front, or of blocks, or merges by another
                matching where r names none.
        """
        config = model.config
        if self.setting["matching"] != config.matching:
            raise ValueError(
                f"this front was measured with a model whose matching is {self.setting['matching']!r}, and this one's "
                f"is {config.matching!r}: tune it anew"
            )
        for name, words, ours in (
            ("tokens", "tokens", config.num_tokens),
            ("prefix", "tokens in front of the patches", config.num_prefix),
            ("depth", "blocks", config.depth),
        ):
            if self.setting[name] != ours:
                raise ValueError(
                    f"this front was measured with a model of {self.setting[name]} {words}, "
                    f"{self.setting['model'] or 'without a name'}, and this one has {ours}: tune it anew"
                )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it.

        schema    1; it changes when a field changes its meaning or goes
        finished  true; in the file of a search that was interrupted false, and there are no points
        setting   what the figures must be read with, and hold for:
            model, img_size, tokens, prefix, depth, matching, prop_attn     the model; tokens that enter, and those of
                                    them in front of the patches; blocks; its own matching
            weights                 sha256, as a file of tomevit's records it
            device, threads, torch, python, cuda, platform, tomevit         threads on a CPU, cuda on one
            dtype, precision        of the weights; torch's precision of float32 products
            batch, mode, rounds     images per call; as in `tomevit bench`; timed calls of each schedule
            matchings, seed         that were searched; of the split
            images                  {count, search, held_back, sha256, labels}: labels is their sha256, or null
        note      whether the search gained anything over constant r
        points    the front, r = 0 first, the fastest last:
            r                       as `model.r`; (r, inflection) is {"mean": r, "inflection": inflection}
            kind                    "unmerged", "constant", "shape" (constant by another matching, late, deferred),
                                    "preset", or "found" by the search
            matchings, tokens       names; tokens that remain after the last block
            flop_ratio              r = 0 over this, as multiply-adds are computed
            seconds, seconds_range  median of a call, and quartiles
            speed_up, speed_up_range    the median of r = 0 over this one; 95 % interval, or null for fewer than 6
                                    rounds
            agreement               per cent with the class of r = 0; without a head 100 times the mean cosine
            kl, cosine, top1        kl in nats; null where there is no head, a head, no labels
        others    all else that was measured, as points
        """
        return {
            "schema": SCHEMA,
            "finished": True,
            "setting": self.setting,
            "note": self.note,
            "points": [_point_to_json(point) for point in self.points],
            "others": [_point_to_json(point) for point in self.others],
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "this") -> Front:
        """The inverse of `to_json`.

        Args:
            where: what to call it in a message.

        Raises:
            ValueError: it is no front, or of a newer version, or of a search that is not finished.
        """
        if not isinstance(data, dict) or not {"schema", "finished", "setting"} <= data.keys():
            raise ValueError(f"{where} is no front of tomevit.tune")
        if data["schema"] != SCHEMA:
            raise ValueError(f"{where} is of version {data['schema']!r}, and this tomevit reads {SCHEMA}: upgrade it")
        if not data["finished"]:
            raise ValueError(f"{where} is of a search that was interrupted: tune with file={where!r} to go on with it")
        try:
            setting = data["setting"]
            for name, kind in _SETTING.items():
                conform(kind, setting[name], f"setting.{name}")
            points, others = (
                tuple(_point_from_json(point, f"{part}[{i}]", setting["depth"]) for i, point in enumerate(data[part]))
                for part in ("points", "others")
            )
            if not points or points[0].kind != "unmerged":
                raise ValueError("its first point must be r = 0")
            note: str = conform(str, data["note"], "note")
        except (KeyError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where} is damaged: {what}") from error
        return cls(setting=setting, points=points, others=others, note=note)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, for `load`.

        Raises:
            ValueError: the name ends in what promises another format.
            OSError: nothing can be written there.
        """
        with new_file(path, endings=(".json",)) as draft:
            draft.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Front:
        """A front from a file of `save`, or of `tomevit.tune(file=...)`.

        Raises:
            ValueError: it is no front, or damaged, or of a search that is not finished.
            OSError: it cannot be read.
        """
        return cls.from_json(read_json(path), os.fspath(path))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw speed-up against agreement, or accuracy where there are labels, with constant r and presets beside.

        The front is drawn through those of its points that are best in what is drawn: the others are best by KL alone.

        Raises:
            ValueError: matplotlib is not installed, or the name's ending is no picture's.
            OSError: nothing can be written there.
        """
        plots.require_matplotlib()
        path = Path(path)
        kind = ".png" if is_stream(path) and not path.suffix else path.suffix
        if not is_stream(path):
            plots.check_suffix(path)
        where, measured = self.setting, (*self.points, *self.others)
        drawn = undominated(self.points, lambda p: (-p.speed_up, -p.kept))
        lines = {
            label: [plots.Measured(p.kept, p.speed_up, p.speed_up_range) for p in sorted(those, key=_speed_up)]
            for label, those in {
                "front": drawn,
                "constant r": [p for p in measured if p.kind in ("unmerged", "constant")],
                "presets": [p for p in measured if p.kind == "preset"],
            }.items()
            if those
        }
        of_labels = self.points[0].top1 is not None
        across = "top-1 accuracy, %" if of_labels else "agreement with r = 0, %"
        note = (
            f"{where['images']['held_back']} images held back; {where['device']}, {where['dtype']}, "
            f"batch {where['batch']}, {where['mode']}\nBars are intervals of 95 %."
        )
        with new_file(path) as draft:
            plots.faithfulness(draft, kind, lines, across, f"Speed and faithfulness, {where['model'] or 'model'}", note)


#: What is looked at of a setting that comes from a file; all else is shown as it is.
_SETTING: dict[str, Any] = {"model": str, "device": str, "dtype": str, "batch": int, "mode": str}
_SETTING |= {"tokens": int, "prefix": int, "depth": int, "matching": str}


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a file holds as JSON.

    Raises:
        ValueError: it holds none.
        OSError: it cannot be read.
    """
    check_path("path", path)
    try:
        return parse_json(read_small_file(path))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is no front of tomevit.tune: {error}") from error


def _speed_up(point: Point) -> float:
    return point.speed_up


def promise_of(**asked: float | None) -> tuple[str, float]:
    """The one promise that is asked for, of the arguments of `Front.at`: its name, and its number.

    Raises:
        ValueError: there are none or several, or it is no number that could be kept.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        names = ("speed_up", "max_drop", "latency")
        raise ValueError(f"give one of {join_with_or(names)}, and not {' and '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not math.isfinite(value) or value < 0 or (value == 0 and name != "max_drop"):
        least_of_all = "of at least" if name == "max_drop" else "above"
        raise ValueError(f"{name} is {value}, and must be a number {least_of_all} 0")
    return name, value


def is_fast_enough(speed_up: float) -> Callable[[Point], bool]:
    """Whether a point is so many times as fast as r = 0, and not slower by its interval's lower end."""
    return lambda point: point.speed_up >= speed_up and (point.speed_up_range is None or point.speed_up_range[0] >= 1)


def best_of(points: Sequence[Point]) -> tuple[list[Point], str]:
    """The front of what was measured, and whether the search gained anything, in a sentence.

    Where it gained nothing at any speed, the front is that of constant r alone.
    """
    constant = [point for point in points if point.kind in ("unmerged", "constant")]
    front = sorted(undominated(points, _measures), key=lambda point: (point.kind != "unmerged", -point.seconds))
    plain = sorted(undominated(constant, _measures), key=lambda point: (point.kind != "unmerged", -point.seconds))
    # The model as it is stands first, even where something that merges were as faithful and faster.
    front, plain = ([constant[0], *(point for point in each if point is not constant[0])] for each in (front, plain))
    others = [point for point in front[1:] if point.kind != "constant" and is_fast_enough(1)(point)]
    beside = [(point.drift, drift_at(constant, point.seconds)) for point in others]
    if not any(ours <= theirs / LEAST_GAIN for ours, theirs in beside):
        return plain, NO_GAIN
    # What no constant r is fast enough for can be compared with none.
    shares = sorted(ours / max(theirs, 1e-12) for ours, theirs in beside if theirs < math.inf)
    if not shares:
        best = min(others, key=lambda point: point.seconds)
        return front, (
            f"The search found what is faster than any constant r: r = {format_schedule(best.r)}, {best.speed_up:.2f} "
            f"times as fast as r = 0."
        )
    times = dict.fromkeys(f"{share:.2f}" for share in (shares[0], shares[-1]))
    return front, (
        f"At equal time the schedules here that are no constant r ({len(shares)}) move the answers "
        f"{' to '.join(times)} times as far as constant r does."
    )


def drift_at(constant: Sequence[Point], seconds: float) -> float:
    """How far constant r moves the answers in so much time, on the lines between its points.

    Infinite where none is so fast.
    """
    front = sorted(undominated(constant, lambda p: (p.seconds, p.drift)), key=lambda p: p.seconds)
    if seconds < front[0].seconds:
        return math.inf
    slower = next((i for i, point in enumerate(front) if point.seconds > seconds), len(front))
    if slower == len(front):
        return front[-1].drift
    a, b = front[slower - 1], front[slower]
    return a.drift + (b.drift - a.drift) * (seconds - a.seconds) / (b.seconds - a.seconds)


def _measures(point: Point) -> tuple[float, ...]:
    return point.seconds, point.drift, -point.agreement, -point.kept


def matchings_of(steps: Sequence[Step], own: str) -> tuple[str, ...]:
    """By which matchings a schedule merges."""
    return tuple(dict.fromkeys(step.matching or own for step in steps if step.total))


def _point_to_json(point: Point) -> dict[str, Any]:
    return asdict(point) | {"r": schedule_to_json(point.r)}


def _point_from_json(data: Any, where: str, depth: int) -> Point:
    if not isinstance(data, dict) or "r" not in data:
        raise ValueError(f"{where} has no r")
    point: Point = conform(Point, {name: value for name, value in data.items() if name != "r"}, where)
    return replace(point, r=check_schedule(schedule_from_json(data["r"], depth), depth))
