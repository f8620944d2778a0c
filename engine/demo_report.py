"""The demo's results as a table and a plot; every number comes from the report it is given."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from tilewright.files import replacing

MIB = 2**20
# a point of a loss curve is the mean of this share of all steps, and of so many at least
MEAN_SHARE, LEAST_MEAN = 1 / 40, 10


def as_text(report: dict) -> str:
    """The table of speed, memory and agreement, and what it was measured with."""
    phases = report["phases"]
    train, extend, made = phases["train"], phases["extend"], phases["generate"]
    packed = phases["quantize"]
    qlora = packed["qlora"]
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
        _speed(f"training of LoRA over {qlora['base']}, tokens/s", qlora["tokens_per_s"]),
        _memory(
            "peak memory of a step of it, MiB", qlora["peak_bytes"]["stock"],
            qlora["peak_bytes"]["tilewright"],
        ),
        ("", "", "", ""),
        _losses(f"last loss after {train['steps']} steps", train),
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
        _losses(f"last loss after {qlora['steps']} steps over {qlora['base']}", qlora),
        (
            "held-out loss after them",
            *(f"{qlora['held_out_loss'][side]:.4f}" for side in ("stock", "tilewright")),
            f"{qlora['base']} before: {qlora['held_out_loss_of_base']:.4f}",
        ),
        ("", "", "", ""),
        *_perplexities(extend),
    ]  # fmt: skip
    machine, versions = report["machine"], report["versions"]
    head = (
        f"tilewright {report['revision']}, torch {versions['torch']}, {machine['cpu']}, "
        f"{machine['torch_threads']} threads\n"
        f"{train['parameters'] / 1e6:.1f} M parameters, {train['dtype']} training, "
        f"{made['dtype']} generation; memory: above the level before the step\n"
        f"steps: medians of {train['steps']}, {extend['steps']} and {qlora['steps']} run in turn, "
        "full vs full of a few\n"
    )
    sample = f"\n\na sample at temperature 0.8:\n{made['sample']}"
    return f"\n{head}\n{_aligned(rows)}\n\n{_formats(packed)}{sample}"


TUNED = {  # of demo_phases._extend: how the model came about
    "trained": "before: RoPE as trained",
    "stretched": "before: RoPE stretched",
    "full": "tuned with full attention",
    "shifted": "tuned with shifted-sparse attention",
}


def _perplexities(extend: dict) -> list[tuple[str, ...]]:
    """Of the same held-out tokens, read in pieces of the first training's context and whole."""
    short, long = extend["short_context"], extend["context"]
    rows: list[tuple[str, ...]] = [
        ("perplexity of held-out text, read in", f"{short}s", f"{long}s", "tokens at a time")
    ]
    for key, name in TUNED.items():
        values = (extend["quality"][key][reading]["perplexity"] for reading in ("short", "long"))
        note = "read with dense attention" if key == "shifted" else ""
        rows.append((f"  {name}", *(f"{value:.2f}" for value in values), note))
    return rows


def _formats(packed: dict) -> str:
    """A line for each format of the same model: size, what was lost, speed."""
    rows: list[tuple[str, ...]] = [
        (
            "weights of the tuned model", "bits", "MiB", "perplexity", "KL, nats",
            "same top token", "tokens/s",
        )
    ]  # fmt: skip
    for name, found in packed["formats"].items():
        lost = (f"{found['kl']:.2e}", f"{found['same_top']:.2%}") if "kl" in found else ("", "")
        rows.append(
            (
                f"  {name}", f"{found['bits_per_weight']:.2f}", f"{found['bytes'] / MIB:.2f}",
                f"{found['perplexity']:.3f}", *lost, f"{found['tokens_per_s']:.1f}",
            )
        )  # fmt: skip
    share = packed["packed_weights"] / packed["parameters"]
    note = (
        f"  packed: {share:.0%} of the parameters, the embedding stays dense; compared on "
        f"{packed['compared_tokens']} held-out tokens, {packed['context']} at a time, "
        f"in {packed['dtype']};\n  all with tilewright's attention; a model this small is not "
        "bound by reading its weights"
    )
    return f"{_aligned(rows)}\n{note}"


def _losses(name: str, run: dict) -> tuple[str, ...]:
    """The last losses of both sides of a training, and how far apart the sides were."""
    stock, ours = (f"{run['losses'][side][-1]:.4f}" for side in ("stock", "tilewright"))
    gaps = f"gaps: median {run['median_loss_gap']:.2g}, largest {run['largest_loss_gap']:.2g}"
    return name, stock, ours, gaps


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
    """The first column flush left, the last as it is, those between flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            (
                f"{row[0]:<{widths[0]}}",
                *(f"{cell:>{n}}" for cell, n in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            )
        ).rstrip()
        for row in rows
    )


def _smooth(losses: list[float]) -> list[float]:
    """The mean of each value and some before it."""
    n = max(LEAST_MEAN, round(MEAN_SHARE * len(losses)))
    return [statistics.fmean(losses[max(0, i - n + 1) : i + 1]) for i in range(len(losses))]


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
    qlora = phases["quantize"]["qlora"]
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    curves, timed, long_timed, bars, quality, places = axes.flat
    colours = {"stock": "tab:gray", "tilewright": "tab:red"}
    widths = {"stock": 3.0, "tilewright": 1.2}
    short_title = f"training from scratch, {train['context']} tokens"
    for axis, phase, by_time, title in (
        (curves, train, False, short_title),
        (timed, train, True, f"{short_title}: the same losses over time"),
        (long_timed, extend, True, f"LoRA at {extend['context']} tokens"),
    ):
        for side, colour in colours.items():
            how = {"stock": ", full attention", "tilewright": ", shifted-sparse"}[side]
            losses = _smooth(phase["losses"][side])
            seconds_spent = list(itertools.accumulate(t / 1e3 for t in phase["step_ms"][side]))
            axis.plot(
                seconds_spent if by_time else range(1, len(losses) + 1), losses,
                label=side + (how if phase is extend else ""), color=colour,
                linewidth=widths[side],
            )  # fmt: skip
        xlabel = "seconds in steps of that side" if by_time else "step"
        axis.set(title=title, xlabel=xlabel, ylabel="loss, moving mean")
        axis.legend()

    gains = {
        "training\nstep": _median_gain(train["step_ms"]),
        "long step\nfull/shifted": _median_gain(extend["step_ms"]),
        "long step\nfull/full": extend["probe_step_ms"]["stock"]
        / extend["probe_step_ms"]["tilewright_full"],
        f"LoRA step\nover {qlora['base']}": _median_gain(qlora["step_ms"]),
        "generation": made["tokens_per_s"]["tilewright"] / made["tokens_per_s"]["stock"],
    }
    drawn = bars.bar(list(gains), list(gains.values()), color="tab:red")
    bars.bar_label(drawn, fmt="%.2fx")
    bars.axhline(1.0, color="tab:gray", linewidth=2)
    bars.set(title="speed, stock = 1", ylabel="times as fast as stock")
    bars.margins(y=0.12)
    bars.tick_params(axis="x", labelsize=8)

    shades = {
        "trained": "tab:olive", "stretched": "tab:orange", "full": "tab:gray",
        "shifted": "tab:red",
    }  # fmt: skip
    names = [TUNED[key].replace(": ", ":\n").replace(" with ", "\nwith ") for key in shades]
    values = [extend["quality"][key]["long"]["perplexity"] for key in shades]
    drawn = quality.barh(names, values, color=list(shades.values()))
    quality.bar_label(drawn, fmt="%.1f", padding=3)
    quality.invert_yaxis()
    quality.margins(x=0.15)
    quality.set(title=f"perplexity of held-out text, {extend['context']} tokens at a time")

    for key, colour in shades.items():
        losses = extend["quality"][key]["long"]["losses"]
        step = extend["context"] // len(losses)
        middles = [step * (i + 0.5) for i in range(len(losses))]
        places.plot(middles, losses, label=TUNED[key], color=colour, marker=".")
    places.axvline(extend["short_context"], color="black", linewidth=0.8, linestyle=":")
    places.set(
        title="held-out loss; dotted: first context",
        xlabel="tokens before", ylabel="nats a token",
    )  # fmt: skip
    places.legend(fontsize=8)

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
