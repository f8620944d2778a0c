"""The demo's results as a table and a plot; every number comes from the report it is given."""

from __future__ import annotations

import statistics
from pathlib import Path

from tilewright.files import replacing

MIB = 2**20


def as_text(report: dict) -> str:
    """The table of speed, memory and agreement, and what it was measured with."""
    phases = report["phases"]
    train, extend, made = phases["train"], phases["extend"], phases["generate"]
    steps, long_steps = train["step_ms"], extend["step_ms"]
    probe_ms, full_peak = extend["probe_step_ms"], extend["peak_bytes"]["tilewright_full"]
    peaks, long_peaks = phases["measure"]["peak_bytes"], extend["peak_bytes"]
    short = f"{train['rows']} x {train['context']} tokens"
    rows = [
        ("", "stock", "tilewright", ""),
        _timing(f"training step, {short}, ms", steps["stock"], steps["tilewright"]),
        _memory("peak memory of that step, MiB", peaks["stock"], peaks["tilewright"]),
        _timing(
            f"LoRA step, {extend['context']} tokens, full vs shifted, ms",
            long_steps["stock"], long_steps["tilewright"],
        ),
        _timing(
            "  the same, full vs full, ms", [probe_ms["stock"]], [probe_ms["tilewright_full"]]
        ),
        _memory("peak memory, full vs shifted, MiB", long_peaks["stock"], long_peaks["tilewright"]),
        _memory("  the same, full vs full, MiB", long_peaks["stock"], full_peak),
        _speed("generation, tokens/s", made["tokens_per_s"]),
        ("", "", "", ""),
        (
            f"last loss after {train['steps']} steps", f"{train['losses']['stock'][-1]:.4f}",
            f"{train['losses']['tilewright'][-1]:.4f}",
            f"largest gap of any step {train['largest_loss_gap']:.2g}",
        ),
        (
            "held-out loss", f"{train['held_out_loss']['stock']:.4f}",
            f"{train['held_out_loss']['tilewright']:.4f}",
            f"gap at the first step {train['first_loss_gap']:.2g}",
        ),
        (
            "logits of the same weights", "", "",
            f"largest gap {train['largest_logit_gap']:.2g} of {train['largest_logit']:.3g}",
        ),
        _error("gradient of the first batch, error", phases["measure"]["gradient_error"]),
        ("greedy tokens that agree", "", "", f"{made['equal_tokens']} of {made['tokens']}"),
        ("", "", "", ""),
        *(
            (f"perplexity at {extend['context']} tokens, {name}", "", "", f"{value:.2f}")
            for name, value in extend["perplexity"].items()
        ),
    ]  # fmt: skip
    machine, versions = report["machine"], report["versions"]
    head = (
        f"tilewright {report['revision']}, torch {versions['torch']}, "
        f"{machine['cpu']}, {machine['torch_threads']} threads, {train['dtype']} training, "
        f"{made['dtype']} generation, {train['parameters'] / 1e6:.1f} M parameters\n"
        f"steps: medians of {train['steps']} and {extend['steps']} steps run in turn, "
        f"full vs full of {extend['probe_steps']}; memory: above the level before the step\n"
    )
    sample = f"\n\na sample at temperature 0.8:\n{made['sample']}"
    return "\n" + head + "\n" + _aligned(rows) + sample


def _timing(name: str, stock_ms: list[float], ours_ms: list[float]) -> tuple[str, ...]:
    stock, ours = statistics.median(stock_ms), statistics.median(ours_ms)
    return name, f"{stock:.1f}", f"{ours:.1f}", _ratio(stock / ours, "faster", "slower")


def _memory(name: str, stock: int | None, ours: int | None) -> tuple[str, ...]:
    if not stock or not ours:
        return name, "-", "-", "not measurable here"
    return (
        name, f"{stock / MIB:.0f}", f"{ours / MIB:.0f}", _ratio(stock / ours, "less", "more"),
    )  # fmt: skip


def _error(name: str, error: dict[str, float]) -> tuple[str, ...]:
    return name, f"{error['stock']:.2e}", f"{error['tilewright']:.2e}", "of its norm, in float64"


def _speed(name: str, tokens_per_s: dict[str, float]) -> tuple[str, ...]:
    stock, ours = tokens_per_s["stock"], tokens_per_s["tilewright"]
    return name, f"{stock:.1f}", f"{ours:.1f}", _ratio(ours / stock, "faster", "slower")


def _ratio(gain: float, better: str, worse: str) -> str:
    """A gain above 1 is better; below, the loss is said as such."""
    if 0.995 < gain < 1.005:
        return "the same"
    return f"{gain:.2f}x {better}" if gain > 1 else f"{1 / gain:.2f}x {worse}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )


def write_png(path: Path, report: dict) -> bool:
    """Loss curves and bars; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    phases = report["phases"]
    train, extend, made = phases["train"], phases["extend"], phases["generate"]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8))
    curves, long_curves, bars, quality = axes.flat
    styles: dict[str, dict] = {
        "stock": {"color": "tab:gray", "linewidth": 3},
        "tilewright": {"color": "tab:red"},
    }
    for axis, phase, title in (
        (curves, train, f"training from scratch, {train['context']} tokens"),
        (long_curves, extend, f"LoRA at {extend['context']} tokens"),
    ):
        names = {"stock": "stock", "tilewright": "tilewright"}
        if phase is extend:
            names = {"stock": "stock, full attention", "tilewright": "tilewright, shifted"}
        for side, style in styles.items():
            values = phase["losses"][side]
            axis.plot(range(1, len(values) + 1), values, label=names[side], **style)
        axis.set(title=title, xlabel="step", ylabel="loss, nats a token")
        axis.legend()

    gains = {
        "training\nstep": _median_gain(train["step_ms"]),
        "long step\nfull/shifted": _median_gain(extend["step_ms"]),
        "long step\nfull/full": extend["probe_step_ms"]["stock"]
        / extend["probe_step_ms"]["tilewright_full"],
        "generation": made["tokens_per_s"]["tilewright"] / made["tokens_per_s"]["stock"],
    }
    drawn = bars.bar(list(gains), list(gains.values()), color="tab:red")
    bars.bar_label(drawn, fmt="%.2fx")
    bars.axhline(1.0, color="tab:gray", linewidth=2)
    bars.set(title="speed, stock = 1", ylabel="times as fast as stock")
    bars.margins(y=0.12)

    lines = [name.replace(", ", ",\n") for name in extend["perplexity"]]
    drawn = quality.barh(lines, list(extend["perplexity"].values()), color="tab:blue")
    quality.bar_label(drawn, fmt="%.1f", padding=3)
    quality.invert_yaxis()
    quality.margins(x=0.15)
    quality.set(title=f"perplexity of held-out text at {extend['context']} tokens")

    machine = report["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['torch_threads']} threads, {train['dtype']}, "
        f"tilewright {report['revision']}"
    )
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110)
    pyplot.close(figure)
    return True


def _median_gain(step_ms: dict[str, list[float]]) -> float:
    return statistics.median(step_ms["stock"]) / statistics.median(step_ms["tilewright"])
