"""Experts' MLPs on a GPU beside torch._grouped_mm and transformers' paths; a table, a JSON file.

    python -m tilewright.bench.gpu_moe DIR [--budget S] [--seconds S] [--dry-run]

The cases of bench_moe.py with models' own sizes, dense weights in bfloat16. The table shows TFLOP/s
of what the formula needs (three products of each slot, in the backward twice as many) and the share
of the product that was measured in the same run; decoding shows GB/s of the weights of the experts
that have tokens. Ours is first compared with float64 in a small shape. Cases that no time was left
for are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from tilewright.bench import bench_moe, report, run
from tilewright.bench import ceilings as machine
from tilewright.bench.timing import first_line
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


def cases(is_dry: bool) -> list[tuple[str, dict, str]]:
    """(name, case, mode): every mode of every case."""
    return [
        (name, bench_moe.small(case) if is_dry else case, mode)
        for name, case in CASES.items()
        for mode in case["modes"]
    ]


def main(argv=None) -> int:
    """0, or 1 if a result was wrong or an implementation of ours raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where moe.json and moe.md go")
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
    variants = {n: v for n, v in VARIANTS.items() if not (args.dry_run and v.compiles)}
    for name, case, mode in cases(args.dry_run):
        if time.perf_counter() - begin > args.budget:
            left_out.append(f"{name} {mode}")
            continue
        print(f"gpu_moe: {name} {mode}", file=sys.stderr, flush=True)
        taking_part = {n: v for n, v in variants.items() if v.applies(case)}
        try:
            errors = run.check(bench_moe, case, DTYPE, mode, device, taking_part)
            if errors[report.OURS][1]:
                wrong.append(f"{name} {mode}: {errors[report.OURS][1]}")
            rows += run.measure(
                bench_moe, name, case, DTYPE, mode, options, taking_part, errors, limits, {}
            )
        except Exception as error:  # the other cases are still worth their time
            wrong.append(f"{name} {mode}: {first_line(error)}")
        _write(args.folder, rows, wrong, left_out, limits, device)
    _write(args.folder, rows, wrong, left_out, limits, device)
    print((args.folder / "moe.md").read_text())
    failed = [row for row in rows if row.variant == report.OURS and row.times is None]
    return 1 if wrong or failed else 0


def _write(folder: Path, rows, wrong, left_out, limits, device) -> None:
    where = report.environment(device, {"dtype": DTYPE})
    record = report.as_record("moe", where, limits, rows) | {
        "ceilings": asdict(limits), "wrong": wrong, "left_out": left_out,
    }  # fmt: skip
    (folder / "moe.json").write_text(json.dumps(record, indent=1))
    lines = [report.header("moe", where, limits), report.table_head()]
    lines += [report.table_line(row) for row in rows]
    lines += [f"\nWrong: {line}" for line in wrong]
    lines += [f"\nNo time was left for {line}." for line in left_out]
    (folder / "moe.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
