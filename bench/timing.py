"""Time of several functions side by side: interleaved, in rotating order, on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# one sample is at least this long, so that the clock and the call of the timer do not show
SAMPLE_US = 2000.0
# more than the last-level cache of the processors and GPUs we know; read and written by a flush
FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: the median, and the quantiles at 20 % and 80 %."""

    median_us: float
    q20_us: float
    q80_us: float
    samples: int


def summary(samples_us: list[float]) -> Times:
    """The median and the quantiles, which are samples themselves or lie between two neighbours."""
    if len(samples_us) == 1:
        return Times(samples_us[0], samples_us[0], samples_us[0], 1)
    fifths = statistics.quantiles(samples_us, n=5, method="inclusive")
    return Times(statistics.median(samples_us), fifths[0], fifths[3], len(samples_us))


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in the order of this turn: each comes first equally often."""
    start = turn % len(names)
    return names[start:] + names[:start]


class Stopwatch:
    """Times one function on one device.

    flush_cache   before each sample, displace what the caches hold; a sample is then one call
    """

    def __init__(self, device: str, flush_cache: bool = False):
        self.is_cuda = torch.device(device).type == "cuda"
        self.flushed = (
            torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
            if flush_cache
            else None
        )

    def sample_us(self, function: Callable[[], object], calls: int) -> float:
        """Microseconds of one call, averaged over `calls` in a row."""
        if self.flushed is not None:
            self.flushed.add_(1)
            calls = 1
        if self.is_cuda:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3 / calls
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) * 1e6 / calls


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    seconds: float = 2.0,
    min_samples: int = 5,
    max_samples: int = 100,
    flush_cache: bool = False,
) -> dict[str, Times | str]:
    """Time of each function, or the words of the error that it raised.

    Every round takes one sample of each, in an order that rotates, until all have `max_samples`, or
    `seconds` per function are spent and each has `min_samples`.
    """
    watch = Stopwatch(device, flush_cache)
    results: dict[str, Times | str] = {}
    calls: dict[str, int] = {}
    for name, function in functions.items():
        try:
            function()  # compiles, allocates, starts threads
            once_us = min(watch.sample_us(function, 1) for _ in range(2))
        except Exception as error:  # whatever a baseline raises is its row of the table
            results[name] = first_line(error)
            continue
        calls[name] = max(1, round(SAMPLE_US / max(once_us, 1e-3)))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(max_samples if names else 0):
        for name in rotated(names, turn):
            samples[name].append(watch.sample_us(functions[name], calls[name]))
        spent_s = time.perf_counter() - begin
        if turn + 1 >= min_samples and spent_s > seconds * len(names):
            break
    results.update({name: summary(taken) for name, taken in samples.items()})
    return {name: results[name] for name in functions}


def first_line(error: BaseException) -> str:
    """An error in one line for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]
