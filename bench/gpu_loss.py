"""Head and cross-entropy on a GPU: bench_loss.py with four times the tokens, and Liger's kernel.

    python -m tilewright.bench.gpu_loss DIR [--budget S] [--seconds S] [--dry-run]

Bound by three products: the table shows TFLOP/s and the share of what this GPU's products reached
in the same run. Ours is first compared with float64 in a small shape. Peak memory, beyond inputs
and gradients, stands below the table. Cases that no time was left for are listed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tilewright.bench import bench_loss, report, run
from tilewright.bench import ceilings as machine
from tilewright.bench.timing import first_line
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


def cases(is_dry: bool) -> list[tuple[str, dict, str]]:
    """(name, case, mode): every mode of every case."""
    found = []
    for name, case in bench_loss.CASES.items():
        more = bench_loss.small(case) if is_dry else {**case, "T": TIMES_TOKENS * case["T"]}
        found += [(name, more, mode) for mode in case["modes"]]
    return found


def peak_mib(variant: Variant, case: dict, mode: str, device: str) -> float | None:
    """Beyond what lies there before, and the gradients that come out."""
    if device != "cuda":
        return None
    gradients = run.gradients_of(bench_loss, case, mode)
    inputs = bench_loss.make_inputs(case, run.DTYPES[DTYPE], device)
    function = call(variant, case, inputs, gradients)
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    returned = sum(inputs[name].numel() * inputs[name].element_size() for name in gradients)
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def main(argv=None) -> int:
    """0, or 1 if a result was wrong or an implementation of ours raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where loss.json and loss.md go")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds, all cases together")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each variant of a case")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run runs small shapes on the CPU")
    args.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    limits = machine.measure(device)
    # what `run.measure` reads
    options = argparse.Namespace(device=device, quick=args.dry_run, flush_cache=False,
                                 seconds=0.05 if args.dry_run else args.seconds)  # fmt: skip
    rows: list[report.Row] = []
    wrong, left_out = [], []
    memory: dict[str, dict[str, float | None]] = {}
    variants = {
        name: v
        for name, v in VARIANTS.items()
        if v.why_not() is None and not (args.dry_run and v.compiles)
    }
    for name, case, mode in cases(args.dry_run):
        if time.perf_counter() - begin > args.budget:
            left_out.append(f"{name} {mode}")
            continue
        print(f"gpu_loss: {name} {mode}", file=sys.stderr, flush=True)
        taking_part = {n: v for n, v in variants.items() if v.applies(case)}
        try:
            errors = run.check(bench_loss, case, DTYPE, mode, device, taking_part)
            if errors[report.OURS][1]:
                wrong.append(f"{name} {mode}: {errors[report.OURS][1]}")
            rows += run.measure(
                bench_loss, name, case, DTYPE, mode, options, taking_part, errors, limits, {}
            )
            memory[f"{name} {mode}"] = {
                n: peak_mib(v, case, mode, device) for n, v in taking_part.items()
            }
        except Exception as error:  # the other cases are still worth their time
            wrong.append(f"{name} {mode}: {first_line(error)}")
        _write(args.folder, rows, wrong, left_out, limits, device, memory)
    _write(args.folder, rows, wrong, left_out, limits, device, memory)
    print((args.folder / "loss.md").read_text())
    failed = [row for row in rows if row.variant == report.OURS and row.times is None]
    return 1 if wrong or failed else 0


def _write(folder: Path, rows, wrong, left_out, limits, device, memory) -> None:
    where = report.environment(device, {"dtype": DTYPE})
    record = report.as_record("loss", where, limits, rows) | {
        "ceilings": asdict(limits), "wrong": wrong, "left_out": left_out, "peak_mib": memory,
    }  # fmt: skip
    (folder / "loss.json").write_text(json.dumps(record, indent=1))
    lines = [report.header("loss", where, limits), report.table_head()]
    lines += [report.table_line(row) for row in rows]
    for name, found in memory.items():
        known = [f"{n} {mib:.0f} MiB" for n, mib in found.items() if mib is not None]
        if known:
            lines.append(f"\nPeak memory of {name}: {', '.join(known)}.")
    lines += [f"\nWrong: {line}" for line in wrong]
    lines += [f"\nNo time was left for {line}." for line in left_out]
    (folder / "loss.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
