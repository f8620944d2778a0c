"""Losses over log-probabilities: closed forms, weights of tokens, distillation."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_cases import normal
from memory_probes import allocations

import tilewright as tw
from tilewright.ops.loss import distill, reference

B, L, N, V = 4, 9, 8, 30


def pairs(seed=0):
    """Hidden states and labels of chosen and rejected answers, and the heads of both models."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (2, B, L), generator=generator)
    labels[0, 1, 5:] = labels[1, 2, 3:] = -100
    h = normal(2, B, L, N, seed=seed).requires_grad_()
    weight, other = normal(V, N, seed=1).requires_grad_(), normal(V, N, seed=2)
    return h, weight, other, labels


def naive(h, weight, labels):
    """Sums of log-probabilities by way of all logits."""
    log_p = torch.log_softmax(h @ weight.T, -1)
    found = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels >= 0, found, 0.0).sum(-1)


def test_sequences_are_sums_of_tokens():
    h, weight, _, labels = pairs()
    want = naive(h, weight, labels)
    torch.testing.assert_close(tw.sequence_log_probs(h, weight, labels), want)
    counts = (labels >= 0).sum(-1)
    got = tw.sequence_log_probs(h, weight, labels, average=True)
    torch.testing.assert_close(got, want / counts)
    labels[0, 0] = -100
    assert tw.sequence_log_probs(h, weight, labels, average=True)[0, 0] == 0


def test_dpo_at_the_reference_is_log_2_and_its_gradient_is_the_closed_form():
    h, weight, other, labels = pairs()

    def sums(head):
        return tw.sequence_log_probs(h, head, labels)

    same = sums(weight)
    assert tw.dpo_loss(*same, *same.detach()).item() == pytest.approx(math.log(2), abs=1e-7)
    policy, fixed = sums(weight), sums(other).detach()
    leaves = policy.detach().requires_grad_()
    (got,) = torch.autograd.grad(tw.dpo_loss(*leaves, *fixed, beta=0.3), leaves)
    margin = 0.3 * ((policy[0] - fixed[0]) - (policy[1] - fixed[1]))
    slope = -0.3 * torch.sigmoid(-margin) / B
    torch.testing.assert_close(got, torch.stack([slope, -slope]).detach())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_without_logits_is_dpo_with_them(smoothing):
    h, weight, other, labels = pairs()

    def both(sums):
        fixed = sums(h.detach(), other, labels)
        loss = tw.dpo_loss(*sums(h, weight, labels), *fixed, beta=0.2, label_smoothing=smoothing)
        return loss, *torch.autograd.grad(loss, (h, weight))

    torch.testing.assert_close(both(tw.sequence_log_probs), both(naive), rtol=1e-4, atol=1e-6)
    free = tw.dpo_loss(*naive(h, weight, labels))
    zeros = torch.zeros(B)
    assert torch.equal(free, tw.dpo_loss(*naive(h, weight, labels), zeros, zeros))


def test_simpo_orpo_and_kto_by_hand():
    chosen, rejected = torch.tensor([-1.0, -0.5]), torch.tensor([-2.0, -0.1])
    sigmoid = torch.sigmoid
    want = -(sigmoid(2.5 * (chosen - rejected) - 0.7)).log().mean()
    torch.testing.assert_close(tw.simpo_loss(chosen, rejected, beta=2.5, margin=0.7), want)

    p, q = chosen.exp(), rejected.exp()
    ratio = (p / (1 - p)).log() - (q / (1 - q)).log()
    want = -chosen.mean() - 0.3 * sigmoid(ratio).log().mean()
    torch.testing.assert_close(tw.orpo_loss(chosen, rejected, weight=0.3), want)
    near = torch.tensor([-1e-9, -60.0], requires_grad=True)  # 1 - exp is lost in float32
    loss = tw.orpo_loss(near, torch.tensor([-1.0, -1.0]), nll=torch.zeros(()), weight=1.0)
    (grad,) = torch.autograd.grad(loss, near)
    assert loss.isfinite() and grad.isfinite().all() and grad[1] < -0.4

    policy = torch.tensor([-5.0, -6.0, -7.0])
    fixed, good = torch.tensor([-5.5, -5.0, -7.0]), torch.tensor([True, False, True])
    got = tw.kto_loss(policy, fixed, good, kl=0.25, beta=0.4, undesirable_weight=1.5)
    r = policy - fixed
    want = (
        (1 - sigmoid(0.4 * (r[0] - 0.25))) + 1.5 * (1 - sigmoid(0.4 * (0.25 - r[1])))
        + (1 - sigmoid(0.4 * (r[2] - 0.25)))
    ) / 3  # fmt: skip
    torch.testing.assert_close(got, want)


# --- groups ---


def grpo_inputs():
    old, fixed = normal(B, L) - 2, normal(B, L, seed=3) - 2
    mask = torch.arange(L)[None] < torch.tensor([9, 4, 1, 6])[:, None]
    return old, fixed, mask


def test_equal_rewards_give_no_gradient():
    old, _, mask = grpo_inputs()
    advantages = tw.group_advantages(torch.full((B,), 3.0), 2)
    assert torch.equal(advantages, torch.zeros(B))
    now = (old + 0.1).requires_grad_()
    (grad,) = torch.autograd.grad(tw.grpo_loss(now, old, advantages, mask), now)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("average", ["sequences", "tokens"])
def test_at_the_old_policy_it_is_the_policy_gradient(average):
    old, _, mask = grpo_inputs()
    advantages = tw.group_advantages(torch.tensor([1.0, 0.0, 2.0, 5.0]), 2)
    torch.testing.assert_close(advantages[:2].sum(), torch.tensor(0.0))
    now = old.clone().requires_grad_()
    got = torch.autograd.grad(tw.grpo_loss(now, old, advantages, mask, average=average), now)[0]
    share = mask / (mask.sum(1, keepdim=True) * B if average == "sequences" else mask.sum())
    torch.testing.assert_close(got, -advantages[:, None] * share)


def test_the_clip_stops_what_has_gone_far_enough():
    old = torch.zeros(4, 1)
    mask = torch.ones(4, 1, dtype=torch.bool)
    now = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (grad,) = torch.autograd.grad(tw.grpo_loss(now, old, advantages, mask), now)
    assert (grad[:, 0] != 0).tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(tw.grpo_loss(now, old, advantages, mask, clip_above=0.9), now)
    assert (grad[:, 0] != 0).tolist() == [True, True, True, False]


def test_the_distance_to_the_reference_is_at_least_0():
    old, fixed, mask = grpo_inputs()
    none = torch.zeros(B)
    kl = tw.grpo_loss(old, old, none, mask, reference_log_probs=fixed, beta=1.0)
    assert kl > 0.1
    assert tw.grpo_loss(old, old, none, mask, reference_log_probs=old, beta=1.0) == 0
    wild = torch.where(mask, old, float("inf"))  # what stands outside the mask
    assert tw.grpo_loss(wild, old, none, mask, reference_log_probs=fixed, beta=1.0) == kl


def test_a_policy_learns_what_is_rewarded():
    """16 tokens, a reward of 1 for one of them: from about 1/16 to above 0.8 in 200 steps."""
    torch.manual_seed(0)
    h, weight = torch.ones(64, 4), torch.zeros(16, 4, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    means = []
    for _ in range(200):
        drawn = torch.multinomial(torch.softmax(h @ weight.detach().T, -1), 1)
        reward = (drawn[:, 0] == 5).float()
        log_probs = tw.linear_log_probs(h, weight, drawn)
        advantages = tw.group_advantages(reward, 16)
        mask = torch.ones_like(drawn, dtype=torch.bool)
        loss = tw.grpo_loss(log_probs, log_probs.detach(), advantages, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(reward.mean().item())
    assert sum(means[:10]) / 10 < 0.15 and sum(means[-10:]) / 10 > 0.8


# --- weights of tokens ---


def test_weights_of_a_ranking():
    labels = torch.tensor([[-100, -100, 11, 7, 12, 12, 7, 8, 13]])
    weights = tw.listwise_weights(labels, [7, 8])
    place = [2.0, 1 + 1 / math.log2(3), 1.5]
    want = [1, 1, place[0], 1, place[1], place[1], 1, 1, place[2]]
    torch.testing.assert_close(weights, torch.tensor([want]))
    opened = torch.tensor([[8, 11, 8, 7, 8, 12, 8]])  # "[a] > [b]"
    want = torch.tensor([[1, 2.0, 1, 1, 1, place[1], 1]])
    torch.testing.assert_close(tw.listwise_weights(opened, (7, 8)), want)


def test_weights_of_a_hundred_places_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    rows, wants = [], []
    for _ in range(3):
        row, want = [-100] * 5, [1.0] * 5
        for i in range(1, 101):
            n = int(torch.randint(1, 3, (), generator=generator))
            row += [50 + i] * n + [3]
            want += [1 + 1 / math.log2(i + 1)] * n + [1.0]
        rows.append(row + [-100] * (400 - len(row)))
        wants.append(want + [1.0] * (400 - len(want)))
    got = tw.listwise_weights(torch.tensor(rows), 3)
    torch.testing.assert_close(got, torch.tensor(wants))


def test_a_ranking_of_two_by_hand():
    """The sum of weighted losses over the number of labels, not over the sum of weights."""
    h, weight = normal(1, 4, N), normal(V, N, seed=1)
    labels = torch.tensor([[-100, 4, 2, 9]])  # a, separator, b
    token_weight = tw.listwise_weights(labels, 2)
    got = tw.linear_cross_entropy(h, weight, labels, token_weight=token_weight, denominator=3)
    nll = -torch.log_softmax(h @ weight.T, -1)[0]
    want = (2.0 * nll[1, 4] + nll[2, 2] + (1 + 1 / math.log2(3)) * nll[3, 9]) / 3
    torch.testing.assert_close(got, want)
    assert torch.equal(
        tw.linear_cross_entropy(h, weight, labels, token_weight=torch.ones(1, 4)),
        tw.linear_cross_entropy(h, weight, labels),
    )


def test_a_token_of_twice_the_weight_changes_its_own_row():
    h, weight = normal(6, N).requires_grad_(), normal(V, N, seed=1)
    labels, ones = torch.arange(6), torch.ones(6)
    twice = ones.clone()
    twice[3] = 2.0

    def gradient(w):
        loss = tw.linear_cross_entropy(h, weight, labels, token_weight=w, denominator=6)
        return torch.autograd.grad(loss, h)[0]

    before, after = gradient(ones), gradient(twice)
    rest = torch.arange(6) != 3
    assert torch.equal(after[rest], before[rest])
    torch.testing.assert_close(after[3], 2 * before[3])


ANSWERS = torch.tensor([-100, -100, 3, 5, -100, 7, -100, -100, 1, 2, 4, -100])  # 2, 1 and 3 tokens


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_all_answers_are_the_sum_of_the_runs_with_one(average):
    """A causal model: hidden state t sees inputs up to t, so a run over a prefix is a slice."""
    x, weight = normal(12, N).requires_grad_(), normal(V, N, seed=1).requires_grad_()
    shares = torch.tensor([1.0, 0.5, 2.0])

    def states(n):
        return torch.tanh(torch.cumsum(x[:n], 0))

    token_weight, denominator = tw.many_shot_weights(
        ANSWERS[None], average=average, shot_weights=shares
    )
    loss = tw.linear_cross_entropy(
        states(12)[None], weight, ANSWERS[None], token_weight=token_weight, denominator=denominator
    )
    got = torch.autograd.grad(loss, (x, weight))
    want = [torch.zeros_like(x), torch.zeros_like(weight)]
    for i, (begin, end) in enumerate([(2, 4), (5, 6), (8, 11)]):
        last = torch.full((end,), -100)
        last[begin:end] = ANSWERS[begin:end]
        run = tw.linear_cross_entropy(states(end), weight, last)  # the mean over this answer
        share = shares[i] * ((end - begin) / 6 if average == "tokens" else 1 / 3)
        for total, g in zip(want, torch.autograd.grad(run, (x, weight)), strict=True):
            total += share * g
    torch.testing.assert_close(list(got), want, rtol=1e-5, atol=1e-7)


def test_shots_without_weights_are_the_plain_loss():
    h, weight = normal(2, 12, N), normal(V, N, seed=1)
    labels = torch.stack([ANSWERS, ANSWERS.flip(0)])
    token_weight, denominator = tw.many_shot_weights(labels)
    got = tw.linear_cross_entropy(
        h, weight, labels, token_weight=token_weight, denominator=denominator
    )
    torch.testing.assert_close(got, tw.linear_cross_entropy(h, weight, labels))
    weights, _ = tw.many_shot_weights(labels, shot_weights=torch.tensor([0.0, 0.0, 1.0]))
    assert weights[0].nonzero()[:, 0].tolist() == [8, 9, 10]
    assert weights[1].nonzero()[:, 0].tolist() == [8, 9]


# --- distillation ---


def dense_divergence(h, weight, other_h, other_weight, kind, temperature=1.0, mixture=0.5):
    """By the definition, in float64."""
    log_p = torch.log_softmax(reference.logits(h, weight) / temperature, -1)
    log_q = torch.log_softmax(reference.logits(other_h, other_weight) / temperature, -1)
    if kind == "forward":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if kind == "reverse":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    log_m = (mixture * log_q.exp() + (1 - mixture) * log_p.exp()).log()
    of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return mixture * of_q + (1 - mixture) * F.kl_div(
        log_m, log_p, reduction="none", log_target=True
    ).sum(-1)


@pytest.mark.parametrize("kind", distill.KINDS)
def test_distillation_is_the_dense_divergence(kind, monkeypatch):
    monkeypatch.setattr(distill, "BLOCK_BYTES", 16 * V * 4)  # blocks of 16 tokens
    h, weight = normal(50, N).requires_grad_(), normal(V, N, seed=1).requires_grad_()
    other_h, other_weight = normal(50, 5, seed=2), normal(V, 5, seed=3)
    labels = torch.arange(50) % V
    labels[::3] = -100
    got = tw.linear_distillation(
        h, weight, other_h, other_weight, labels=labels, kind=kind, temperature=1.7, mixture=0.3
    )
    rows = dense_divergence(h, weight, other_h, other_weight, kind, 1.7, 0.3)
    want = rows[labels >= 0].mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    grads, wanted = (torch.autograd.grad(y, (h, weight)) for y in (2 * got, 2 * want))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-7)
    same = tw.linear_distillation(h, weight, h, weight, kind=kind)
    assert abs(same) < 1e-6


def test_distillation_holds_a_block_of_logits(monkeypatch):
    monkeypatch.setattr(distill, "BLOCK_BYTES", 16 * 900 * 4)
    h, weight = normal(200, N).requires_grad_(), normal(900, N, seed=1).requires_grad_()
    other = normal(200, N, seed=2)
    held = max(allocations(lambda: tw.linear_distillation(h, weight, other, weight).backward()))
    assert held == 16 * 900 * 4


def test_distillation_is_registered(clean_memory):
    h, weight, other = normal(9, N).requires_grad_(), normal(V, N, seed=1), normal(9, N, seed=2)
    bias = normal(V, seed=4).requires_grad_()
    inputs = (h, weight, bias, other, weight, None, torch.full((9,), 1 / 9), 0.5, 0.5, "reverse",
              [True, False, True])  # fmt: skip
    torch.library.opcheck(torch.ops.tilewright.distillation, inputs)
    torch._dynamo.reset()

    def call(h):
        return tw.linear_distillation(h, weight, other, weight, bias=bias)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), call(h))


def test_similarities_learn_from_generation_alone():
    generation, cosine = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    loss = tw.alignment_loss(generation, cosine, temperature=0.5)
    loss.backward()
    assert generation.grad is None and cosine.grad is not None
    want = (torch.softmax(cosine / 0.5, -1) - torch.softmax(generation, -1)) / (0.5 * 3)
    torch.testing.assert_close(cosine.grad, want.detach())
    assert tw.alignment_loss(generation, 0.5 * generation, temperature=0.5).item() < 1e-6


# --- gates over several teachers ---


def test_a_gate_over_teachers_gets_its_gradient():
    """Equal teachers give the same loss for any gate; unequal ones move it."""
    h, weight = normal(6, N), normal(V, N, seed=1)
    ids = torch.arange(5).repeat(6, 2)
    good = torch.full((5,), 0.2)
    gate = torch.zeros(2, requires_grad=True)

    def loss(other):
        share = torch.softmax(gate, 0)
        probs = torch.cat([share[0] * good, share[1] * other]).expand(6, 10)
        return tw.linear_cross_entropy(h, weight, soft_ids=ids, soft_probs=probs)

    (grad,) = torch.autograd.grad(loss(good), gate)
    torch.testing.assert_close(grad, torch.zeros(2), rtol=0, atol=1e-6)
    sharp = torch.tensor([1.0, 0, 0, 0, 0])
    (grad,) = torch.autograd.grad(loss(sharp), gate)
    log_p = torch.log_softmax(h @ weight.T, -1)[:, :5].mean(0)
    want = -0.25 * ((good - sharp) * log_p).sum()
    torch.testing.assert_close(grad, torch.stack([want, -want]), rtol=1e-4, atol=1e-6)


def test_meta_weights_are_products_of_gradients():
    """Two classes that a line tells apart: an example with the wrong label gets no weight."""
    torch.manual_seed(0)
    side = torch.tensor([0, 1, 0, 1, 0, 1])
    x = torch.randn(6, 3) + 3 * torch.stack([side * 2 - 1] * 3, 1)
    labels = side.clone()
    labels[1] = 0
    good_x, good_labels = x[2:4] + 0.1, side[2:4]
    weight = (0.1 * torch.randn(2, 3)).requires_grad_()
    (g,) = torch.autograd.grad(tw.linear_cross_entropy(good_x, weight, good_labels), weight)

    def losses(head):
        return tw.linear_cross_entropy(x, head, labels, reduction="none")

    with torch.no_grad():
        ahead, behind = losses(weight + 1e-2 * g), losses(weight - 1e-2 * g)
    got = tw.meta_weights(ahead, behind, step=1e-2)
    each = [torch.autograd.grad(l, weight, retain_graph=True)[0] for l in losses(weight)]
    want = torch.stack([(g * one).sum() for one in each]).clamp(min=0)
    torch.testing.assert_close(got, want / want.sum(), rtol=1e-3, atol=1e-4)
    assert got[1] == 0 and (got[[0, 2, 3, 4, 5]] > 0).all()
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))
    assert torch.equal(tw.meta_weights(behind[1:2] * 0, behind[1:2], step=1.0), torch.zeros(1))


def test_a_gradient_of_a_gradient_is_refused():
    h, weight = normal(4, N).requires_grad_(), normal(V, N, seed=1)
    labels = torch.arange(4)
    for loss in (
        tw.linear_cross_entropy(h, weight, labels),
        tw.linear_log_probs(h, weight, labels).sum(),
        tw.linear_distillation(h, weight, h, weight),
    ):
        with pytest.raises(RuntimeError, match="no gradient of a gradient"):
            torch.autograd.grad(loss, h, create_graph=True)


X, Y = torch.zeros(3), torch.zeros(2)
M = torch.ones(2, 3, dtype=torch.bool)
P = torch.zeros(2, 3)
REFUSED = {
    "sequence_log_probs: labels has shape (2,), need axes": lambda: tw.sequence_log_probs(
        P[None], normal(V, 3), Y.long()
    ),
    "dpo_loss: rejected has shape (2,), need (3,) as chosen": lambda: tw.dpo_loss(X, Y),
    "dpo_loss: one reference came without the other": lambda: tw.dpo_loss(X, X, X),
    "dpo_loss: beta is 0, need a number above 0": lambda: tw.dpo_loss(X, X, beta=0),
    "dpo_loss: label_smoothing is 0.7, need 0 to 0.5": lambda: tw.dpo_loss(
        X, X, label_smoothing=0.7
    ),
    "simpo_loss: margin is -1, need at least 0": lambda: tw.simpo_loss(X, X, margin=-1),
    "orpo_loss: weight is -1, need at least 0": lambda: tw.orpo_loss(X, X, weight=-1),
    "kto_loss: is_desirable is torch.float32, need torch.bool": lambda: tw.kto_loss(X, X, X),
    "group_advantages: rewards has shape (3,), need axes (B,) with B a multiple of group_size = 2":
        lambda: tw.group_advantages(X, 2),
    "grpo_loss: mask has shape (3,), need (2, 3) as log_probs": lambda: tw.grpo_loss(P, P, Y, X),
    "and mask is torch.float32, need": lambda: tw.grpo_loss(P, P, Y, P),
    "grpo_loss: advantages has shape (3,), need (2,) or (2, 3)": lambda: tw.grpo_loss(P, P, X, M),
    "grpo_loss: beta is 0.1, need at least 0, and reference_log_probs": lambda: tw.grpo_loss(
        P, P, Y, M, beta=0.1
    ),
    'grpo_loss: no average "rows"': lambda: tw.grpo_loss(P, P, Y, M, average="rows"),
    "alignment_loss: temperature is 0": lambda: tw.alignment_loss(P, P, temperature=0),
    "listwise_weights: labels is torch.float32": lambda: tw.listwise_weights(P, 3),
    "many_shot_weights: shot_weights has 2 elements, need 3": lambda: tw.many_shot_weights(
        ANSWERS[None], shot_weights=torch.ones(2)
    ),
    "linear_distillation: teacher_h has shape (3, 3)": lambda: tw.linear_distillation(
        P, normal(V, 3), normal(3, 3), normal(V, 3)
    ),
    "meta_weights: step is 0, need": lambda: tw.meta_weights(X, X, step=0),
    'linear_distillation: no kind "both"': lambda: tw.linear_distillation(
        P, normal(V, 3), P, normal(V, 3), kind="both"
    ),
    "linear_distillation: mixture is 1": lambda: tw.linear_distillation(
        P, normal(V, 3), P, normal(V, 3), mixture=1
    ),
    "linear_distillation: labels is torch.int64 of shape (3,)": lambda: tw.linear_distillation(
        P, normal(V, 3), P, normal(V, 3), labels=X.long()
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError) as error:
        REFUSED[message]()
    assert message in str(error.value)
