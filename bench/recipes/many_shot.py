"""Many-shot in-context tuning: every answer in the context is learnt from, not the last alone.

A task is a module of the standard library, a shot one of its functions: the first line of the
docstring is the question, the function's head the answer. The model sees the names and habits of
the module in the shots before. It is tuned on the modules of some packages, and asked about others.

    loss = -sum_i sum_{t in y_i} log p(y_it | x_1, y_1, .., x_i, y_i<t) / sum_i |y_i|

    python -m tilewright.bench.recipes.many_shot

Source: He et al., Many-shot in-context fine-tuning, arXiv 2506.11103.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes import functions, shared
from tilewright.bench.recipes.shared import Result


@dataclass(frozen=True)
class Plan:
    shots: int = 8
    longest: int = 24  # tokens of a question, and of an answer
    rows: int = 4
    steps: int = 120
    learning_rate: float = 1e-3
    prompts: int = 128  # that are asked


QUICK = Plan(shots=3, longest=8, rows=2, steps=3, prompts=4)


class Tasks:
    """Prompts of the shots of one module each, from those that have enough functions."""

    def __init__(self, text: shared.Text, kept: list[functions.Function], plan: Plan):
        self.text, self.plan = text, plan
        of_module = defaultdict(list)
        for f in kept:
            of_module[f.module].append(f)
        self.modules = [found for found in of_module.values() if len(found) >= plan.shots]

    def _ids(self, text: str, end: str) -> list[int]:
        return self.text.ids(text, self.plan.longest) + self.text.ids(end)

    def prompts(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) tokens and labels, each label in the place that predicts it."""
        rows, labels = [], []
        for _ in range(n):
            at = int(torch.randint(len(self.modules), (), generator=generator))
            module = self.modules[at]
            row: list[int] = []
            answers: list[int] = []
            for i in torch.randperm(len(module), generator=generator)[: self.plan.shots].tolist():
                question = self._ids(f"# {module[i].summary}", "\n")
                answer = self._ids(module[i].signature, "\n")
                row += question + answer
                answers += [-100] * len(question) + answer
            rows.append(row)
            labels.append(answers)
        return shared.padded(rows, self.text.pad), shared.shifted(shared.padded(labels, -100))


def shots_of(labels: torch.Tensor) -> torch.Tensor:
    """(B, L): at each token of an answer the number of its shot, 1, 2, ..; elsewhere 0."""
    inside = labels != -100
    before = nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, (inside & ~before).cumsum(1), 0)


def answer_loss(
    model: nn.Module, prompts: torch.Tensor, labels: torch.Tensor, *, only_last: bool = False,
    average: str = "tokens", shot_weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The loss of all answers, or of the last of each prompt; other tokens never meet the head."""
    if only_last:
        shot = shots_of(labels)
        labels = torch.where(shot == shot.amax(1, keepdim=True), labels, -100)
    weights, denominator = tw.many_shot_weights(labels, average=average, shot_weights=shot_weights)
    return tw.linear_cross_entropy(
        shared.hidden(model, prompts), shared.head(model), labels,
        token_weight=weights, denominator=denominator,
    )  # fmt: skip


@torch.no_grad()
def losses_by_shot(model: nn.Module, prompts: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Mean loss of a token of the first, second, .. answer, in nats."""
    h = shared.hidden(model.eval(), prompts)
    losses = tw.linear_cross_entropy(h, shared.head(model), labels, reduction="none")
    shot = shots_of(labels)
    return [float(losses[shot == i].mean()) for i in range(1, int(shot.max()) + 1)]


def run(quick: bool = False, seed: int = 0) -> Result:
    size, plan = shared.sizes(quick), QUICK if quick else Plan()
    text = shared.read_text(size)
    base = shared.trained_llama(size, text, seed)
    tw.restore(base)
    known, others = functions.apart(functions.documented_functions())
    generator = torch.Generator().manual_seed(seed + 1)
    asked = Tasks(text, others, plan).prompts(plan.prompts, generator)
    tasks = Tasks(text, known, plan)
    batches = [tasks.prompts(plan.rows, generator) for _ in range(plan.steps)]

    models = {"before": base}
    for name, only_last in (("last answer alone", True), ("all answers", False)):
        models[name] = model = copy.deepcopy(base)
        tw.accelerate(model)

        def loss_of(step: int, model=model, only_last=only_last) -> torch.Tensor:
            return answer_loss(model, *batches[step], only_last=only_last)

        shared.train(model, loss_of, plan.steps, plan.learning_rate, name)

    table = [("loss a token", "first answer", "last answer", "other text")]
    figures: dict[str, float] = {}
    for name, model in models.items():
        of_shot = losses_by_shot(model, *asked)
        of_text = shared.text_loss(model, text, size.held_out_rows, size.context)
        table.append((name, f"{of_shot[0]:.3f}", f"{of_shot[-1]:.3f}", f"{of_text:.3f}"))
        figures |= {f"{name}, first": of_shot[0], f"{name}, last": of_shot[-1]}
        figures[f"{name}, text"] = of_text
    gain = figures["last answer alone, last"] - figures["all answers, last"]
    n_answered = sum(int((labels != -100).sum()) for _, labels in batches)
    share = n_answered / sum(labels.numel() for _, labels in batches)
    sentence = (
        f"Tuned on the same {plan.steps * plan.rows} prompts, learning from all answers leaves the "
        f"last of {plan.shots} answers in packages not tuned on with a loss {abs(gain):.3f} "
        f"{'lower' if gain > 0 else 'higher'} than learning from the last alone"
        f"{'' if gain > 0 else ', so it does not help here'}; "
        f"{100 * share:.0f} % of the tokens meet the head."
    )
    return Result(table, sentence, figures)


def main(argv: Sequence[str] | None = None) -> None:
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
