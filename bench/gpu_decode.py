"""Sampling on a GPU: the cases of bench_decode.py, beside transformers' processors and torch.

    python -m tilewright.bench.gpu_decode DIR [--budget S] [--seconds S] [--dry-run]

Bound by reading the logits at most: the table shows GB/s of one reading, and the share of the
bandwidth that was measured in the same run. What is drawn is first looked for in the kept set, in a
small shape. Cases that no time was left for are listed.
"""

from __future__ import annotations

import sys

from tilewright.bench import bench_decode, on_gpu

TIMES_ROWS = 4  # of the largest: 64 rows leave half of a GPU's processors without one


def cases(is_dry: bool) -> list[on_gpu.Case]:
    """Every dtype of every case."""
    found = []
    for name, case in bench_decode.CASES.items():
        more = {**case, "B": TIMES_ROWS * case["B"]} if case["B"] > 8 else case
        one = bench_decode.small(case) if is_dry else more
        found += [(name, one, dtype, "fwd") for dtype in case["dtypes"]]
    return found


def main(argv: list[str] | None = None) -> int:
    return on_gpu.of_room(
        argv, name="decode", doc=__doc__, budget=30.0, room=bench_decode, cases=cases
    )


if __name__ == "__main__":
    sys.exit(main())
