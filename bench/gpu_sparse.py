"""Sparse deltas on a GPU: a layer's training step and the search, beside what torch offers.

    python -m tilewright.bench.gpu_sparse DIR [--budget S] [--seconds S] [--dry-run]

The cases of bench_sparse.py and larger ones, in bfloat16. The table shows TFLOP/s of what the
formula needs (the dense products, and two operations for a value and a token) and the share of the
product that was measured in the same run. Ours is first compared with float64 in a small shape.
Cases that no time was left for are listed.
"""

from __future__ import annotations

import sys

from tilewright.bench import bench_sparse, on_gpu

DTYPE = "bf16"
# most telling first: 1 % and 0.1 % at a training batch, a wide layer, decoding, the search
CASES: dict[str, dict] = {
    "train-2k": bench_sparse.CASES["train-2k"],
    "train-2k-thin": dict(bench_sparse.CASES["train-2k"], share=0.001),
    "search-2k": bench_sparse.CASES["search-2k"],
    "train-2k-wide": dict(bench_sparse.CASES["train-512-wide"], T=2048),
    "train-8k": dict(bench_sparse.CASES["train-2k"], T=8192),
    "decode-1": dict(bench_sparse.CASES["train-512"], T=1, modes=("fwd",)),
}


def cases(is_dry: bool) -> list[on_gpu.Case]:
    """Every mode of every case."""
    return [
        (name, bench_sparse.small(case) if is_dry else case, DTYPE, mode)
        for name, case in CASES.items()
        for mode in case["modes"]
    ]


def main(argv: list[str] | None = None) -> int:
    return on_gpu.of_room(
        argv, name="sparse", doc=__doc__, budget=60.0, room=bench_sparse, cases=cases
    )


if __name__ == "__main__":
    sys.exit(main())
