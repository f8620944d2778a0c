"""Calls of CPU kernels recorded once and made again as one, without Python between them.

While a thread records, the bindings keep a kernel's call instead of making it: its addresses and
extents stay those of that time, the memory behind them is free to change. What comes out of an
operator then holds nothing yet. An operator of torch's in between is not recorded; whoever records
compares the number of calls with what is expected.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, TypeVar

from tilewright.native import native

Kept = TypeVar("Kept")


class CannotRecord(Exception):
    """What is asked for is more than calls of kernels."""


class Recording:
    """`with recording.on(): ...` records; `recording()` makes the calls, in their order."""

    def __init__(self) -> None:
        self._calls: Any = native().Recording()
        self._kept: list[object] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self) -> None:
        self._calls()

    @contextlib.contextmanager
    def on(self):
        self._calls.start()
        _thread.recording = self
        try:
            yield self
        finally:
            _thread.recording = None
            self._calls.stop()

    def keep(self, held: object) -> None:
        """Hold on to what the calls read or write."""
        self._kept.append(held)


_thread = threading.local()


def current() -> Recording | None:
    """The recording of this thread."""
    return getattr(_thread, "recording", None)


def keep(held: Kept) -> Kept:
    """For the rooms: something made for a call, which lives as long as the call can be made."""
    recording = current()
    if recording is not None:
        recording.keep(held)
    return held


def expect_no_copy(operator: str, why: str) -> None:
    """For the rooms, before torch copies what a kernel reads. CannotRecord: this thread records."""
    if current() is not None:
        raise CannotRecord(f"{operator}: {why}")
