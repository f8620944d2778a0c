"""Experts' MLPs on a GPU beside torch._grouped_mm and transformers' paths; a table, a JSON file.

    python -m tilewright.bench.gpu_moe DIR [--budget S] [--seconds S] [--dry-run]

The cases of bench_moe.py with models' own sizes, dense weights in bfloat16. The table shows TFLOP/s
of what the formula needs (three products of each slot, in the backward twice as many) and the share
of the product that was measured in the same run; decoding shows GB/s of the weights of the experts
that have tokens. Ours is first compared with float64 in a small shape. Cases that no time was left
for are listed.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from tilewright.bench import bench_moe, on_gpu
from tilewright.bench.variant import Variant

DTYPE = "bf16"
MIXTRAL = dict(E=8, K=2, H=4096, I=14336)
QWEN3 = dict(E=128, K=8, H=2048, I=768)
# most telling first; Mixtral-8x7B and Qwen3-30B-A3B
CASES: dict[str, dict] = {
    "qwen3-8k": dict(T=8192, modes=("fwd", "fwd+bwd"), **QWEN3),
    "mixtral-4k": dict(T=4096, modes=("fwd", "fwd+bwd"), **MIXTRAL),
    "qwen3-8k-frozen": dict(T=8192, modes=("fwd+bwd",), gradients=("x", "gates"), **QWEN3),
    "qwen3-8k-skewed": dict(T=8192, modes=("fwd",), skew=0.9, **QWEN3),
    "qwen3-1": dict(T=1, modes=("fwd",), **QWEN3),
    "qwen3-64": dict(T=64, modes=("fwd",), **QWEN3),
    "mixtral-8": dict(T=8, modes=("fwd",), **MIXTRAL),
}


def by_grouped_mm(case: dict, x, ids, gates, gate_up, down) -> torch.Tensor:
    """torch._grouped_mm with as little around it as torch allows."""
    by_expert = ids.reshape(-1).sort(stable=True)
    order, experts = by_expert.indices, torch.arange(case["E"], device=x.device)
    ends = torch.searchsorted(by_expert.values, experts, right=True).int()
    z = torch._grouped_mm(x[order // case["K"]], gate_up.mT, offs=ends)
    gate, up = z.chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    slots = torch.empty_like(out).index_copy(0, order, out).view(*ids.shape, -1)
    return (slots * gates[:, :, None]).sum(1).to(x.dtype)


VARIANTS = {**bench_moe.VARIANTS, "torch._grouped_mm": Variant(by_grouped_mm)}


def cases(is_dry: bool) -> list[on_gpu.Case]:
    """Every mode of every case."""
    return [
        (name, bench_moe.small(case) if is_dry else case, DTYPE, mode)
        for name, case in CASES.items()
        for mode in case["modes"]
    ]


def main(argv: list[str] | None = None) -> int:
    return on_gpu.of_room(
        argv, name="moe", doc=__doc__, budget=110.0, room=bench_moe, cases=cases, variants=VARIANTS
    )


if __name__ == "__main__":
    sys.exit(main())
