"""`tilewright bench NAME`: check each variant in a small shape, then time all side by side."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from tilewright.bench import ceilings as machine
from tilewright.bench import report
from tilewright.bench.report import OURS, Row
from tilewright.bench.timing import Times, first_line, time_interleaved
from tilewright.bench.variant import Variant, call

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("fwd", "fwd+bwd")


def benchmarks() -> list[str]:
    """What has a benchmark: operators, and models end to end."""
    folder = Path(__file__).parent
    return sorted(p.stem.removeprefix("bench_") for p in folder.glob("bench_*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark. Returns 1 if a result of ours was wrong, never for a slow one, else 0.

    ValueError: an option names what does not exist, or something is missing that the benchmark
    needs.
    """
    args = _parser().parse_args(argv)
    room = importlib.import_module(f"tilewright.bench.bench_{args.op}")
    why_not = room.why_not() if hasattr(room, "why_not") else None
    if why_not is not None:
        raise ValueError(f"bench: {args.op} cannot run: {why_not}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"bench: --threads is {args.threads}, need at least 1")
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device is cuda, but torch.cuda.is_available() is False")
    for path in (args.json, args.csv):
        if path:
            Path(path).open("a").close()  # known before minutes are spent
    cases = _chosen("--case", args.case, room.CASES)
    is_smaller = args.quick and hasattr(room, "quick")
    if is_smaller:
        cases = {name: room.quick(case) for name, case in cases.items()}
    variants = _chosen("--providers", args.providers, room.VARIANTS)
    left_out = [name for name, v in variants.items() if v.compiles and args.quick]
    missing = {name: v.why_not() for name, v in variants.items() if name not in left_out}
    variants = {name: variants[name] for name, reason in missing.items() if reason is None}
    runs = [
        (name, case, dtype, mode)
        for name, case in cases.items()
        for dtype in ([args.dtype] if args.dtype else case["dtypes"])
        for mode in ([args.mode] if args.mode else case["modes"])
        if mode in case["modes"]
    ]
    if not runs:
        raise ValueError(f"bench: none of the cases {', '.join(cases)} has mode {args.mode}")

    files = ("json", "csv", "plot")  # where results go says nothing about them
    options = {
        name: value
        for name, value in vars(args).items()
        if value not in (None, False) and name not in files
    }
    where = report.environment(args.device, options)
    ceilings = machine.measure(args.device)
    print(report.header(args.op, where, ceilings))
    if left_out:
        print(f"Left out by --quick: {', '.join(left_out)}\n")
    for name, reason in missing.items():
        if reason is not None:
            print(f"Left out, {name}: {reason}\n")
    if is_smaller:
        print("By --quick in smaller shapes than those that the names stand for.\n")
    counted = {name: room.counts(c) if hasattr(room, "counts") else {} for name, c in cases.items()}
    units = dict.fromkeys(unit for counts in counted.values() for unit in counts)
    print(report.table_head(units), flush=True)
    rows: list[Row] = []
    wrong: list[str] = []
    for number, (name, case, dtype, mode) in enumerate(runs, 1):
        print(f"bench {number}/{len(runs)}: {name} {dtype} {mode}", file=sys.stderr, flush=True)
        taking_part = {n: v for n, v in variants.items() if v.applies(case)}
        errors = {} if args.no_check else check(room, case, dtype, mode, args.device, taking_part)
        if errors.get(OURS, (0.0, ""))[1]:
            wrong.append(f"{name} {dtype} {mode}: {errors[OURS][1]}")
        new = measure(
            room, name, case, dtype, mode, args, taking_part, errors, ceilings, counted[name]
        )
        for row in new:
            print(report.table_line(row), flush=True)
        rows += new
    if args.json:
        report.append_json(Path(args.json), report.as_record(args.op, where, ceilings, rows))
    if args.csv:
        report.append_csv(Path(args.csv), args.op, where, args.device, rows)
    if args.plot:
        print(f"\nwrote {report.plot(Path(args.plot), args.op, where, rows)}")
    for line in wrong:
        print(f"bench: wrong result, so no speed is shown: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tilewright bench", description=__doc__)
    parser.add_argument("op", choices=benchmarks(), help="an operator, or a model end to end")
    parser.add_argument("--providers", help="these variants alone, by name, separated by commas")
    parser.add_argument("--case", help="these cases alone, by name, separated by commas")
    parser.add_argument("--mode", choices=MODES, help="default: every mode of the case")
    parser.add_argument("--dtype", choices=DTYPES, help="default: every dtype of the case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S",
                        help="time spent on each variant of each case (default 2)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a tenth of the time, small models, nothing compiled")  # fmt: skip
    parser.add_argument("--flush-cache", action="store_true",
                        help="displace the caches before every sample")  # fmt: skip
    parser.add_argument("--no-check", action="store_true", help="do not compare with the reference")
    parser.add_argument("--csv", metavar="FILE", help="append a line for each timed variant")
    parser.add_argument("--json", metavar="FILE", help="append the run as one line")
    parser.add_argument("--plot", metavar="FOLDER", help="write bars as a PNG")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _chosen(option: str, names: str | None, known: dict) -> dict:
    if names is None:
        return dict(known)
    wanted = [name.strip() for name in names.split(",")]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"bench: {option} names {', '.join(missing)}; known are {', '.join(known)}"
        )
    return {name: known[name] for name in wanted}


def gradients_of(room: ModuleType, case: dict, mode: str) -> tuple[str, ...]:
    """The inputs whose gradients are part of the work: the room's, or the case's own."""
    return case.get("gradients", room.GRADIENTS) if mode == "fwd+bwd" else ()


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def check(
    room: ModuleType, case: dict, dtype: str, mode: str, device: str, variants: dict[str, Variant]
) -> dict[str, tuple[float | None, str]]:
    """For each variant its error and what is wrong with it ("" if nothing), in a small shape.

    The error is the root mean square of the difference from float64 over that of the truth, the
    worst of output and gradients. Ours may err at most twice as much as plain torch in the same
    dtype, or by one last rounding. Of a baseline the error is shown and not judged.
    """
    gradients = gradients_of(room, case, mode)
    results: dict[str, tuple[float | None, str]] = {}
    for name, variant in variants.items():
        if variant.compiles:
            continue
        its_case = {**room.small(case), **variant.computes}
        inputs = room.make_inputs(its_case, DTYPES[dtype], device)
        exact = {
            n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for n, t in inputs.items()
        }
        truth = call(Variant(room.truth), its_case, exact, gradients)()
        stock = call(Variant(room.stock), its_case, inputs, gradients)()
        try:
            got = call(variant, its_case, inputs, gradients)()
        except Exception as error:  # the same error stands in the table in place of a time
            results[name] = (None, first_line(error) if name == OURS else "")
            continue
        worst, wrong = 0.0, ""
        for part, t, s, g in zip(("output", *gradients), truth, stock, got, strict=True):
            size, last_rounding = rms(t), torch.finfo(DTYPES[dtype]).eps / 2
            miss = rms(variant.restore(g).double() - t)
            budget = max(2 * rms(s.double() - t), last_rounding * size)
            worst = max(worst, miss / size if size else miss)
            if not miss <= budget and name == OURS:  # NaN is wrong
                wrong = wrong or f"{part} errs by {miss:.2e}, at most {budget:.2e} is right"
        results[name] = (worst, wrong)
    return results


def measure(
    room, case_name, case, dtype, mode, args, variants, errors, ceilings, counts
) -> list[Row]:
    """Time the variants of one case; ours is not timed if it was found wrong."""
    gradients = gradients_of(room, case, mode)
    inputs = room.make_inputs(case, DTYPES[dtype], args.device)
    functions: dict = {}
    outcome: dict[str, Times | str] = {}
    if any(variant.compiles for variant in variants.values()):
        torch.compiler.reset()  # torch compiles one function for a few shapes, then refuses
    for name, variant in variants.items():
        if errors.get(name, (0.0, ""))[1]:
            outcome[name] = f"wrong: {errors[name][1]}"
            continue
        try:
            functions[name] = call(variant, {**case, **variant.computes}, inputs, gradients)
        except Exception as error:
            outcome[name] = first_line(error)
    times = time_interleaved(
        functions,
        device=args.device,
        seconds=args.seconds / (10 if args.quick else 1),
        min_samples=3 if args.quick else 5,
        flush_cache=args.flush_cache,
    )
    outcome |= times
    operations, n_bytes = room.work(case, DTYPES[dtype].itemsize, mode)
    multiplied = getattr(room, "multiplied", lambda case, dtype: dtype)(case, DTYPES[dtype])
    least_us, bound = ceilings.least_us(operations, n_bytes, multiplied)
    ours = outcome.get(OURS)
    rows = []
    for name in variants:
        result = outcome[name]
        rows.append(
            Row(
                case=case_name, dtype=dtype, mode=mode, variant=name,
                times=None if isinstance(result, str) else result,
                why_not=result if isinstance(result, str) else "",
                operations=operations, n_bytes=n_bytes, least_us=least_us, bound=bound,
                ours_us=None if ours is None or isinstance(ours, str) else ours.median_us,
                error=errors.get(name, (None, ""))[0], counts=counts,
            )
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
