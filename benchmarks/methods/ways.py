"""What is compared: every matching and every shape of a schedule, at some budgets."""

from __future__ import annotations

import json
from typing import NamedTuple

from tomevit.measure.defaults import default_r
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule, entries

UNMERGED = "r = 0"
BASELINE = "bipartite"
TUNED = "tuned"

#: The r of each way, where {} is a budget. Those without a shape merge as many tokens in every block.
WAYS = {
    BASELINE: "{}",
    "every_kth": "{} every_kth",
    "random": "{} random",
    "importance": "{} importance",
    "diffrate": "{} diffrate",
    "redundant": "{} redundant",
    "pitome": "{} pitome",
    "grid": "{} grid",
    "decreasing": "{},-1",
    "increasing": "{},1",
    "late": "{} late",
    "deferred": "{} deferred",
    "late redundant": "{} late redundant",
}
#: Of FLOPs: measured speed-ups stay behind them, so the largest goes beyond what is compared.
BUDGETS = ("1.25x", "1.5x", "1.75x", "2x", "2.5x")
#: So many times as fast as r = 0, as measured, the ways are compared.
TARGETS = (1.25, 1.5, 1.75, 2.0)


class Candidate(NamedTuple):
    """A schedule of one way."""

    way: str
    budget: str  # as it was asked for
    r: Schedule  # in plain numbers
    ranking: str | None = None  # what DiffRate's way ranks patches by; None: as it does


def candidates(model: VisionTransformer, budgets: tuple[str, ...] = BUDGETS) -> list[Candidate]:
    """Of r = 0 and of each way: the budgets that can be had, schedules that mean the same once."""
    found = [Candidate(UNMERGED, "0", 0)]
    for way, words in WAYS.items():
        numbers = [str(r) for r in default_r(model.card) if isinstance(r, int)] if way == BASELINE else []
        seen: set[str] = set()
        for budget in (*budgets, *numbers):
            try:
                r = model.plain(words.format(budget))
            except ValueError:  # more than this way can save of this model
                continue
            if (name := schedule_name(model, r)) not in seen:
                seen.add(name)
                found.append(Candidate(way, budget, r))
    return found


def schedule_name(model: VisionTransformer, r: Schedule) -> str:
    """What happens in each block, in JSON, which is an r again: what takes the same time has the same name."""
    return json.dumps(list(entries(model.steps(r))))
