"""A decoder made an embedder: bidirectional attention, and three losses on one backbone.

A pair is the first line of a function's docstring and its code. Embeddings are the mean of the last
hidden states, read with or without the causal mask, on the same weights.

    contrastive   each line finds its code among those of the batch
    generation    -log p(code | line) - log sigmoid(beta (log p(code | line) - log p(another code |
                  line))), means over a code's tokens, without a reference
    alignment     KL(softmax(mean log p(candidate | line)) || softmax(cos / t)), which only the
                  cosines learn from

    python -m tilewright.bench.recipes.embedding

Source: Man et al., ULLME, arXiv 2408.03402, without its projection behind the mean; Gao et al.,
arXiv 2101.06983, for batches whose graph is held for a chunk at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes import functions, shared
from tilewright.bench.recipes.functions import Function
from tilewright.bench.recipes.shared import Result


@dataclass(frozen=True)
class Plan:
    pairs: int = 32  # of a batch
    chunk: int = 16
    candidates: int = 2  # codes whose probability a line is asked for, its own among them
    steps: int = 60
    learning_rate: float = 1e-3
    temperature: float = 0.05
    beta: float = 0.1
    asked: int = 200
    longest: int = 32  # tokens of a line, and of a code


QUICK = Plan(pairs=4, chunk=2, steps=2, asked=12, longest=12)


@contextmanager
def bidirectional(model: nn.Module, is_on: bool = True) -> Iterator[None]:
    """Attention without the causal mask, on the same weights; causal again afterwards."""
    layers = [m for m in model.modules() if hasattr(m, "is_causal")]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for thing in (*layers, *configs.values()):
        thing.is_causal = not is_on
    try:
        yield
    finally:
        for thing in (*layers, *configs.values()):
            thing.is_causal = True


def encode(
    model: nn.Module, rows: Sequence[Sequence[int]], is_bidirectional: bool, pad: int = 0
) -> torch.Tensor:
    """(B, N): the mean of the last hidden states over each row's tokens."""
    live = shared.live(rows)
    with bidirectional(model, is_bidirectional):
        h = shared.hidden(model, shared.padded(rows, pad), live)
    return (h * live[:, :, None]).sum(1) / live.sum(1, keepdim=True)


def log_probs(
    model: nn.Module, lines: Sequence[list[int]], codes: Sequence[list[int]], pad: int
) -> torch.Tensor:
    """(B,): the log-probability of each code behind its line, averaged over the code's tokens."""
    rows = [[*line, *code] for line, code in zip(lines, codes, strict=True)]
    labels = [[*[-100] * len(line), *code] for line, code in zip(lines, codes, strict=True)]
    h = shared.hidden(model, shared.padded(rows, pad))
    targets = shared.shifted(shared.padded(labels, -100))
    return tw.sequence_log_probs(h, shared.head(model), targets, average=True)


def candidate_log_probs(
    model: nn.Module, lines: Sequence[list[int]], codes: Sequence[list[int]], n: int, pad: int
) -> torch.Tensor:
    """(B, C): of each line's own code, and of those of the next n - 1 lines."""
    columns = [
        log_probs(model, lines, [codes[(b + c) % len(codes)] for b in range(len(lines))], pad)
        for c in range(n)
    ]
    return torch.stack(columns, 1)


def cosines(q: torch.Tensor, d: torch.Tensor, n: int) -> torch.Tensor:
    """(B, C): of the pairs of `candidate_log_probs`."""
    q, d = nn.functional.normalize(q, dim=-1), nn.functional.normalize(d, dim=-1)
    return torch.stack([(q * d.roll(-c, 0)).sum(-1) for c in range(n)], 1)


def step(
    model: nn.Module, lines: list[list[int]], codes: list[list[int]], plan: Plan,
    is_bidirectional: bool, generates: bool, pad: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The sum of the losses of a batch; its gradient is added to the parameters'."""
    n = plan.candidates
    if generates:
        of_codes = candidate_log_probs(model, lines, codes, n, pad)
        generation = tw.dpo_loss(of_codes[:, 0], of_codes[:, 1], beta=plan.beta)
        generation = generation - of_codes[:, 0].mean()
        generation.backward()

    def loss_of(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        loss = tw.info_nce(q, d, temperature=plan.temperature)
        if generates:
            near = cosines(q, d, n)
            loss = loss + tw.alignment_loss(of_codes, near, temperature=plan.temperature)
        return loss

    def embed(rows: list[list[int]]) -> torch.Tensor:
        return encode(model, rows, is_bidirectional, pad)

    def chunks(rows: list[list[int]]) -> list[list[list[int]]]:
        return [rows[i : i + plan.chunk] for i in range(0, len(rows), plan.chunk)]

    loss = tw.cached_step(loss_of, (embed, chunks(lines)), (embed, chunks(codes)))
    return loss + generation.detach() if generates else loss


class Tokens:
    """Lines and codes of functions, cut to a number of tokens."""

    def __init__(self, text: shared.Text, plan: Plan):
        self.text, self.plan = text, plan

    def _ids(self, text: str) -> list[int]:
        return self.text.ids(text, self.plan.longest)

    def lines(self, pairs: Sequence[Function]) -> list[list[int]]:
        return [self._ids(f"# {p.summary}\n") for p in pairs]

    def codes(self, pairs: Sequence[Function]) -> list[list[int]]:
        return [self._ids(p.code) for p in pairs]


def run(quick: bool = False, seed: int = 0) -> Result:
    size, plan = shared.sizes(quick), QUICK if quick else Plan()
    text = shared.read_text(size)
    base = shared.trained_llama(size, text, seed)
    tw.restore(base)
    known, others = functions.apart(functions.documented_functions())
    asked = shared.drawn(others, plan.asked, seed)
    tokens = Tokens(text, plan)
    batches = [
        shared.drawn(known, plan.pairs, seed * plan.steps + n) for n in range(plan.steps)
    ]  # fmt: skip

    arms = {  # name: (bidirectional, with generation and alignment, tuned)
        "before, causal": (False, False, False),
        "before, bidirectional": (True, False, False),
        "causal, contrastive": (False, False, True),
        "bidirectional, contrastive": (True, False, True),
        "bidirectional, all three": (True, True, True),
    }
    table = [(f"one of {len(asked)} codes", "found first, %", "MRR@10", "loss of other text")]
    figures: dict[str, float] = {}
    for name, (both_ways, generates, is_tuned) in arms.items():
        model = copy.deepcopy(base)
        tw.accelerate(model)
        if is_tuned:

            def loss_of(n: int, model=model, both_ways=both_ways, generates=generates):
                lines, codes = tokens.lines(batches[n]), tokens.codes(batches[n])
                return step(model, lines, codes, plan, both_ways, generates, text.pad)

            shared.train(model, loss_of, plan.steps, plan.learning_rate, name)
        with torch.no_grad():
            queries, documents = (
                encode(model.eval(), rows, both_ways, text.pad)
                for rows in (tokens.lines(asked), tokens.codes(asked))
            )
        found = shared.retrieval(queries, documents)
        of_text = shared.text_loss(model, text, size.held_out_rows, size.context)
        table.append((name, f"{found['first']:.1f}", f"{found['mrr']:.3f}", f"{of_text:.3f}"))
        figures |= {f"{name}, mrr": found["mrr"], f"{name}, text": of_text}

    return Result(table, _sentence(figures), figures)


def _sentence(figures: dict[str, float]) -> str:
    before = max(figures["before, causal, mrr"], figures["before, bidirectional, mrr"])
    causal, both, three = (
        figures[f"{name}, mrr"]
        for name in ("causal, contrastive", "bidirectional, contrastive",
                     "bidirectional, all three")
    )  # fmt: skip
    kept = figures["bidirectional, contrastive, text"] - figures["bidirectional, all three, text"]
    helps = "helps" if both > causal else "does not help here"
    find = "help" if three > both else "do not help"
    return (
        f"Tuning takes the MRR from {before:.3f} to {both:.3f} both ways, {causal:.3f} causally: "
        f"reading both ways {helps}. Generation and alignment make it {three:.3f}, so they {find} "
        f"to find; they leave the loss of other text {abs(kept):.2f} "
        f"{'lower' if kept > 0 else 'higher'}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
