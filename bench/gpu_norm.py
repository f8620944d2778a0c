"""Norms, rotary positions, gates, embeddings on a GPU: bench_norm.py with more tokens.

    python -m tilewright.bench.gpu_norm DIR [--budget S] [--seconds S] [--dry-run]

Bound by memory: the table shows GB/s of what has to be read and written once, and the share of the
bandwidth that was measured in the same run. Eight times the tokens of bench_norm.py, so that a call
takes longer than its launch. Ours is first compared with float64 in a small shape. Cases that no
time was left for are listed.
"""

from __future__ import annotations

import sys

from tilewright.bench import bench_norm, on_gpu

DTYPE = "bf16"
TIMES_TOKENS = 8
SKIPPED = ("rms-1-4096", "layer-64-384", "rope-1-32x128", "swiglu-1-11008")  # a launch and no more


def cases(is_dry: bool) -> list[on_gpu.Case]:
    """Every mode of every case."""
    found = []
    for name, case in bench_norm.CASES.items():
        if name in SKIPPED:
            continue
        more = bench_norm.small(case) if is_dry else {**case, "T": TIMES_TOKENS * case["T"]}
        found += [(name, more, DTYPE, mode) for mode in case["modes"]]
    return found


def main(argv: list[str] | None = None) -> int:
    return on_gpu.of_room(
        argv, name="norm", doc=__doc__, budget=110.0, room=bench_norm, cases=cases
    )


if __name__ == "__main__":
    sys.exit(main())
