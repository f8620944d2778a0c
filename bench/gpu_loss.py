"""Head and cross-entropy on a GPU: bench_loss.py with four times the tokens, and Liger's kernel.

    python -m tilewright.bench.gpu_loss DIR [--budget S] [--seconds S] [--dry-run]

Bound by three products: the table shows TFLOP/s and the share of what this GPU's products reached
in the same run. Ours is first compared with float64 in a small shape. Peak memory, beyond inputs
and gradients, stands below the table. Cases that no time was left for are listed.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch

from tilewright.bench import bench_loss, on_gpu, run
from tilewright.bench.variant import Variant, call

DTYPE = "bf16"
TIMES_TOKENS = 4


def _liger(case: dict, h, weight, labels) -> torch.Tensor:
    loss = _liger_loss(case.get("reduction", "mean"))(weight, h, labels)
    return bench_loss.in_training(loss)


@functools.cache
def _liger_loss(reduction: str):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction=reduction)


def _without_liger() -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed: pip install liger-kernel"
    return None


def _is_averaged(case: dict) -> bool:
    return case.get("reduction", "mean") == "mean"


VARIANTS = bench_loss.VARIANTS | {
    "Liger": Variant(_liger, applies=_is_averaged, why_not=_without_liger)
}


def cases(is_dry: bool) -> list[on_gpu.Case]:
    """Every mode of every case."""
    found = []
    for name, case in bench_loss.CASES.items():
        more = bench_loss.small(case) if is_dry else {**case, "T": TIMES_TOKENS * case["T"]}
        found += [(name, more, DTYPE, mode) for mode in case["modes"]]
    return found


def peak_mib(variant: Variant, case: dict, dtype: str, mode: str, device: str) -> float | None:
    """Beyond what lies there before, and the gradients that come out."""
    if device != "cuda":
        return None
    gradients = run.gradients_of(bench_loss, case, mode)
    inputs = bench_loss.make_inputs(case, run.DTYPES[dtype], device)
    function = call(variant, case, inputs, gradients)
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    returned = sum(inputs[name].numel() * inputs[name].element_size() for name in gradients)
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def peaks(variants: dict[str, Variant], case: dict, dtype: str, mode: str, device: str) -> dict:
    return {name: peak_mib(v, case, dtype, mode, device) for name, v in variants.items()}


def peaks_shown(memory: dict[str, dict]) -> tuple[dict, list[str]]:
    lines = []
    for label, found in memory.items():
        known = [f"{n} {mib:.0f} MiB" for n, mib in found.items() if mib is not None]
        if known:
            lines.append(f"\nPeak memory of {label}: {', '.join(known)}.")
    return {"peak_mib": memory}, lines


def main(argv: list[str] | None = None) -> int:
    return on_gpu.of_room(
        argv, name="loss", doc=__doc__, budget=60.0, room=bench_loss, cases=cases,
        variants=VARIANTS, also=peaks, also_shown=peaks_shown,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
