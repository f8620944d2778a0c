"""Norms, rotary positions, gates, embeddings on a GPU: bench_norm.py with more tokens.

    python -m tilewright.bench.gpu_norm DIR [--budget S] [--seconds S] [--dry-run]

Bound by memory: the table shows GB/s of what has to be read and written once, and the share of the
bandwidth that was measured in the same run. Eight times the tokens of bench_norm.py, so that a call
takes longer than its launch. Ours is first compared with float64 in a small shape. Cases that no
time was left for are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tilewright.bench import bench_norm, report, run
from tilewright.bench import ceilings as machine
from tilewright.bench.timing import first_line

DTYPE = "bf16"
TIMES_TOKENS = 8
SKIPPED = ("rms-1-4096", "layer-64-384", "rope-1-32x128", "swiglu-1-11008")  # a launch and no more


def cases(is_dry: bool) -> list[tuple[str, dict, str]]:
    """(name, case, mode): every mode of every case."""
    found = []
    for name, case in bench_norm.CASES.items():
        if name in SKIPPED:
            continue
        more = bench_norm.small(case) if is_dry else {**case, "T": TIMES_TOKENS * case["T"]}
        found += [(name, more, mode) for mode in case["modes"]]
    return found


def main(argv=None) -> int:
    """0, or 1 if a result was wrong or an implementation of ours raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where norm.json and norm.md go")
    parser.add_argument("--budget", type=float, default=110.0, help="seconds, all cases together")
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
    variants = {n: v for n, v in bench_norm.VARIANTS.items() if not (args.dry_run and v.compiles)}
    for name, case, mode in cases(args.dry_run):
        if time.perf_counter() - begin > args.budget:
            left_out.append(f"{name} {mode}")
            continue
        print(f"gpu_norm: {name} {mode}", file=sys.stderr, flush=True)
        taking_part = {n: v for n, v in variants.items() if v.applies(case)}
        try:
            errors = run.check(bench_norm, case, DTYPE, mode, device, taking_part)
            if errors[report.OURS][1]:
                wrong.append(f"{name} {mode}: {errors[report.OURS][1]}")
            rows += run.measure(
                bench_norm, name, case, DTYPE, mode, options, taking_part, errors, limits, {}
            )
        except Exception as error:  # the other cases are still worth their time
            wrong.append(f"{name} {mode}: {first_line(error)}")
        _write(args.folder, rows, wrong, left_out, limits, device)
    _write(args.folder, rows, wrong, left_out, limits, device)
    print((args.folder / "norm.md").read_text())
    failed = [row for row in rows if row.variant == report.OURS and row.times is None]
    return 1 if wrong or failed else 0


def _write(folder: Path, rows, wrong, left_out, limits, device) -> None:
    where = report.environment(device, {"dtype": DTYPE})
    record = report.as_record("norm", where, limits, rows) | {
        "ceilings": asdict(limits), "wrong": wrong, "left_out": left_out,
    }  # fmt: skip
    (folder / "norm.json").write_text(json.dumps(record, indent=1))
    lines = [report.header("norm", where, limits), report.table_head()]
    lines += [report.table_line(row) for row in rows]
    lines += [f"\nWrong: {line}" for line in wrong]
    lines += [f"\nNo time was left for {line}." for line in left_out]
    (folder / "norm.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
