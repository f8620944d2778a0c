"""Optimizer steps on a GPU: the cases of bench_optim.py beside torch's fused and foreach.

    python -m tilewright.bench.gpu_optim DIR [--budget S] [--seconds S] [--dry-run]

Bound by memory: the table shows GB/s of what has to be read and written once, and the share of the
bandwidth that was measured in the same run. Ours is first compared with float64 in a small shape.
Cases that no time was left for are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tilewright.bench import bench_optim, report, run
from tilewright.bench import ceilings as machine
from tilewright.bench.timing import first_line

TIMES_TENSORS = 4  # of bench_optim.py's large cases


def cases(is_dry: bool) -> list[tuple[str, dict, str]]:
    """(name, case, dtype) of every case."""
    found = []
    for name, case in bench_optim.CASES.items():
        more = {**case, "P": TIMES_TENSORS * case["P"]} if case["N"] > 10_000 else case
        found += [(name, bench_optim.small(case) if is_dry else more, d) for d in case["dtypes"]]
    return found


def main(argv=None) -> int:
    """0, or 1 if a result was wrong or an implementation of ours raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where optim.json and optim.md go")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds, all cases together")
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
    for name, case, dtype in cases(args.dry_run):
        if time.perf_counter() - begin > args.budget:
            left_out.append(name)
            continue
        print(f"gpu_optim: {name}", file=sys.stderr, flush=True)
        missing = {n: v.why_not() for n, v in bench_optim.VARIANTS.items()}
        taking_part = {
            n: v for n, v in bench_optim.VARIANTS.items() if missing[n] is None and v.applies(case)
        }
        try:
            errors = run.check(bench_optim, case, dtype, "fwd", device, taking_part)
            if errors[report.OURS][1]:
                wrong.append(f"{name}: {errors[report.OURS][1]}")
            rows += run.measure(
                bench_optim, name, case, dtype, "fwd", options, taking_part, errors, limits, {}
            )
        except Exception as error:  # the other cases are still worth their time
            wrong.append(f"{name}: {first_line(error)}")
    _write(args.folder, rows, wrong, left_out, limits, device)
    print((args.folder / "optim.md").read_text())
    failed = [row for row in rows if row.variant == report.OURS and row.times is None]
    return 1 if wrong or failed else 0


def _write(folder: Path, rows, wrong, left_out, limits, device) -> None:
    where = report.environment(device, {})
    record = report.as_record("optim", where, limits, rows) | {
        "ceilings": asdict(limits), "wrong": wrong, "left_out": left_out,
    }  # fmt: skip
    (folder / "optim.json").write_text(json.dumps(record, indent=1))
    lines = [report.header("optim", where, limits), report.table_head()]
    lines += [report.table_line(row) for row in rows]
    lines += [f"\nWrong: {line}" for line in wrong]
    lines += [f"\nNo time was left for {line}." for line in left_out]
    (folder / "optim.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
