"""Self-training with a few labels: adapters alone, and pseudo-labels weighed by what they teach.

A teacher learns from a few labelled texts, and labels others with probabilities. A student starts
from the base again and learns from these, each with a weight that says whether its gradient agrees
with that of some labelled texts; it is the next teacher.

After a warm-up on the half that the teacher is surest of:

    w_j = max(0, <grad loss of labelled texts, grad l_j>), divided by their sum
    loss = sum_j w_j KL(teacher_j || student_j)
    adapter: x + (x down^T) up^T behind attention and MLP, the only thing that trains

The weights take no gradient of a gradient: two forwards, a step to each side along the labelled
gradient. The texts are functions' codes, the label is the package, and the answer is read off the
next token's logits, of the labels' tokens alone.

    python -m tilewright.bench.recipes.self_training

Source: Wang et al., LiST: lite prompted self-training, arXiv 2110.06274.
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
from tilewright.pretrained import config_of, method_of


@dataclass(frozen=True)
class Plan:
    packages: tuple[str, ...] = ("tkinter", "email", "multiprocessing", "distutils")
    labelled: int = 8  # of each package
    unlabelled: int = 60
    asked: int = 40
    width: int = 32  # of an adapter
    longest: int = 64  # tokens of a text
    rows: int = 32
    few_steps: int = 40  # on the labelled texts
    steps: int = 60  # of a session
    warmup: int = 30  # of them, unweighed, on what the teacher is surest of
    sessions: int = 2
    learning_rate: float = 3e-3
    ahead: float = 1e-2  # how far the two forwards step, as a share of the adapters' norm
    draws: int = 2  # of labelled texts


QUICK = Plan(
    labelled=2, unlabelled=4, asked=4, width=4, longest=16, rows=8, few_steps=2, steps=3, warmup=1,
    sessions=1, draws=1,
)  # fmt: skip


class Adapter(nn.Module):
    """A frozen layer, and behind it y + (y down^T) up^T."""

    def __init__(self, layer: nn.Module, n_features: int, width: int):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(0.02 * torch.randn(width, n_features))
        self.up = nn.Parameter(0.02 * torch.randn(n_features, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y + nn.functional.linear(nn.functional.linear(y, self.down), self.up)


def adapted(base: nn.Module, width: int) -> nn.Module:
    """A copy of the base, frozen but for an adapter behind each attention and each MLP."""
    model = copy.deepcopy(base).requires_grad_(False)
    n_features = config_of(model).hidden_size
    for block in method_of(model, "get_decoder")().layers:
        block.self_attn.o_proj = Adapter(block.self_attn.o_proj, n_features, width)
        block.mlp.down_proj = Adapter(block.mlp.down_proj, n_features, width)
    tw.accelerate(model)
    return model


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Classifier:
    """Texts of tokens into packages, by the logits of the packages' tokens.

    answers   the token of each package
    """

    def __init__(self, answers: Sequence[int], pad: int):
        self.answers, self.pad = torch.tensor(answers), pad

    def read(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        """Hidden states behind each text (B, N), and the head's rows of the answers (C, N)."""
        h = shared.hidden(model, shared.padded(rows, self.pad))
        last = torch.tensor([len(row) - 1 for row in rows])
        return h[torch.arange(len(rows)), last], shared.head(model)[self.answers]

    @torch.no_grad()
    def probabilities(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        h, weight = self.read(model.eval(), rows)
        return torch.softmax(h @ weight.T, -1)

    def losses(
        self, model: nn.Module, rows: Sequence[Sequence[int]], probs: torch.Tensor
    ) -> torch.Tensor:
        """(B,): cross-entropy with the probabilities (B, C); KL but for what is constant."""
        h, weight = self.read(model, rows)
        ids = torch.arange(len(self.answers)).expand(len(rows), -1)
        return tw.linear_cross_entropy(h, weight, soft_ids=ids, soft_probs=probs, reduction="none")


@contextmanager
def moved(parameters: Sequence[nn.Parameter], by: Sequence[torch.Tensor], step: float) -> Iterator:
    """The parameters plus step times `by`, and back to their bits."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, direction in zip(parameters, by, strict=True):
            p.add_(direction, alpha=step)
        try:
            yield
        finally:
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def weigh(
    classifier: Classifier, model: nn.Module, rows: Sequence[Sequence[int]], probs: torch.Tensor,
    labelled: Sequence[Sequence[int]], labels: torch.Tensor, ahead: float,
) -> torch.Tensor:  # fmt: skip
    """(B,): the weights of pseudo-labelled texts, whose sum is 1, or all 0 where none agrees."""
    trained = adapters(model)
    g = torch.autograd.grad(classifier.losses(model, labelled, labels).mean(), trained)
    length = torch.stack([t.norm() for t in g]).norm()
    size = torch.stack([p.detach().norm() for p in trained]).norm()
    step = float(ahead * size / length.clamp(min=1e-12))
    losses = []
    for sign in (1.0, -1.0):
        with moved(trained, g, sign * step):
            losses.append(classifier.losses(model, rows, probs))
    return tw.meta_weights(*losses, step=step)


def session(
    classifier: Classifier, base: nn.Module, teacher: nn.Module, unlabelled: Sequence[list[int]],
    few: tuple[Sequence[list[int]], torch.Tensor], plan: Plan, seed: int, is_weighed: bool,
) -> nn.Module:  # fmt: skip
    """A student of the teacher, from the base again, on the teacher's probabilities."""
    torch.manual_seed(seed)
    student = adapted(base, plan.width)
    probs = classifier.probabilities(teacher, unlabelled)
    generator = torch.Generator().manual_seed(seed)

    surest = probs.amax(1).argsort(descending=True)[: max(len(unlabelled) // 2, 1)]
    all_of_them = torch.arange(len(unlabelled))

    def loss_of(step: int) -> torch.Tensor:
        is_early = step < plan.warmup
        among = surest if is_early else all_of_them
        picked = among[torch.randperm(len(among), generator=generator)[: plan.rows]].tolist()
        rows, wanted = [unlabelled[i] for i in picked], probs[picked]
        if is_early or not is_weighed:
            return classifier.losses(student, rows, wanted).mean()
        some = torch.randperm(len(few[0]), generator=generator)[: 2 * len(plan.packages)].tolist()
        weights = weigh(
            classifier, student, rows, wanted, [few[0][i] for i in some], few[1][some], plan.ahead
        )
        return (weights * classifier.losses(student, rows, wanted)).sum()

    shared.train(
        student, loss_of, plan.steps, plan.learning_rate, "weighed" if is_weighed else "unweighed"
    )
    return student


def texts_of(
    text: shared.Text, package: str, found: Sequence[Function], longest: int
) -> list[list[int]]:
    """Tokens of the codes of a package, and what asks for its name."""
    question = text.ids("\n# package:")
    return [
        text.ids(f.code, longest) + question
        for f in found if f.package == package
    ]  # fmt: skip


def run(quick: bool = False, seed: int = 0) -> Result:
    size, plan = shared.sizes(quick), QUICK if quick else Plan()
    text = shared.read_text(size)
    base = shared.trained_llama(size, text, seed)
    tw.restore(base)
    answers = [text.ids(f" {package}")[0] for package in plan.packages]
    if len(set(answers)) < len(answers):
        raise ValueError("self_training: two packages begin with one token")
    classifier, found = Classifier(answers, text.pad), functions.documented_functions()

    names = (f"{plan.labelled} labels each", "self-training", "re-weighted")
    accuracy: dict[str, list[float]] = {name: [] for name in ("before", *names)}
    for draw in range(plan.draws):
        few: list[list[int]] = []
        labels: list[int] = []
        unlabelled: list[list[int]] = []
        asked: list[list[int]] = []
        truth: list[int] = []
        for number, package in enumerate(plan.packages):
            rows = texts_of(text, package, found, plan.longest)
            rows = shared.drawn(rows, len(rows), seed + 100 * draw)
            ends = (plan.labelled, plan.labelled + plan.unlabelled)
            few += rows[: ends[0]]
            labels += [number] * ends[0]
            unlabelled += rows[ends[0] : ends[1]]
            asked += rows[ends[1] : ends[1] + plan.asked]
            truth += [number] * len(rows[ends[1] : ends[1] + plan.asked])
        wanted = torch.eye(len(answers))[labels]

        def right(model: nn.Module, asked=asked, truth=truth) -> float:
            guess = classifier.probabilities(model, asked).argmax(1)
            return float((guess == torch.tensor(truth)).float().mean() * 100)

        accuracy["before"].append(right(base))
        torch.manual_seed(seed + draw)
        first = adapted(base, plan.width)

        def loss_of(step: int, first=first, few=few, wanted=wanted) -> torch.Tensor:
            return classifier.losses(first, few, wanted).mean()

        shared.train(first, loss_of, plan.few_steps, plan.learning_rate, names[0])
        accuracy[names[0]].append(right(first))
        for name, is_weighed in zip(names[1:], (False, True), strict=True):
            teacher = first
            for n in range(plan.sessions):
                teacher = session(
                    classifier, base, teacher, unlabelled, (few, wanted), plan,
                    seed + 10 * draw + n, is_weighed,
                )  # fmt: skip
            accuracy[name].append(right(teacher))

    means = {name: sum(values) / len(values) for name, values in accuracy.items()}
    table = [(f"{len(asked)} texts of {len(answers)} packages", "right, %", "of each draw")]
    table += [
        (name, f"{means[name]:.1f}", ", ".join(f"{v:.1f}" for v in values))
        for name, values in accuracy.items()
    ]
    trained = sum(p.numel() for p in adapters(first))
    share = 100 * trained / sum(p.numel() for p in first.parameters())
    plain, weighed = (means[name] - means[names[0]] for name in names[1:])
    sentence = (
        f"Over {len(few)} labels alone, self-training gains {plain:+.1f} percentage points, with "
        f"re-weighted pseudo-labels {weighed:+.1f}; adapters are {share:.0f} % of the parameters"
        f"{'.' if weighed > max(plain, 0.0) else ': the re-weighting does not pay here.'}"
    )
    return Result(table, sentence, {f"{name}, right": v for name, v in means.items()})


def main(argv: Sequence[str] | None = None) -> None:
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
