"""What experts' MLPs take in memory, beyond inputs and gradients: ours, and transformers' ways.

python -m tilewright.bench.moe_memory
"""

from __future__ import annotations

import torch

from tilewright.bench import bench_moe
from tilewright.memory import peak_bytes

CASES = ("coarse-512", "coarse-2k", "fine-512", "fine-2k", "fine-2k-skewed", "fine-2k-frozen")
MODES = ("fwd", "fwd+bwd")


def peak_mib(case: dict, variant, mode: str) -> float | None:
    """In bfloat16, less the output or the gradients that all variants return."""
    inputs = bench_moe.make_inputs(case, torch.bfloat16, "cpu")
    trained = case.get("gradients", bench_moe.GRADIENTS) if mode == "fwd+bwd" else ()
    for name in trained:
        inputs[name].requires_grad_()

    def step():
        y = variant.run(case, **inputs)
        if trained:
            y.backward(torch.ones_like(y))

    found = peak_bytes(step)
    returned = sum(inputs[n].numel() * inputs[n].element_size() for n in trained or ("x",))
    return None if found is None else (found - returned) / 2**20


def main() -> None:
    variants = bench_moe.VARIANTS
    print("| case | mode | " + " | ".join(f"{name}, MiB" for name in variants) + " |")
    print("| --- | --- | " + " | ".join("---" for _ in variants) + " |")
    for name in CASES:
        case = bench_moe.CASES[name]
        for mode in MODES:
            shown = []
            for variant in variants.values():
                if not variant.applies(case):
                    shown.append("")
                    continue
                mib = peak_mib(case, variant, mode)
                shown.append("not measurable here" if mib is None else f"{mib:.0f}")
            print(f"| {name} | {mode} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
