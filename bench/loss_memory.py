"""What head and loss take in memory, beyond inputs and gradients: ours, and torch's ways.

python -m tilewright.bench.loss_memory
"""

from __future__ import annotations

import torch

from tilewright.bench import bench_loss
from tilewright.memory import peak_bytes

CASES = ("2k-1024-32k", "8k-1024-32k", "2k-2048-128k-frozen")
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def peak_mib(case: dict, variant, dtype: torch.dtype) -> float | None:
    """Of forward and backward, less the gradients that all variants return."""
    inputs = bench_loss.make_inputs(case, dtype, "cpu")
    names = case.get("gradients", bench_loss.GRADIENTS)
    for name in names:
        inputs[name].requires_grad_()

    def step():
        variant.run(case, **inputs).sum().backward()

    found = peak_bytes(step)
    returned = sum(inputs[name].numel() * inputs[name].element_size() for name in names)
    return None if found is None else (found - returned) / 2**20


def main() -> None:
    variants = {n: v for n, v in bench_loss.VARIANTS.items() if not v.compiles}
    print("| case | dtype | " + " | ".join(f"{name}, MiB" for name in variants) + " |")
    print("| --- | --- | " + " | ".join("---" for _ in variants) + " |")
    for name in CASES:
        case = bench_loss.CASES[name]
        for dtype in case["dtypes"]:
            found = [peak_mib(case, v, DTYPES[dtype]) for v in variants.values()]
            shown = ["not measurable here" if mib is None else f"{mib:.0f}" for mib in found]
            print(f"| {name} | {dtype} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
