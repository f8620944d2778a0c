"""What experts' MLPs take in memory, beyond inputs and gradients: ours, and transformers' ways.

python -m tilewright.bench.moe_memory [--case NAMES]

Each figure is that of a process of its own: what an earlier variant has left behind would count.
"""

from __future__ import annotations

import argparse
import multiprocessing
from typing import Any

import torch

from tilewright.bench import bench_moe
from tilewright.memory import peak_bytes

CASES = ("coarse-512", "coarse-2k", "fine-512", "fine-2k", "fine-2k-skewed", "fine-2k-frozen")
MODES = ("fwd", "fwd+bwd")


def peak_mib(case_name: str, variant_name: str, mode: str) -> float | None:
    """In bfloat16, less the output or the gradients that all variants return."""
    case: dict[str, Any] = bench_moe.CASES[case_name]
    variant = bench_moe.VARIANTS[variant_name]
    inputs = bench_moe.make_inputs(case, torch.bfloat16, "cpu")
    trained = case.get("gradients", bench_moe.GRADIENTS) if mode == "fwd+bwd" else ()
    for name in trained:
        inputs[name].requires_grad_()

    def step():
        y = variant.run(case, **inputs)
        if trained:
            y.backward(torch.ones_like(y))

    step()  # what a first call makes and keeps
    for name in trained:
        inputs[name].grad = None
    found = peak_bytes(step)
    returned = sum(inputs[n].numel() * inputs[n].element_size() for n in trained or ("x",))
    return None if found is None else (found - returned) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help=f"some of {', '.join(CASES)}, separated by commas")
    names = parser.parse_args().case
    variants = bench_moe.VARIANTS
    print("| case | mode | " + " | ".join(f"{name}, MiB" for name in variants) + " |")
    print("| --- | --- | " + " | ".join("---" for _ in variants) + " |")
    fresh = multiprocessing.get_context("spawn")
    for name in CASES if names is None else names.split(","):
        for mode in MODES:
            shown = []
            for variant_name, variant in variants.items():
                if not variant.applies(bench_moe.CASES[name]):
                    shown.append("")
                    continue
                with fresh.Pool(1) as process:
                    mib = process.apply(peak_mib, (name, variant_name, mode))
                shown.append("not measurable here" if mib is None else f"{mib:.0f}")
            print(f"| {name} | {mode} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
