"""The demo's time: how the phases share it, and how many steps fit into what is left."""

from __future__ import annotations

import time
from collections.abc import Callable

# where on the clock each phase is to end, as a share of the whole
ENDS = {"measure": 0.11, "train": 0.55, "extend": 0.81, "generate": 0.86, "quantize": 1.0}


class Clock:
    """Seconds since the demo began.

    seconds   what the demo may take
    spent_s   what the finished phases of an interrupted run took; they count
    """

    def __init__(self, seconds: float, spent_s: float = 0.0):
        self.seconds = seconds
        self._start_s = time.perf_counter() - spent_s

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def left_s(self, phase: str) -> float:
        """Seconds until the phase is to end; below zero if that is over."""
        return ENDS[phase] * self.seconds - self.now_s()


class StepPlan:
    """A number of steps: what seems to fit at first, and less if they turn out slower.

    n_steps   as planned now
    least     steps that are taken even if the time is over
    left_s    asked for the seconds that are left; None: the number is fixed
    """

    def __init__(
        self, n_steps: int, least: int = 1, left_s: Callable[[], float] | None = None
    ) -> None:
        self.n_steps, self.least, self._left_s = n_steps, least, left_s

    def cut(self, done: int, step_s: float) -> None:
        """Drop the steps that no longer fit: `done` are taken, and one takes step_s seconds."""
        if self._left_s is not None:
            fit = done + int(max(0.0, self._left_s()) / step_s)
            self.n_steps = min(self.n_steps, max(fit, self.least, done))
