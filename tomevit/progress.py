"""The progress bar of whatever may take long: the only way to make one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

DELAY = 2.0  # seconds for which nothing is shown: most runs are over by then

if TYPE_CHECKING:
    Base = tqdm[NoReturn]
else:
    Base = tqdm


class Bar(Base):
    """A bar that shows nothing for a while, whatever asks it to show itself, and leaves nothing behind.

    Nothing at all is shown where standard error is no terminal, unless `disable` says otherwise.

    tqdm's own delay holds for `update` alone: a new description, and lines that are printed between, draw the bar at
    once, and it is then not removed at the end.
    """

    def __init__(self, *, disable: bool | None = None, **options: Any) -> None:
        self._due, self._drawn = time.monotonic() + DELAY, False
        super().__init__(leave=False, disable=disable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if time.monotonic() < self._due:
            return False
        self._drawn = True
        return super().display(msg, pos)

    def clear(self, nolock: bool = False) -> None:
        if self._drawn:
            super().clear(nolock)

    def close(self) -> None:
        self.clear()
        self._due = float("inf")
        super().close()


def progress_bar(
    *,
    total: float | None = None,
    desc: str | None = None,
    unit: str = "it",
    initial: int = 0,
    in_bytes: bool = False,
    bar_format: str | None = None,
    shown: bool = True,
) -> Bar:
    """A bar on standard error, where that is a terminal; a run that is over within `DELAY` prints nothing of it.

    Args:
        total: of what `update` counts; None: it is not known.
        desc: what is being done.
        unit: of what is counted.
        initial: how much of it had been done before.
        in_bytes: count bytes, with prefixes as in 1.2MB.
        bar_format: tqdm's, where another than its own is wanted.
        shown: False for all but one of several processes.
    """
    return Bar(
        total=total,
        desc=desc,
        unit="B" if in_bytes else unit,
        unit_scale=in_bytes,
        initial=initial,
        bar_format=bar_format,
        disable=None if shown else True,
    )
