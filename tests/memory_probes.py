"""What a call does to memory: torch's own by the profiler, all by the system."""

import threading
from pathlib import Path

import pytest
import torch


def allocations(call) -> list[int]:
    """Bytes of each block that torch's allocator hands out during a call, freed ones included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def peak_growth_bytes(call) -> int:
    """How far the resident set rises above where it stands, at its highest, during a call."""

    def read(field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
        return None

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError as error:
        pytest.skip(f"the peak of the resident set cannot be reset here: {error}")
    before = read("VmRSS")
    worker = threading.Thread(target=call)  # a fresh thread has no scratch kept from other tests
    worker.start()
    worker.join()
    return read("VmHWM") - before
