"""Listwise ranking in one pass, with a loss in which the first places count most.

A prompt lists words in any order, the answer ranks all of them, "a > b > c", here by the alphabet:
a relevance that a small model can learn and anyone can check. Lists of the test are not among those
tuned on.

    loss = sum_t w_t nll_t / number of labels,   w = 1 + 1 / log2(i + 1) at place i, 1 at separators

    python -m tilewright.bench.recipes.ranking

Source: Liu et al., Sliding windows are not the end: exploring full ranking with long-context large
language models, arXiv 2412.14574.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes import shared
from tilewright.bench.recipes.shared import Result


@dataclass(frozen=True)
class Plan:
    words: int = 40  # that lists are made of
    places: int = 8
    rows: int = 32
    steps: int = 400
    learning_rate: float = 3e-3
    lists: int = 200  # that are ranked in the test


QUICK = Plan(words=8, places=3, rows=4, steps=4, lists=6)


class Lists:
    """Prompts of P words, and their rankings.

    words   tokens in the order of their rank
    """

    def __init__(self, text: shared.Text, words: Sequence[int], places: int):
        self.words, self.places = torch.tensor(words), places
        self.separator, self.line = (text.ids(t)[0] for t in (" >", "\n"))

    def drawn(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(B, P): which words, by rank, in the order in which the prompt lists them."""
        return torch.rand(n, len(self.words), generator=generator).argsort(1)[:, : self.places]

    def prompts(self, listed: torch.Tensor) -> torch.Tensor:
        """(B, P + 1): the words, and a line's end."""
        return nn.functional.pad(self.words[listed], (0, 1), value=self.line)

    def rankings(self, listed: torch.Tensor) -> torch.Tensor:
        """(B, 2 P): the words by rank, a separator behind each but the last, a line's end there."""
        ordered = self.words[listed.sort(1).values]
        between = torch.full_like(ordered, self.separator)
        between[:, -1] = self.line
        return torch.stack([ordered, between], 2).flatten(1)


def ranking_loss(
    model: nn.Module, prompts: torch.Tensor, rankings: torch.Tensor, separators: Sequence[int],
    is_weighed: bool = True,
) -> torch.Tensor:  # fmt: skip
    labels = torch.cat([torch.full_like(prompts, -100), rankings], 1)
    weights = tw.listwise_weights(labels, separators) if is_weighed else torch.ones(labels.shape)
    targets, weights = shared.shifted(labels), nn.functional.pad(weights[:, 1:], (0, 1), value=1.0)
    return tw.linear_cross_entropy(
        shared.hidden(model, torch.cat([prompts, rankings], 1)), shared.head(model), targets,
        token_weight=weights, denominator=float((targets != -100).sum()),
    )  # fmt: skip


def gain(listed: list[int], answer: Sequence[int]) -> float:
    """nDCG of an answer: the word of place i is worth P - i, what is not listed or said twice 0."""
    n = len(listed)
    worth = {word: n - i for i, word in enumerate(sorted(listed))}
    discount = [1 / torch.log2(torch.tensor(i + 2.0)).item() for i in range(n)]
    best = sum((n - i) * d for i, d in enumerate(discount))
    return sum(worth.pop(w, 0) * d for w, d in zip(answer[:n], discount, strict=False)) / best


def measure(model: nn.Module, lists: Lists, listed: torch.Tensor) -> dict[str, float]:
    """Of greedy answers: in % the first places and the first three right, and the mean nDCG."""
    prompts = lists.prompts(listed).tolist()
    done = tw.generate(model, prompts, max_new_tokens=2 * lists.places)
    rank = {int(token): i for i, token in enumerate(lists.words)}
    first = three = total = 0.0
    for words, answer in zip(listed.tolist(), done, strict=True):
        ranks = [rank.get(token, -1) for token in answer.tokens[::2]]
        right = sorted(words)
        first += ranks[:1] == right[:1]
        three += ranks[:3] == right[:3]
        total += gain(words, ranks)
    n = len(listed)
    return {"first": 100 * first / n, "three": 100 * three / n, "ndcg": total / n}


def words_of(text: shared.Text, n: int) -> list[int]:
    """n tokens that are a space and a word, in the order of the alphabet."""
    known = {i: text.tokenizer.decode([i]) for i in range(len(text.tokenizer))}
    found = [i for i, w in known.items() if str(w)[:1] == " " and str(w)[1:].islower()]
    found = [i for i in found if str(known[i])[1:].isalpha()]
    found = found[:: max(len(found) // n, 1)][:n]
    return sorted(found, key=lambda i: str(known[i]))


def run(quick: bool = False, seed: int = 0) -> Result:
    size, plan = shared.sizes(quick), QUICK if quick else Plan()
    text = shared.read_text(size)
    base = shared.trained_llama(size, text, seed)
    tw.restore(base)
    lists = Lists(text, words_of(text, plan.words), plan.places)
    generator = torch.Generator().manual_seed(seed + 1)
    asked = lists.drawn(plan.lists, generator)
    batches = [lists.drawn(plan.rows, generator) for _ in range(plan.steps)]
    separators = (lists.separator, lists.line)

    found = {"before": measure(base, lists, asked)}
    for name, is_weighed in (("plain loss", False), ("weighed by place", True)):
        model = copy.deepcopy(base)
        tw.accelerate(model)

        def loss_of(step: int, model=model, is_weighed=is_weighed) -> torch.Tensor:
            listed = batches[step]
            return ranking_loss(
                model, lists.prompts(listed), lists.rankings(listed), separators, is_weighed
            )

        shared.train(model, loss_of, plan.steps, plan.learning_rate, name)
        found[name] = measure(model, lists, asked)

    table = [(f"{len(asked)} lists of {plan.places}", "first right, %", "first 3, %", "nDCG")]
    table += [
        (name, f"{f['first']:.1f}", f"{f['three']:.1f}", f"{f['ndcg']:.3f}")
        for name, f in found.items()
    ]
    figures = {f"{name}, {what}": v for name, f in found.items() for what, v in f.items()}
    first, three, whole = (
        found["weighed by place"][what] - found["plain loss"][what]
        for what in ("first", "three", "ndcg")
    )
    sentence = (
        f"Against the plain loss, weighing by place has the first word right {first:+.1f} and the "
        f"first three {three:+.1f} percentage points more often, nDCG {whole:+.3f}"
        f"{'.' if max(first, three) > 0 else ': it does not help the first places here.'}"
    )
    return Result(table, sentence, figures)


def main(argv: Sequence[str] | None = None) -> None:
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
