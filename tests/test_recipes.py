"""The recipes: each runs, and its loss is what its source says, on a small model."""

import functools

import pytest
import torch

import tilewright as tw
from tilewright.bench.recipes import many_shot, shared
from tilewright.demo_shared import QUICK, llama

pytest.importorskip("tokenizers")


@functools.cache
def text():
    return shared.read_text(QUICK)


def small_llama(seed=0):
    """Two layers with random weights, accelerated, without dropout."""
    model = llama(QUICK, text().tokenizer, seed)
    tw.accelerate(model)
    return model


def gradients(model, loss):
    """By name, of the parameters that require one."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def expect_finite(result):
    assert len({len(row) for row in result.table}) == 1
    assert result.sentence.endswith(".")
    assert result.figures
    assert all(isinstance(v, float) and v == v for v in result.figures.values()), result.figures


# --- text that is held out is of other packages ---


def test_no_package_is_on_both_sides():
    from tilewright.bench.recipes import functions

    known, others = functions.apart(functions.documented_functions())
    assert len(known) > 1000 and len(others) > 200
    assert {f.package for f in known} & {f.package for f in others} == set()
    assert all(f.summary not in f.code for f in known[:200])


# --- many shots ---

# one row: questions of 2, 1 and 3 tokens, answers of 2, 1 and 3
IDS = torch.tensor([[5, 9, 7, 8, 3, 4, 6, 2, 9, 11, 12, 13]])
ANSWERED = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1]]).bool()
ENDS = (4, 6, 12)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_all_answers_are_as_many_runs_with_one(average):
    """The gradient is the weighted sum of the runs whose prompt ends with one answer."""
    model = small_llama()
    labels = shared.shifted(torch.where(ANSWERED, IDS, -100))
    shares = torch.tensor([1.0, 0.5, 2.0])
    got = gradients(
        model,
        many_shot.answer_loss(model, IDS, labels, average=average, shot_weights=shares),
    )
    want = {n: torch.zeros_like(g) for n, g in got.items()}
    n_answered = int(ANSWERED.sum())
    for share, end in zip(shares, ENDS, strict=True):
        labels = shared.shifted(torch.where(ANSWERED, IDS, -100)[:, :end])
        run = many_shot.answer_loss(model, IDS[:, :end], labels, only_last=True)
        n_last = int((many_shot.shots_of(labels) == many_shot.shots_of(labels).max()).sum())
        part = share * (n_last / n_answered if average == "tokens" else 1 / len(ENDS))
        for name, g in gradients(model, run).items():
            want[name] += part * g
    for name in want:
        scale = want[name].abs().max()
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=float(1e-5 * scale))


def test_questions_have_no_loss_and_do_not_meet_the_head(monkeypatch):
    """The rows that meet the head are the tokens of answers."""
    model = small_llama()
    h = shared.hidden(model, IDS).detach().requires_grad_()
    labels = shared.shifted(torch.where(ANSWERED, IDS, -100))
    monkeypatch.setattr(shared, "hidden", lambda *unused: h)
    many_shot.answer_loss(model, IDS, labels).backward()
    met = h.grad.abs().sum(-1) > 0
    assert torch.equal(met, labels != -100) and int(met.sum()) == int(ANSWERED.sum())


def test_prompts_of_many_shots_are_of_one_module_each():
    result = many_shot.run(quick=True)
    expect_finite(result)
    for arm in ("last answer alone", "all answers"):
        assert result.figures[f"{arm}, last"] < result.figures["before, last"]
