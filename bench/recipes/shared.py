"""What the recipes share: a small Llama trained on real text, steps, and a table with a sentence.

A recipe is a module with `run(quick, seed) -> Result`; `main` makes a command of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes.functions import is_held_out
from tilewright.config import TrainOptions
from tilewright.data import RowOrder, TokenizerLike, encode, pack, train_tokenizer
from tilewright.demo import collect_text
from tilewright.demo_shared import QUICK, Sizes, first_rows, llama
from tilewright.pretrained import method_of
from tilewright.progress import Progress
from tilewright.train import Trainer, learning_rate_at, mean_loss

BASE = Sizes(text_bytes=1_500_000, held_out_bytes=300_000, context=512, rows=2, most_steps=400)


@dataclass(frozen=True)
class Result:
    """What a recipe measured.

    table     rows of cells, the head first
    sentence  what it shows, derived from the figures
    figures   by name, for whoever reads them by program
    """

    table: Sequence[tuple[str, ...]]
    sentence: str
    figures: dict[str, float] = field(default_factory=dict)


def main(doc: str | None, run: Callable[[bool, int], Result], argv: Sequence[str] | None) -> None:
    """Run a recipe from the command line and print its table and its sentence."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, and figures of no meaning")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    arguments = parser.parse_args(argv)
    start_s = time.perf_counter()
    result = run(arguments.quick, arguments.seed)
    print(aligned(result.table))
    print(f"\n{result.sentence}")
    print(f"{time.perf_counter() - start_s:.0f} seconds")


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """The first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(n) if i else cell.ljust(n)
            for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _show(bar: Progress, step: int, loss: float) -> None:
    """Each step on a terminal, elsewhere one in fifty."""
    if bar.is_terminal or step + 1 == bar.total or step % 50 == 0:
        bar.show(step + 1, f"loss {loss:.3f}")


# --- a model and its text ---


@dataclass(frozen=True)
class Text:
    """The standard library's sources as tokens, training and held-out packages apart."""

    tokenizer: TokenizerLike
    train: list[np.ndarray]
    held_out: list[np.ndarray]

    def ids(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of a text, the first `most` of them."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])[:most]

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id or 0


def sizes(quick: bool) -> Sizes:
    return QUICK if quick else BASE


def read_text(size: Sizes) -> Text:
    train, held_out, _ = collect_text(size.text_bytes, size.held_out_bytes, is_held_out)
    tokenizer = train_tokenizer(train, size.vocab_size, size.context)
    return Text(tokenizer, encode(tokenizer, train), encode(tokenizer, held_out))


def trained_llama(
    size: Sizes, text: Text, seed: int, documents: list[np.ndarray] | None = None,
    label: str = "base",
) -> nn.Module:  # fmt: skip
    """A Llama of this size trained from scratch on the documents, accelerated.

    documents  default the training part of the text
    """
    model = llama(size, text.tokenizer, seed)
    tw.accelerate(model)
    rows = pack(text.train if documents is None else documents, size.context, text.pad)
    order = RowOrder(len(rows), size.rows, 1, seed)
    trainer = Trainer(model, TrainOptions(weight_decay=0.1), size.most_steps, size.learning_rate)
    bar = Progress(size.most_steps, label)
    try:
        for step in range(size.most_steps):
            done = trainer.step(step, [rows.batch(r) for r in order.micro_batches(step)])
            _show(bar, step, done.loss)
    finally:
        bar.close()
    return model.eval()


def hidden(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B, L, N): the last hidden states of a causal language model, before its head."""
    decoder = method_of(model, "get_decoder")()
    return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def head(model: nn.Module) -> torch.Tensor:
    """(V, N): the weight of its head."""
    return method_of(model, "get_output_embeddings")().weight


def padded(rows: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
    """(B, L) int64: the rows, filled up to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filling] * (longest - len(row))] for row in rows])


def live(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, L) int64: 1 at the tokens of `padded(rows)`, 0 at its filling."""
    return padded([[1] * len(row) for row in rows], 0)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """(..., L): labels[t + 1] at place t, what hidden state t predicts; -100 at the end."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=-100)


@torch.no_grad()
def text_loss(model: nn.Module, text: Text, n_rows: int, context: int) -> float:
    """Mean loss of held-out text: what tuning has left of the language model."""
    return mean_loss(model, first_rows(pack(text.held_out, context, text.pad), n_rows))


# --- retrieval ---


@torch.no_grad()
def retrieval(queries: torch.Tensor, documents: torch.Tensor) -> dict[str, float]:
    """How well query i finds document i among all by cosine, both (B, N).

    "first"  the share that finds it first, in %
    "mrr"    mean of 1 / rank, 0 beyond rank 10
    """
    q, d = (nn.functional.normalize(t.float(), dim=-1) for t in (queries, documents))
    similarity = q @ d.T
    rank = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
    return {
        "first": float((rank == 1).float().mean() * 100),
        "mrr": float(torch.where(rank <= 10, 1 / rank, 0.0).mean()),
    }


def drawn(items: Sequence, n: int, seed: int) -> list:
    """n of them at random, or all if there are fewer; in random order."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order[:n].tolist()]


# --- steps ---


def train(
    model: nn.Module, loss_of: Callable[[int], torch.Tensor], n_steps: int, peak: float,
    label: str = "train",
) -> list[float]:  # fmt: skip
    """Steps of AdamW over what requires a gradient; returns the losses.

    loss_of  step -> the loss; one without a graph has seen to its gradients itself
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = tw.AdamW(trained, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, clip_norm=1.0)
    losses, options = [], TrainOptions()
    bar = Progress(n_steps, label)
    try:
        for step in range(n_steps):
            loss = loss_of(step)
            if loss.requires_grad:
                loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, n_steps, options, peak)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            _show(bar, step, losses[-1])
    finally:
        bar.close()
    model.eval()
    return losses
