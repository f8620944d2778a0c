"""What the benchmarks on a GPU share: arguments, a budget of time, a table and a JSON file.

`run` does steps until the time is spent and writes both files after each; `of_room` makes it of a
room's bench_NAME.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from tilewright import files
from tilewright.bench import ceilings as machine
from tilewright.bench import report
from tilewright.bench import run as bench
from tilewright.bench.timing import first_line
from tilewright.bench.variant import Variant

DRY_SECONDS = 0.01

# (seconds for each variant, ceilings) -> the rows, and what of ours was wrong or ""
Step = Callable[[float, machine.Ceilings], tuple[list, str]]
Case = tuple[str, dict, str, str]  # name, case, dtype, mode


def run(
    argv: list[str] | None,
    *,
    name: str,
    doc: str,
    budget: float,
    seconds: float,
    options: dict,
    steps: Callable[[str], Iterable[tuple[str, Step]]],
    shown: Callable[[list, dict, machine.Ceilings], tuple[dict, list[str]]],
    has_failed: Callable[..., bool],
) -> int:
    """0, or 1 if a result was wrong or an implementation of ours raised.

    budget      default, seconds of all steps together; what is left out then is listed
    seconds     default, for each variant of a case
    options     what the record of the machine says beside the machine
    steps       device -> (label, Step) for each case, small ones on a CPU
    shown       (rows, environment, ceilings) -> (the record, the lines above what was wrong)
    has_failed  whether a row is one of ours and has no time
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"where {name}.json and {name}.md go")
    parser.add_argument("--budget", type=float, default=budget, help="seconds, all cases together")
    parser.add_argument("--seconds", type=float, default=seconds, help="for a variant of a case")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run runs small shapes on the CPU")
    args.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    try:
        limits = machine.measure(device)
    except RuntimeError as error:  # the cases are still worth their time
        limits = machine.Ceilings(None, None, None, None, f"not measured: {first_line(error)}")
    where = report.environment(device, options)
    rows: list = []
    wrong: list[str] = []
    left_out: list[str] = []

    def write() -> None:
        record, lines = shown(rows, where, limits)
        found = {"ceilings": asdict(limits), "wrong": wrong, "left_out": left_out}
        files.write_json(args.folder / f"{name}.json", {**record, **found})
        lines = [*lines, *(f"\nWrong: {line}" for line in wrong)]
        lines += [f"\nNo time was left for {line}." for line in left_out]
        files.write_text(args.folder / f"{name}.md", "\n".join(lines) + "\n")

    for label, step in steps(device):
        if time.perf_counter() - begin > args.budget:
            left_out.append(label)
            continue
        print(f"gpu_{name}: {label}", file=sys.stderr, flush=True)
        try:
            new, words = step(DRY_SECONDS if args.dry_run else args.seconds, limits)
        except Exception as error:  # the other cases are still worth their time
            new, words = [], first_line(error)
        rows += new
        if words:
            wrong.append(f"{label}: {words}")
        write()
    write()
    print((args.folder / f"{name}.md").read_text())
    return 1 if wrong or any(map(has_failed, rows)) else 0


def is_ours_without_time(row: dict) -> bool:
    """Of a row of gpu_attention.py or gpu_linear.py."""
    return row["variant"].startswith(report.OURS) and row["times"] is None


def replayed(function: Callable) -> Callable:
    """The function as a CUDA graph: what is left once launching costs nothing."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and fills caches outside the capture
        function()
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def of_room(
    argv: list[str] | None,
    *,
    name: str,
    doc: str,
    budget: float,
    room: ModuleType,
    cases: Callable[[bool], list[Case]],
    variants: dict[str, Variant] | None = None,
    also: Callable[[dict[str, Variant], dict, str, str, str], dict] | None = None,
    also_shown: Callable[[dict[str, dict]], tuple[dict, list[str]]] | None = None,
) -> int:
    """`run` over cases of bench_NAME.py: each first against float64 in a small shape, then timed.

    cases       is_dry -> the cases
    variants    default: the room's
    also        (variants, case, dtype, mode, device) -> what else is measured of a case
    also_shown  {label: what `also` gave} -> (for the record, lines below the table)
    """
    known = room.VARIANTS if variants is None else variants
    extra: dict[str, dict] = {}

    def steps(device: str):
        is_dry = device == "cpu"
        # what `bench.measure` reads
        options = argparse.Namespace(device=device, quick=is_dry, flush_cache=False, seconds=0.0)
        here = {
            n: v for n, v in known.items() if v.why_not() is None and not (is_dry and v.compiles)
        }
        for case_name, case, dtype, mode in cases(is_dry):
            label = f"{case_name} {dtype} {mode}"
            taking_part = {n: v for n, v in here.items() if v.applies(case)}

            def step(seconds, limits, case_name=case_name, case=case, dtype=dtype, mode=mode,
                     label=label, taking_part=taking_part):  # fmt: skip
                options.seconds = seconds
                errors = bench.check(room, case, dtype, mode, device, taking_part)
                rows = bench.measure(
                    room, case_name, case, dtype, mode, options, taking_part, errors, limits, {}
                )
                if also is not None:
                    extra[label] = also(taking_part, case, dtype, mode, device)
                return rows, errors[report.OURS][1]

            yield label, step

    def shown(rows, where, limits):
        record = report.as_record(name, where, limits, rows)
        lines = [report.header(name, where, limits), report.table_head()]
        lines += [report.table_line(row) for row in rows]
        if also_shown is not None:
            more, words = also_shown(extra)
            record, lines = {**record, **more}, lines + words
        return record, lines

    return run(
        argv, name=name, doc=doc, budget=budget, seconds=0.3, options={}, steps=steps, shown=shown,
        has_failed=lambda row: row.variant == report.OURS and row.times is None,
    )  # fmt: skip
