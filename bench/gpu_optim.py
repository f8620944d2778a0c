"""Optimizer steps on a GPU: the cases of bench_optim.py beside torch's fused and foreach.

    python -m tilewright.bench.gpu_optim DIR [--budget S] [--seconds S] [--dry-run]

Bound by memory: the table shows GB/s of what has to be read and written once, and the share of the
bandwidth that was measured in the same run. Ours is first compared with float64 in a small shape.
Cases that no time was left for are listed.
"""

from __future__ import annotations

import sys

from tilewright.bench import bench_optim, on_gpu

TIMES_TENSORS = 4  # of bench_optim.py's large cases


def cases(is_dry: bool) -> list[on_gpu.Case]:
    """Every dtype of every case."""
    found = []
    for name, case in bench_optim.CASES.items():
        more = {**case, "P": TIMES_TENSORS * case["P"]} if case["N"] > 10_000 else case
        one = bench_optim.small(case) if is_dry else more
        found += [(name, one, dtype, "fwd") for dtype in case["dtypes"]]
    return found


def main(argv: list[str] | None = None) -> int:
    return on_gpu.of_room(
        argv, name="optim", doc=__doc__, budget=40.0, room=bench_optim, cases=cases
    )


if __name__ == "__main__":
    sys.exit(main())
