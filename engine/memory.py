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


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Run `work`; how far the process's resident set rose above where it began, at its peak.

    The kernel keeps the peak (VmHWM), and writing 5 to clear_refs restarts it; malloc_trim first
    returns what earlier work has freed, so that it is not used again unseen. None where the system
    offers no such thing (not Linux, or the file may not be written); the work is done all the same.
    """
    try:
        if sys.platform != "linux":
            raise OSError
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):  # another libc has no malloc_trim
        work()
        return None
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
