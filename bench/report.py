"""What a benchmark run leaves behind: the table's rows, a JSON line, a CSV in long form, bars."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import tilewright
from tilewright import doctor, native, settings
from tilewright.bench.ceilings import Ceilings
from tilewright.bench.timing import Times

OURS = "tilewright"


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    times        None if it was not timed; why_not then says why
    operations   what the formula needs at least, the same for all variants of the case
    n_bytes      the same for bytes
    least_us     what the machine's ceilings allow for that work, or None
    bound        "compute" or "memory": which ceiling that is
    ours_us      our median for the case, or None
    error        root mean square against float64, over that of the truth; the worst of output and
                 gradients, in a small shape; None if it was not compared
    counts       what one call gets through, by unit: shown for each second
    """

    case: str
    dtype: str
    mode: str
    variant: str
    times: Times | None
    why_not: str
    operations: float
    n_bytes: float
    least_us: float | None
    bound: str
    ours_us: float | None
    error: float | None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def gflops(self) -> float | None:
        return self.operations / self.times.median_us / 1e3 if self.times else None

    @property
    def gbps(self) -> float | None:
        return self.n_bytes / self.times.median_us / 1e3 if self.times else None

    @property
    def share(self) -> float | None:
        """Of the ceiling: 1 would be the machine's best."""
        return self.least_us / self.times.median_us if self.times and self.least_us else None

    @property
    def ratio(self) -> float | None:
        """How many times our time this variant takes: above 1 we are faster."""
        return self.times.median_us / self.ours_us if self.times and self.ours_us else None

    @property
    def per_second(self) -> dict[str, float]:
        """By unit, from the median; empty without times."""
        if self.times is None:
            return {}
        return {unit: 1e6 * n / self.times.median_us for unit, n in self.counts.items()}


COLUMNS = {  # heading: width
    "case": 17, "dtype": 8, "mode": 7, "variant": 24, "median": 10, "20-80 %": 23, "GFLOP/s": 8,
    "GB/s": 7, "of ceiling": 13, "time / ours": 11, "error": 8,
}  # fmt: skip


def _columns(units: Iterable[str]) -> dict[str, int]:
    rates = [f"{unit}/s" for unit in units]
    return COLUMNS | {rate: max(len(rate), 10) for rate in rates}


def table_head(units: Iterable[str] = ()) -> str:
    """The head of a table whose rows count these units."""
    columns = _columns(units)
    heads = (f"{name:<{width}}" for name, width in columns.items())
    rules = ("-" * width for width in columns.values())
    return f"| {' | '.join(heads)} |\n| {' | '.join(rules)} |"


def table_line(row: Row) -> str:
    """One line of the Markdown table."""
    if row.times is None:
        n_empty = 6 + len(row.counts)
        cells = [row.case, row.dtype, row.mode, row.variant, row.why_not, *[""] * n_empty]
    else:
        quantiles = f"{duration(row.times.q20_us)} - {duration(row.times.q80_us)}"
        share = f"{row.share:.0%} {row.bound}" if row.share else ""
        cells = [
            row.case, row.dtype, row.mode, row.variant, duration(row.times.median_us), quantiles,
            f"{row.gflops:.1f}", f"{row.gbps:.1f}", share,
            f"{row.ratio:.2f}" if row.ratio else "", f"{row.error:.1e}" if row.error else "",
            *(f"{rate:.0f}" for rate in row.per_second.values()),
        ]  # fmt: skip
    widths = _columns(row.counts).values()
    return f"| {' | '.join(f'{c:<{w}}' for c, w in zip(cells, widths, strict=True))} |"


def duration(us: float) -> str:
    if us >= 1e6:
        return f"{us / 1e6:.3f} s"
    return f"{us / 1e3:.3f} ms" if us >= 1e3 else f"{us:.1f} us"


def environment(device: str, options: dict) -> dict:
    """What a figure cannot be read without."""
    on_cuda = torch.device(device).type == "cuda"
    why_not = native.why_not_native()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name() if on_cuda else doctor.processor_name(),
        "cores": doctor.usable_cores(),
        "threads": torch.get_num_threads(),
        "level": native.native().isa() if why_not is None else why_not,
        "revision": revision(),
        "tilewright": tilewright.__version__,
        "torch": torch.__version__,
        "triton": doctor.installed_version("triton"),
        "python": platform.python_version(),
        "settings": settings.describe(),
        "options": options,
    }


def revision() -> str | None:
    """The source folder's commit, with a + if files differ from it; None without such a folder."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def header(operator: str, where: dict, ceilings: Ceilings) -> str:
    """The environment and the ceilings in a few lines above the table."""
    lines = [
        f"# tilewright bench {operator}",
        "",
        f"{where['machine']}, {where['cores']} cores, {where['threads']} threads, level "
        f"{where['level']}; tilewright {where['tilewright']} revision {where['revision']}, torch "
        f"{where['torch']}, triton {where['triton']}, Python {where['python']}; {where['date']}",
    ]
    rates = (
        ("float32", ceilings.fma, "GFLOP/s"),
        ("bf16 dot", ceilings.bf16_dot, "GFLOP/s"),
        ("int8 dot", ceilings.int8_dot, "GOP/s"),
        ("memory", ceilings.read, "GB/s"),
    )
    parts = [f"{name} {rate:.0f} {unit}" if rate else f"{name} none" for name, rate, unit in rates]
    lines += [f"Ceilings: {', '.join(parts)} ({ceilings.how})", ""]
    return "\n".join(lines)


def as_record(operator: str, where: dict, ceilings: Ceilings, rows: list[Row]) -> dict:
    results = [
        {
            **asdict(row),
            "gflops": row.gflops,
            "gbps": row.gbps,
            "share_of_ceiling": row.share,
            "time_over_ours": row.ratio,
            "per_second": row.per_second,
        }
        for row in rows
    ]
    return {
        "operator": operator,
        "environment": where,
        "ceilings": asdict(ceilings),
        "results": results,
    }


def append_json(path: Path, record: dict) -> None:
    """One run is one line; earlier runs stay."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


# Liger's long form first, so that its readers can read ours, then what it has no column for
CSV_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "version", "device", "dtype", "gflops",
    "gbps", "share_of_ceiling", "baseline", "time_over_ours", "error", "torch", "triton", "git",
)  # fmt: skip
LIGER_MODES = {"fwd": "forward", "fwd+bwd": "full"}


def append_csv(path: Path, operator: str, where: dict, device: str, rows: list[Row]) -> None:
    """One line a timed variant, and one for each unit that it counts; the head is written once."""
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        if is_new:
            writer.writeheader()
        for row in rows:
            if row.times is None:
                continue
            line = {
                "kernel_name": operator, "kernel_provider": row.variant,
                "kernel_operation_mode": LIGER_MODES[row.mode], "metric_name": "speed",
                "metric_unit": "ms", "x_name": "case", "x_label": "case", "x_value": row.case,
                "y_value_50": row.times.median_us / 1e3, "y_value_20": row.times.q20_us / 1e3,
                "y_value_80": row.times.q80_us / 1e3,
                "extra_benchmark_config_str": json.dumps(where["options"]),
                "gpu_name": where["machine"], "timestamp": where["date"],
                "version": where["tilewright"], "device": device, "dtype": row.dtype,
                "gflops": row.gflops, "gbps": row.gbps, "share_of_ceiling": row.share,
                "baseline": OURS, "time_over_ours": row.ratio, "error": row.error,
                "torch": where["torch"], "triton": where["triton"], "git": where["revision"],
            }  # fmt: skip
            writer.writerow(line)
            for unit, n in row.counts.items():
                rates = {
                    "metric_name": "throughput", "metric_unit": f"{unit}/s",
                    "y_value_50": 1e6 * n / row.times.median_us,
                    "y_value_20": 1e6 * n / row.times.q80_us,  # slow is few
                    "y_value_80": 1e6 * n / row.times.q20_us,
                }  # fmt: skip
                writer.writerow(line | rates)


def rate_and_spread(row: Row) -> tuple[float, float, float]:
    """GFLOP/s of a timed row, and how far the quantiles reach below and above it."""
    assert row.times is not None
    times = row.times.q80_us, row.times.median_us, row.times.q20_us
    slow, rate, fast = (row.operations / us / 1e3 for us in times)
    return rate, rate - slow, fast - rate


def plot(folder: Path, operator: str, where: dict, rows: list[Row]) -> Path:
    """Bars of GFLOP/s with the 20 % and 80 % quantiles, a group for each case; returns the PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "bench: --plot needs matplotlib; install it with "
            "`pip install -c constraints.txt '.[plot]'`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.times]
    groups = list(dict.fromkeys((row.case, row.dtype, row.mode) for row in timed))
    variants = list(dict.fromkeys(row.variant for row in timed))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups)), 4.5))
    width = 0.8 / max(len(variants), 1)
    for index, variant in enumerate(variants):
        mine = {(row.case, row.dtype, row.mode): row for row in timed if row.variant == variant}
        places = [i for i, group in enumerate(groups) if group in mine]
        bars = [rate_and_spread(mine[groups[i]]) for i in places]
        rates, low, high = ([bar[part] for bar in bars] for part in range(3))
        axes.bar([i + index * width for i in places], rates, width, yerr=[low, high], label=variant)
    labels = [f"{case}\n{dtype} {mode}" for case, dtype, mode in groups]
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(groups))], labels, rotation=45, ha="right"
    )
    axes.set_ylabel("GFLOP/s (median, 20-80 %)")
    axes.set_title(f"{operator}: {where['machine']}, {where['threads']} threads")
    axes.legend()
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench_{operator}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
