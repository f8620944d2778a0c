"""Several teachers into one student: a small gate weighs them by how well they read each text.

    r_e = exp(-loss of teacher e on the text)
    p = softmax(MLP(r)), shares below 0.15 dropped
    q = sum_e p_e q_e, of each teacher's ten likeliest tokens
    loss = 0.9 CE(labels) + 0.1 CE(q) + 0.5 CV^2(sum of p over the texts)

The gate learns through q, in the same steps as the student. Two teachers have each read half of the
files, and a third has hardly been trained: what a gate is for.

    python -m tilewright.bench.recipes.distill

Source: Kong et al., Enabling flexible multi-LLM integration for scalable knowledge aggregation,
arXiv 2505.23844.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import tilewright as tw
from tilewright.bench.recipes import shared
from tilewright.bench.recipes.shared import Result
from tilewright.data import pack
from tilewright.demo_shared import llama

NOISE = 0.01  # nats: less than this is no difference


@dataclass(frozen=True)
class Plan:
    teacher_steps: tuple[int, ...] = (250, 250, 25)
    student_hidden: int = 64
    rows: int = 4
    context: int = 256
    steps: int = 200
    learning_rate: float = 3e-3
    top: int = 10
    soft_weight: float = 0.1
    balance: float = 0.5
    threshold: float = 0.15


QUICK = Plan(teacher_steps=(3, 3, 1), student_hidden=32, rows=2, context=64, steps=3)


class Gate(nn.Module):
    """(B, E) rewards to (B, E) shares: those above the threshold, the largest always.

    threshold   of a share before the others are dropped
    """

    def __init__(self, n_teachers: int, threshold: float = 0.15, width: int = 16):
        super().__init__()
        self.threshold = threshold
        self.layers = nn.Sequential(
            nn.Linear(n_teachers, width), nn.ReLU(), nn.Linear(width, n_teachers)
        )

    def forward(self, rewards: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(self.layers(rewards), -1)
        kept = p > self.threshold
        kept = kept.scatter(-1, p.argmax(-1, keepdim=True), True)
        p = torch.where(kept, p, 0.0)
        return p / p.sum(-1, keepdim=True)


def imbalance(shares: torch.Tensor) -> torch.Tensor:
    """CV^2 of the teachers' shares summed over the batch: variance over mean squared."""
    total = shares.sum(0)
    return total.var(unbiased=False) / total.mean().square()


@dataclass(frozen=True)
class Targets:
    """What the teachers say of a batch.

    ids      (B, L, E, K) their likeliest tokens, probs their probabilities, summing to 1
    rewards  (B, E)
    """

    ids: torch.Tensor
    probs: torch.Tensor
    rewards: torch.Tensor


@torch.no_grad()
def ask(
    teachers: Sequence[nn.Module], ids: torch.Tensor, labels: torch.Tensor, top: int
) -> Targets:
    found, probs, rewards = [], [], []
    for teacher in teachers:
        h, weight = shared.hidden(teacher.eval(), ids), shared.head(teacher)
        best = (h @ weight.T).topk(top, -1)
        found.append(best.indices)
        probs.append(torch.softmax(best.values, -1))
        log_prob = tw.sequence_log_probs(h, weight, labels, average=True)
        rewards.append(log_prob.exp())
    return Targets(torch.stack(found, 2), torch.stack(probs, 2), torch.stack(rewards, 1))


def mixed_loss(
    h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, targets: Targets,
    shares: torch.Tensor, soft_weight: float,
) -> torch.Tensor:  # fmt: skip
    """The loss of labels and of the teachers' mixture; its gradient reaches the shares (B, E)."""
    probs = shares[:, None, :, None] * targets.probs
    return tw.linear_cross_entropy(
        h, weight, labels, soft_ids=targets.ids.flatten(2), soft_probs=probs.flatten(2),
        soft_weight=soft_weight,
    )  # fmt: skip


def run(quick: bool = False, seed: int = 0) -> Result:
    size, plan = shared.sizes(quick), QUICK if quick else Plan()
    text = shared.read_text(size)
    halves = [text.train[0::2], text.train[1::2], text.train[0::2]]
    teachers = [
        shared.trained_llama(
            replace(size, most_steps=steps), text, seed + e, half, f"teacher {e + 1}"
        )
        for e, (half, steps) in enumerate(zip(halves, plan.teacher_steps, strict=True))
    ]
    n = len(teachers)
    rows = pack(text.train, plan.context, text.pad)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(plan.steps):
        picked = torch.randint(len(rows), (plan.rows,), generator=generator)
        ids, labels = rows.input_ids[picked], shared.shifted(rows.labels[picked])
        batches.append((ids, labels, ask(teachers, ids, labels, plan.top)))

    student_size = {"hidden": plan.student_hidden, "heads": 2, "kv_heads": 1}
    losses: dict[str, float] = {
        f"teacher {e + 1}": shared.text_loss(t, text, size.held_out_rows, size.context)
        for e, t in enumerate(teachers)
    }
    mean_shares = torch.zeros(n)
    for name in ("labels alone", "equal shares", "gate"):
        student = llama(replace(size, **student_size), text.tokenizer, seed + 10)
        tw.accelerate(student)
        torch.manual_seed(seed)
        gate = Gate(n, plan.threshold)

        def loss_of(step: int, name=name, student=student, gate=gate) -> torch.Tensor:
            ids, labels, targets = batches[step]
            h, weight = shared.hidden(student, ids), shared.head(student)
            if name == "labels alone":
                return tw.linear_cross_entropy(h, weight, labels)
            shares = torch.full((len(ids), n), 1 / n)
            if name == "gate":
                shares = gate(targets.rewards)
            loss = mixed_loss(h, weight, labels, targets, shares, plan.soft_weight)
            return loss + plan.balance * imbalance(shares) if name == "gate" else loss

        trained = nn.ModuleList([student, gate] if name == "gate" else [student])
        shared.train(trained, loss_of, plan.steps, plan.learning_rate, name)
        losses[f"student, {name}"] = shared.text_loss(
            student, text, size.held_out_rows, size.context
        )
        if name == "gate":
            with torch.no_grad():
                mean_shares = torch.cat([gate(b[2].rewards) for b in batches]).mean(0)

    table = [("packages that nobody has read", "loss a token")]
    table += [(name, f"{loss:.3f}") for name, loss in losses.items()]
    alone, equal, gated = (
        losses[f"student, {name}"] for name in ("labels alone", "equal shares", "gate")
    )
    gains = {"labels alone": alone - gated, "equal shares": equal - gated}
    told = [
        f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'} than from {other}"
        for other, gain in gains.items()
    ]
    sentence = (
        f"The gate gives the teachers {', '.join(f'{100 * s:.0f}' for s in mean_shares)} % and the "
        f"student is {' and '.join(told)}"
        f"{'.' if min(gains.values()) > NOISE else ': the gate does not pay at this size.'}"
    )
    figures = {**losses, **{f"share {e + 1}": float(s) for e, s in enumerate(mean_shares)}}
    return Result(table, sentence, figures)


def main(argv: Sequence[str] | None = None) -> None:
    shared.main(__doc__, run, argv)


if __name__ == "__main__":
    main()
