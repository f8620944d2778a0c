"""Logits fusion: a small model tuned on one kind of text steers a larger one that is not tuned.

At each token the larger model's logits move by what tuning has moved the small one's, and as far:

    z = large + a (expert - base)     with a such that KL(softmax(z) || softmax(large))
                                      = KL(softmax(expert) || softmax(base))

The kind of text is the functions' heads behind the first lines of their docstrings. Nothing but the
small model is tuned; the larger one tuned as well is what could be reached.

    python -m tilewright.bench.recipes.fusion

Source: Fan et al., On giant's shoulders: effortless weak to strong by dynamic logits fusion, arXiv
2406.15480.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes import functions, shared
from tilewright.bench.recipes.functions import Function
from tilewright.bench.recipes.shared import Result


@dataclass(frozen=True)
class Plan:
    small_hidden: int = 48
    longest: int = 32  # tokens of a line, and of a head
    rows: int = 16
    steps: int = 120
    learning_rate: float = 1e-3
    asked: int = 100


QUICK = Plan(small_hidden=32, longest=12, rows=2, steps=2, asked=6)


def task_rows(
    text: shared.Text, pairs: Sequence[Function], longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) tokens of a line and its function's head, and labels of the head alone."""
    rows, labels = [], []
    for pair in pairs:
        line = text.ids(f"# {pair.summary}\n")[-longest:]
        answer = text.ids(f"{pair.signature}\n", longest)
        rows.append([*line, *answer])
        labels.append([*[-100] * len(line), *answer])
    return shared.padded(rows, text.pad), shared.shifted(shared.padded(labels, -100))


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(T, V): logits of the places that have a label."""
    return shared.hidden(model.eval(), ids)[labels != -100] @ shared.head(model).T


@torch.no_grad()
def generate(
    large: nn.Module, expert: nn.Module, base: nn.Module, prompts: torch.Tensor, n_tokens: int,
    *, temperature: float = 0.0, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Tokens (B, n) behind prompts (B, L) of one length, and the strength of each (B, n).

    The three models go in step, each over its own cache.
    """
    ids, caches = prompts, [None, None, None]
    tokens, strengths = [], []
    for step in range(n_tokens):
        last = []
        for i, model in enumerate((large, expert, base)):
            out = model.eval()(
                input_ids=ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1
            )
            caches[i] = out.past_key_values
            last.append(out.logits[:, -1].float())
        fused, a = tw.fuse_logits(*last)
        ids = tw.sample_tokens(fused, temperature=temperature, seed=seed, step=step)[:, None]
        tokens.append(ids)
        strengths.append(a)
    return torch.cat(tokens, 1), torch.cat(strengths, 1)


def tune(
    model: nn.Module, text: shared.Text, known: Sequence[Function], plan: Plan, seed: int,
    label: str,
) -> nn.Module:  # fmt: skip
    """A copy of the model that has learnt the task."""
    model = copy.deepcopy(model)
    tw.accelerate(model)

    def loss_of(step: int) -> torch.Tensor:
        pairs = shared.drawn(known, plan.rows, seed * plan.steps + step)
        ids, labels = task_rows(text, pairs, plan.longest)
        return tw.linear_cross_entropy(shared.hidden(model, ids), shared.head(model), labels)

    shared.train(model, loss_of, plan.steps, plan.learning_rate, label)
    return model


def run(quick: bool = False, seed: int = 0) -> Result:
    size, plan = shared.sizes(quick), QUICK if quick else Plan()
    text = shared.read_text(size)
    large = shared.trained_llama(size, text, seed, label="large")
    small = replace(size, hidden=plan.small_hidden, layers=1, heads=2, kv_heads=1)
    base = shared.trained_llama(small, text, seed + 1, label="small")
    for model in (large, base):
        tw.restore(model)
    known, others = functions.apart(functions.documented_functions())
    expert = tune(base, text, known, plan, seed, "small, tuned")
    tuned = tune(large, text, known, plan, seed, "large, tuned")

    ids, labels = task_rows(text, shared.drawn(others, plan.asked, seed), plan.longest)
    right = labels[labels != -100]
    logits = {
        "large": logits_of(large, ids, labels), "small": logits_of(base, ids, labels),
        "small, tuned": logits_of(expert, ids, labels),
        "large, tuned": logits_of(tuned, ids, labels),
    }  # fmt: skip
    named = [logits[name] for name in ("large", "small, tuned", "small")]
    logits["large, steered by the small one"], a = tw.fuse_logits(*named)
    logits["large, steered with strength 1"] = named[0] + named[1] - named[2]
    losses = {
        name: float(nn.functional.cross_entropy(z.float(), right)) for name, z in logits.items()
    }
    hits = {
        name: float((z.argmax(1) == right).float().mean() * 100) for name, z in logits.items()
    }  # fmt: skip

    table = [("heads of functions, packages not tuned on", "loss a token", "token right, %")]
    table += [(name, f"{losses[name]:.3f}", f"{hits[name]:.1f}") for name in logits]
    reached = losses["large"] - losses["large, steered by the small one"]
    closed = 100 * reached / (losses["large"] - losses["large, tuned"])
    beside = losses["small, tuned"] - losses["large, steered by the small one"]
    fixed = losses["large, steered with strength 1"] - losses["large, steered by the small one"]
    sentence = (
        f"Steering the larger model closes {closed:.0f} % of the gap to tuning it, with a mean "
        f"strength of {float(a.mean()):.2f}; the tuned small model alone is "
        f"{abs(beside):.3f} {'worse' if beside > 0 else 'better, so steering does not pay here'}, "
        f"and a fixed strength of 1 {abs(fixed):.3f} {'worse' if fixed > 0 else 'better'}."
    )
    pair = shared.drawn(others, 1, seed)[0]
    prompt = torch.tensor([text.ids(f"# {pair.summary}\n")])
    steered, _ = generate(large, expert, base, prompt, 2 * plan.longest)
    alone = tw.generate(large, prompt.tolist(), max_new_tokens=2 * plan.longest)[0].tokens
    wrote, without = (_first_line(text, ids) for ids in (steered[0].tolist(), alone))
    sentence += (
        f"\nBehind {pair.summary!r} it writes {wrote!r}, the larger model alone {without!r}."
    )
    figures = {f"{name}, loss": v for name, v in losses.items()}
    return Result(table, sentence, figures | {"strength": float(a.mean()), "closed": closed})


def _first_line(text: shared.Text, ids: list[int]) -> str:
    lines = str(text.tokenizer.decode(ids)).strip().splitlines()
    return lines[0] if lines else ""


def main(argv: Sequence[str] | None = None) -> None:
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
