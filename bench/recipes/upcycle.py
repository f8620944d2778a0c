"""A dense model made into a mixture of experts, and whether that pays: on real text.

A small Llama is trained on the standard library's own sources. From there it goes on as it is, and
as a mixture whose experts are copies of its MLPs (`moe_upcycle`), through the same batches. Shown
are both held-out losses over the steps, and the share of tokens that each expert gets.

python -m tilewright.bench.recipes.upcycle [--quick] [--svg FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes.charts import Chart, as_svg, as_text
from tilewright.config import TrainOptions
from tilewright.data import PackedRows, RowOrder, encode, train_tokenizer
from tilewright.demo import collect_text
from tilewright.demo_clock import Clock
from tilewright.demo_shared import QUICK, Demo, Sizes, first_rows, new_model, rows_of
from tilewright.files import write_text
from tilewright.progress import Progress
from tilewright.train import Trainer, mean_loss

EXPERTS, TOP_K = 4, 2
BALANCE = 0.01  # weight of the balance loss of transformers' Mixtral beside the text's
BASE = Sizes(text_bytes=1_500_000, held_out_bytes=300_000, context=512, rows=2, most_steps=120)
MEASURED = 10  # times that the held-out text is looked at


@dataclass
class Upcycled:
    """What was seen.

    parameters   of the dense model and the mixture
    first_gap    largest difference of the logits before the first step, and largest_logit
    steps        after which was measured
    losses       held-out, by model, at each of them
    shares       of the held-out tokens, by layer, at each of the steps: one number an expert
    """

    parameters: dict[str, int]
    first_gap: float
    largest_logit: float
    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    shares: list[list[list[float]]] = field(default_factory=list)


def run(quick: bool = False, seed: int = 0) -> Upcycled:
    """Train, upcycle, go on with both."""
    demo = _open(QUICK if quick else BASE, seed)
    s = demo.sizes
    rows = rows_of(demo, demo.train_documents, s.context)
    held_out = first_rows(rows_of(demo, demo.held_out_documents, s.context), s.held_out_rows)
    order = RowOrder(len(rows), s.rows, 1, seed)
    dense = new_model(demo)
    tw.accelerate(dense)
    _train({"dense": dense}, rows, order, range(s.most_steps), s.learning_rate, seed, "first")

    tw.restore(dense)
    generator = torch.Generator().manual_seed(seed)
    mixture = tw.moe_upcycle(dense, EXPERTS, TOP_K, generator=generator)
    found = Upcycled(
        {name: sum(p.numel() for p in m.parameters()) for name, m in
         (("dense", dense), ("mixture", mixture))},
        *_gap(dense, mixture, held_out),
    )  # fmt: skip
    models: dict[str, Any] = {"dense, continued": dense, "mixture": mixture}
    models["mixture"].router_aux_loss_coef = BALANCE
    for model in models.values():
        tw.accelerate(model)
    # the schedule begins anew, lower, for both
    steps = range(s.most_steps, 2 * s.most_steps)

    def measure(step: int) -> None:
        found.steps.append(step)
        for name, model in models.items():
            found.losses.setdefault(name, []).append(mean_loss(model, held_out))
        found.shares.append(expert_shares(mixture, held_out))

    _train(models, rows, order, steps, s.learning_rate / 2, seed, "second", measure)
    return found


def _open(sizes: Sizes, seed: int) -> Demo:
    """The demo's text and tokenizer, without its phases."""
    texts = collect_text(sizes.text_bytes, sizes.held_out_bytes)[:2]
    tokenizer = train_tokenizer(texts[0], sizes.vocab_size, sizes.context)
    train, held_out = (encode(tokenizer, part) for part in texts)
    return Demo(Path(), sizes, Clock(1.0), None, seed, {}, train, held_out, tokenizer)


def _train(models, rows, order, steps: range, peak, seed, label, measure=None) -> None:
    """The same batches through each model; measures before, MEASURED - 1 times, and after."""
    trainers = {}
    for name, model in models.items():
        options = TrainOptions(seed=seed, weight_decay=0.1)
        trainers[name] = Trainer(model, options, len(steps), peak)
    bar = Progress(len(steps), label)
    due = {len(steps) * n // MEASURED for n in range(MEASURED)}
    try:
        for n, step in enumerate(steps):
            if measure is not None and n in due:
                measure(n)
            batch = [rows.batch(r) for r in order.micro_batches(step)]
            losses = {}
            for name, trainer in trainers.items():
                # transformers adds the balance loss to a loss whose router logits are asked for
                config: Any = trainer.model.config
                config.output_router_logits = hasattr(trainer.model, "router_aux_loss_coef")
                losses[name] = trainer.step(n, batch).loss
                config.output_router_logits = False
            if bar.is_terminal or (n + 1) % 50 == 0:
                bar.show(n + 1, "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
        if measure is not None:
            measure(len(steps))
    finally:
        bar.close()


def _gap(dense: nn.Module, mixture: nn.Module, rows: PackedRows) -> tuple[float, float]:
    """The largest difference of the logits of the first row, and the largest logit."""
    batch = rows.batch([0])
    del batch["labels"]
    with torch.no_grad():
        a, b = (m.eval()(**batch, use_cache=False).logits for m in (dense, mixture))
    return float((a - b).abs().max()), float(a.abs().max())


@torch.no_grad()
def expert_shares(mixture: Any, rows: PackedRows) -> list[list[float]]:
    """By layer, the share of the rows' slots that each expert gets."""
    counts: list[torch.Tensor] = []
    hooks = []
    for n, layer in enumerate(mixture.model.layers):
        counts.append(torch.zeros(EXPERTS, dtype=torch.int64))

        def count(_, args, out, n=n):
            counts[n] += tw.tokens_per_expert(out[2], EXPERTS)

        hooks.append(layer.mlp.gate.register_forward_hook(count))
    try:
        mean_loss(mixture, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return [(c / c.sum()).tolist() for c in counts]


# --- what is shown ---


def charts(found: Upcycled) -> list[Chart]:
    """Losses, then the shares of each layer's experts."""
    steps: list[float] = [float(n) for n in found.steps]
    made = [Chart("held-out loss, nats a token", "step", steps, found.losses)]
    for layer in range(len(found.shares[0])):
        shares = {f"expert {e}": [at[layer][e] for at in found.shares] for e in range(EXPERTS)}
        title = f"share of the held-out tokens' slots, layer {layer}"
        most = max(max(ys) for ys in shares.values())
        made.append(Chart(title, "step", steps, shares, 0.0, max(most, 2 / EXPERTS)))
    return made


def report(found: Upcycled) -> str:
    """The table and the sentence under it."""
    head = ("step", *found.losses, *(f"layer {n}" for n in range(len(found.shares[0]))))
    rows = [head]
    for n, step in enumerate(found.steps):
        losses = (f"{ys[n]:.4f}" for ys in found.losses.values())
        shares = (f"{min(s):.2f} to {max(s):.2f}" for s in found.shares[n])
        rows.append((str(step), *losses, *shares))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    dense, mixture = (ys[-1] for ys in found.losses.values())
    counts = found.parameters
    return "\n".join(
        [
            f"{counts['dense'] / 1e6:.2f} M parameters, as a mixture {counts['mixture'] / 1e6:.2f} "
            f"M: {EXPERTS} experts, {TOP_K} a token",
            f"before the first step logits differ by {found.first_gap:.1e} at most, "
            f"of {found.largest_logit:.3g}",
            "",
            *lines,
            "(layers: least and largest share of an expert)",
            "",
            f"after {found.steps[-1]} more steps the held-out loss is {mixture:.4f} as a mixture "
            f"and {dense:.4f} as it was: {abs(mixture - dense):.4f} "
            f"{'less' if mixture < dense else 'more'} for {TOP_K} MLPs a token instead of 1",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, and figures of no meaning")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the curves as a picture")
    arguments = parser.parse_args(argv)
    found = run(arguments.quick, arguments.seed)
    print(report(found))
    for chart in charts(found):
        print(f"\n{as_text(chart)}")
    if arguments.svg is not None:
        write_text(arguments.svg, as_svg(charts(found)))
        print(f"\nplot written to {arguments.svg}", file=sys.stderr)


if __name__ == "__main__":
    main()
