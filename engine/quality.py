"""How much a changed model says otherwise than the model it was made of, on the same text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from tilewright.data import IGNORED, PackedRows
from tilewright.progress import Progress, Silent
from tilewright.train import autocast


@dataclass(frozen=True)
class Quality:
    """Of the next-token distributions p (before) and q (after), over the text's tokens.

    n_tokens            tokens that were predicted
    kl                  mean of sum_v p log(p / q), in nats
    kl_largest          the largest of any token
    same_top            share of tokens where p and q have the same most likely token
    perplexity_before   exp(mean negative log-likelihood) under p, and
    perplexity_after    under q
    """

    n_tokens: int
    kl: float
    kl_largest: float
    same_top: float
    perplexity_before: float
    perplexity_after: float


@torch.no_grad()
def compare_models(
    before: nn.Module, after: nn.Module, rows: PackedRows, *, dtype: str = "float32",
    progress: Progress | None = None,
) -> Quality:  # fmt: skip
    """Run both models over the rows, one row at a time, and compare their distributions.

    before, after   causal language models over the same vocabulary, each on its device; put into
                    evaluation mode
    rows            from `tilewright.data.pack`
    dtype           "float32", or "bfloat16" for autocast

    Logarithms and sums are float32 and float64. ValueError: no token to predict, or vocabularies
    that differ.
    """
    if rows.n_valid == 0:
        raise ValueError("compare_models: rows hold no token that has a predecessor")
    progress = progress or Silent()
    sums = {"kl": 0.0, "same": 0.0, "before": 0.0, "after": 0.0}
    largest, n_tokens = 0.0, 0
    for n in range(len(rows)):
        batch = rows.batch([n])
        targets = batch.pop("labels")[0, 1:]
        chosen = targets != IGNORED
        targets = targets[chosen]
        p, q = (_log_probabilities(model, batch, chosen, dtype) for model in (before, after))
        if p.shape != q.shape:
            raise ValueError(
                f"compare_models: before has {p.shape[1]} logits, after has {q.shape[1]}"
            )
        kl = (p.exp() * (p - q)).double().sum(1)
        sums["kl"] += float(kl.sum())
        sums["same"] += float((p.argmax(1) == q.argmax(1)).sum())
        for name, logs in (("before", p), ("after", q)):
            sums[name] -= float(logs.gather(1, targets[:, None]).double().sum())
        largest = max([largest, *kl.tolist()])
        n_tokens += len(targets)
        progress.show(n + 1, f"KL {sums['kl'] / n_tokens:.4f}")
    return Quality(
        n_tokens, sums["kl"] / n_tokens, largest, sums["same"] / n_tokens,
        math.exp(sums["before"] / n_tokens), math.exp(sums["after"] / n_tokens),
    )  # fmt: skip


def _log_probabilities(
    model: nn.Module, batch: dict, chosen: torch.Tensor, dtype: str
) -> torch.Tensor:
    """(T, V) float32 on the CPU: what the model expects at each chosen position."""
    model.eval()
    device = next(model.parameters()).device
    with autocast(device, dtype):
        given = {name: t.to(device) for name, t in batch.items()}
        logits = model(**given, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits[chosen.to(device)].float(), dim=1).cpu()
