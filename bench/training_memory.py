"""What a training step takes in memory: ours and stock, each in a process of its own.

    python -m tilewright.bench.training_memory [--case NAME] [--quick]

Two figures for a step that is not the first: how far the process rises during it (gradients,
activations, scratch), and the highest that it then is above where it was before the model was built
(weights, moments and scratch that is kept too).
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence

import torch

from tilewright import memory
from tilewright.bench import bench_training, training_model
from tilewright.bench.report import OURS

VARIANTS = tuple(name for name, v in bench_training.VARIANTS.items() if not v.compiles)
DTYPE = torch.bfloat16
STEPS_BEFORE = 2  # which make moments and scratch


def of_a_step(name: str, variant: str, is_quick: bool) -> tuple[float, float] | None:
    """MiB: the rise, and the peak; None where the system does not tell."""
    case = bench_training.CASES[name]
    if is_quick:
        case = bench_training.quick(case)
    inputs = bench_training.make_inputs(case, DTYPE, "cpu")
    training_model.weights(case["shape"])  # kept by the benchmark beside the model's
    before = memory.resident_bytes()
    chosen = bench_training.VARIANTS[variant]
    made = chosen.prepare(case, inputs)
    for _ in range(STEPS_BEFORE):
        chosen.run(case, **made)
    held = memory.resident_bytes()
    rise = memory.peak_bytes(lambda: chosen.run(case, **made))
    if before is None or held is None or rise is None:
        return None
    return rise / 2**20, (held - before + rise) / 2**20


def table(found: dict[str, dict[str, tuple[float, float] | None]]) -> list[str]:
    """A line for each variant of each case, with how many times ours it takes."""
    lines = ["| case | variant | rise, MiB | of ours | peak, MiB | of ours |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, variants in found.items():
        ours = variants.get(OURS)
        for variant, figures in variants.items():
            if figures is None:
                cells = ["not measurable here", "", "", ""]
            else:
                cells = []
                for at, mib in enumerate(figures):
                    cells += [f"{mib:.0f}", f"{mib / ours[at]:.2f}" if ours else ""]
            lines.append(f"| {name} | {variant} | {' | '.join(cells)} |")
    return lines


def measure(names: Sequence[str], is_quick: bool) -> dict:
    """{case: {variant: figures}}."""
    # a fresh process a variant: no other has left freed memory or scratch there
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {
            name: {v: pool.apply(of_a_step, (name, v, is_quick)) for v in VARIANTS}
            for name in names
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=bench_training.CASES,
                        help="default: all")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a smaller model, 512 tokens")
    args = parser.parse_args(argv)
    why_not = bench_training.why_not()
    if why_not is not None:
        parser.error(why_not)
    print("\n".join(table(measure(args.case or list(bench_training.CASES), args.quick))))
    return 0


if __name__ == "__main__":
    main()
