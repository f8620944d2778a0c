"""How much memory a piece of work needs at its peak, without anything installed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

MEANING = (
    "largest resident set of the process while one step (forward, backward, update) runs, minus "
    "its resident set just before, free heap pages having been returned to the system first"
)


def resident_bytes() -> int | None:
    """The process's resident set once free heap pages are returned to the system; None where the
    system does not tell (not Linux, or another libc, which has no malloc_trim)."""
    try:
        if sys.platform != "linux":
            raise OSError
        ctypes.CDLL(None).malloc_trim(0)
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Run `work`; how far the process's resident set rose above where it began, at its peak.

    The kernel keeps the peak (VmHWM), and writing 5 to clear_refs restarts it; what earlier work
    has freed is returned first, so that it is not used again unseen. None where the system offers
    no such thing (as `resident_bytes`, or the file may not be written); the work is done all the
    same.
    """
    before = resident_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = None
    work()
    return None if before is None else _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
