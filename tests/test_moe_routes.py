"""Noisy, thresholded and forced routes, experts of other processes, the mutual information loss."""

import math

import pytest
import torch
from attention_inputs import bitwise
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops

T, E, K = 50, 12, 3


def logits_of(dtype=torch.float64, seed=0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- noise ---


def test_the_noise_is_as_large_as_softplus_says():
    logits, raw = logits_of(), logits_of(seed=1)
    noise = logits_of(seed=2)
    noisy, size = ops.add_router_noise(logits, raw, noise=noise)
    torch.testing.assert_close(size, (1 + raw.exp()).log())
    torch.testing.assert_close(noisy, logits + (1 + raw.exp()).log() * noise)
    wide = torch.zeros(20_000, 2)
    drawn, size = ops.add_router_noise(wide, torch.tensor([[-1.0, 2.0]]).expand(20_000, 2))
    torch.testing.assert_close(drawn.std(0), size[0], rtol=0.03, atol=0)
    assert drawn.mean(0).abs().max() < 0.1
    assert ops.add_router_noise(logits.bfloat16(), 0.5)[0].dtype == torch.float32
    still, size = ops.add_router_noise(logits, 0.0)
    assert torch.equal(still, logits) and not size.any()


def test_gradients_reach_logits_and_the_size_of_the_noise():
    logits, raw = (logits_of(seed=n)[:5].requires_grad_() for n in (0, 1))
    noise = logits_of(seed=2)[:5]
    assert torch.autograd.gradcheck(
        lambda a, b: ops.add_router_noise(a, b, noise=noise), (logits, raw)
    )


def test_noisy_top_k_and_its_load_loss():
    logits, raw = logits_of(torch.float32), logits_of(torch.float32, 1).requires_grad_()
    noisy, size = ops.add_router_noise(logits, raw)
    route = ops.route_tokens(noisy, K, score="softmax_of_chosen")
    assert torch.equal(route.ids[:, 0], noisy.argmax(-1))
    assert not torch.equal(route.ids, ops.route_tokens(logits, K).ids)
    loss = ops.load_loss(logits, noisy, size, K)
    (grad,) = torch.autograd.grad(loss, raw)
    assert grad.isfinite().all() and grad.any()


# --- thresholds ---


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("by, threshold", [("score", 0.12), ("mass", 0.55)])
@pytest.mark.parametrize("at_least, at_most", [(0, None), (1, None), (2, 4)])
def test_thresholds_by_hand(score, by, threshold, at_least, at_most):
    logits = logits_of()
    threshold *= 4 if score == "sigmoid" else 1
    rule = dict(by=by, score=score, at_least=at_least, at_most=at_most)
    route = ops.route_by_threshold(logits, threshold, **rule)
    counts = set()
    for t in range(T):
        scores = logits[t].sigmoid() if score == "sigmoid" else logits[t].softmax(0)
        order = sorted(range(E), key=lambda e, scores=scores: (-float(scores[e]), e))
        total, taken = 0.0, []
        for e in order[: at_most or E]:
            s = float(scores[e])
            if len(taken) < at_least or (s >= threshold if by == "score" else total < threshold):
                taken.append(e)
            total += s
        counts.add(len(taken))
        slots = at_most or E
        assert route.ids[t].tolist() == taken + [-1] * (slots - len(taken))
        torch.testing.assert_close(route.gates[t, : len(taken)], scores[taken])
        assert not route.gates[t, len(taken) :].any()
    assert len(counts) > 1


def test_gates_of_a_threshold_can_sum_to_one():
    logits = logits_of().requires_grad_()
    route = ops.route_by_threshold(logits, 0.1, renormalize=True, scale=2.0)
    torch.testing.assert_close(route.gates.sum(1), torch.full((T,), 2.0).double())
    (grad,) = torch.autograd.grad(route.gates.square().sum(), logits)
    alone = (route.ids >= 0).sum(1) == 1
    assert grad.isfinite().all() and grad.any() and grad[alone].abs().max() < 1e-12
    nobody = ops.route_by_threshold(logits, 2.0, at_least=0, renormalize=True)
    assert (nobody.ids == -1).all() and not nobody.gates.any()


def test_ties_at_a_threshold_go_to_the_lowest_index():
    route = ops.route_by_threshold(torch.zeros(70, E), 2.5 / E, by="mass")
    assert route.ids[:, :4].tolist() == [[0, 1, 2, -1]] * 70


# --- experts that are given ---


def weights(n_experts=4, features=24, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    shapes = (n_experts, 2 * width, features), (n_experts, features, width)
    return [(torch.randn(s, generator=generator) / s[-1] ** 0.5).to(dtype) for s in shapes]


def test_examples_go_to_their_experts_as_whole_spans():
    experts = torch.tensor([2, 0, 2])
    assert ops.route_examples(experts, length=2).tolist() == [[2, 2], [0, 0], [2, 2]]
    packed = ops.route_examples(experts.int(), cu_seqlens=torch.tensor([0, 3, 3, 4]))
    assert packed.tolist() == [2, 2, 2, 2] and packed.dtype == torch.int32
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    masked = ops.route_examples(experts, length=2, mask=mask)
    assert masked.tolist() == [[2, 2], [0, -1], [-1, -1]]
    assert ops.route_examples(experts[:0], length=5).shape == (0, 5)


def test_types_go_to_their_experts():
    types = torch.tensor([[0, 1, 5], [2, -3, 1]])
    ids = ops.route_types(types, torch.tensor([3, -1, 0]))
    assert ids.tolist() == [[3, -1, -1], [0, -1, -1]]
    assert ops.route_types(types, torch.tensor([], dtype=torch.int32)).tolist() == [[-1] * 3] * 2


def dense(x, w1, w2, dy):
    """A dense layer's output and the gradients of its weights."""
    w1, w2 = w1.detach().requires_grad_(), w2.detach().requires_grad_()
    gate, up = (x @ w1.T).chunk(2, -1)
    y = (torch.nn.functional.silu(gate) * up) @ w2.T
    return y.detach(), *torch.autograd.grad(y, (w1, w2), dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forced_examples_are_those_of_separate_dense_layers(dtype):
    """Outputs and gradients of N models, each with its examples; and an error of 1 % is seen."""
    w1, w2 = (w.requires_grad_() for w in weights(dtype=dtype))
    x, dy = torch.randn(50, 7, 24).to(dtype), torch.randn(50, 7, 24).to(dtype)
    experts = torch.tensor([3, 0, 3, 1, 0]).repeat(10)
    y = ops.moe_mlp(x, ops.route_examples(experts, length=7), None, w1, w2)
    grads = torch.autograd.grad(y, (w1, w2), dy)
    for e in (0, 1, 3):
        mine = experts == e
        given = x[mine], w1[e], w2[e], dy[mine]
        stock, truth = dense(*given), dense(*(t.double() for t in given))
        for got, *others in zip((y[mine], grads[0][e], grads[1][e]), stock, truth, strict=True):
            terms = 8 * others[1].abs().mean() + 0 * others[1]
            assert_errs_at_most_twice_stock("forced", got, *others, terms)
            with pytest.raises(AssertionError):
                assert_errs_at_most_twice_stock("spoilt", 1.01 * got, *others, terms)
    assert not grads[0][2].any() and not grads[1][2].any()


def test_permuted_examples_have_permuted_outputs():
    w1, w2 = weights()
    x, experts = torch.randn(8, 6, 24), torch.tensor([0, 3, 1, 1, 0, 2, 3, 0])
    order = torch.randperm(8)
    y = ops.moe_mlp(x, ops.route_examples(experts, length=6), None, w1, w2)
    again = ops.moe_mlp(x[order], ops.route_examples(experts[order], length=6), None, w1, w2)
    assert bitwise(again, y[order])


# --- experts of other processes ---


def test_processes_with_a_part_of_the_experts_add_up_to_one_with_all():
    w1, w2 = weights()
    x = torch.randn(T, 24, requires_grad=True)
    route = ops.route_tokens(torch.randn(T, 4), 2)
    ids = torch.cat([route.ids, torch.full((T, 1), -1)], 1)
    gates = torch.cat([route.gates, torch.full((T, 1), float("nan"))], 1)
    whole = ops.moe_mlp(x, ids, gates, w1, w2)
    parts = []
    for first, count in ((0, 1), (1, 3)):
        local = ops.keep_local(ids, first, count)
        assert local.min() >= 0 and local.max() == count
        held = slice(first, first + count)
        parts.append(ops.moe_mlp(x, local, gates, w1[held], w2[held]))
        counts = ops.tokens_per_expert(local, count)
        assert torch.equal(counts, ops.tokens_per_expert(ids, 4)[held])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    dy = torch.randn(T, 24)
    got, need = (torch.autograd.grad(y, x, dy)[0] for y in (sum(parts), whole))
    torch.testing.assert_close(got, need, rtol=1e-5, atol=1e-5)
    nobody = ops.moe_mlp(x, ops.keep_local(ids, 9, 2), gates, w1[:2], w2[:2])
    assert not nobody.any()


# --- mutual information ---


def by_sums(scores, tasks, n_tasks):
    joint = torch.zeros(n_tasks, E, dtype=torch.float64)
    for t in range(len(tasks)):
        joint[tasks[t]] += scores[t] / len(tasks)
    total = 0.0
    for n in range(n_tasks):
        for e in range(E):
            if joint[n, e] > 0:
                total -= joint[n, e] * (joint[n, e] / (joint[n].sum() * joint[:, e].sum())).log()
    return total


def test_mutual_information_by_hand_and_its_gradient():
    logits, tasks = logits_of().requires_grad_(), torch.arange(T) * 7 % 3
    need = by_sums(logits.softmax(-1), tasks, 4)
    got = ops.mutual_information_loss(logits.softmax(-1), tasks, 4)
    torch.testing.assert_close(got.double(), need, rtol=1e-4, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (got, need)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-7)
    assert need < -1e-3


def test_mutual_information_of_tasks_apart_and_alike():
    tasks = torch.arange(24) % 4
    apart = torch.nn.functional.one_hot(tasks, E).float().requires_grad_()
    loss = ops.mutual_information_loss(apart, tasks, 4)
    assert loss.item() == pytest.approx(-math.log(4), rel=1e-5)
    assert torch.autograd.grad(loss, apart)[0].isfinite().all()
    alike = torch.rand(1, E).softmax(-1).expand(24, E)
    assert ops.mutual_information_loss(alike, tasks, 4).item() == pytest.approx(0, abs=1e-6)
    assert ops.mutual_information_loss(apart[:0], tasks[:0], 4).item() == 0


def test_masked_and_unknown_tasks_do_not_count():
    scores, tasks = logits_of(torch.float32).softmax(-1), torch.arange(T) % 3
    mask = torch.arange(T) % 4 != 1
    need = ops.mutual_information_loss(scores[mask], tasks[mask], 3)
    assert need != 0
    torch.testing.assert_close(ops.mutual_information_loss(scores, tasks, 3, mask=mask), need)
    outside = tasks.masked_fill(~mask, -1)
    torch.testing.assert_close(ops.mutual_information_loss(scores, outside, 3), need)


# --- refusals ---


def refusals():
    logits, ids = logits_of(), torch.zeros(T, K).long()
    yield lambda: ops.add_router_noise(ids, 1.0), "add_router_noise: logits is torch.int64, need"
    yield lambda: ops.add_router_noise(logits, -1.0), "add_router_noise: raw_noise is -1.0, need a"
    yield (lambda: ops.add_router_noise(logits, logits[:, 1:]),
           r"add_router_noise: raw_noise has shape \(50, 11\), need E = 12")  # fmt: skip
    for change, message in (
        (dict(by="rank"), "no by 'rank'. Known: score, mass"),
        (dict(score="tanh"), "no score 'tanh'. Known: softmax, sigmoid"),
        (dict(at_most=13), "at_most is 13, need 1 to 12: E as in logits"),
        (dict(at_least=3, at_most=2), "at_least is 3, need 0 to at_most = 2"),
    ):
        yield (lambda change=change: ops.route_by_threshold(logits, 0.1, **change),
               f"route_by_threshold: {message}")  # fmt: skip
    experts = torch.zeros(3).long()
    yield lambda: ops.route_examples(experts), "route_examples: need one of length and cu_seqlens"
    yield (lambda: ops.route_examples(experts, cu_seqlens=experts),
           r"route_examples: cu_seqlens has shape \(3,\), need \(4,\)")  # fmt: skip
    yield (lambda: ops.route_examples(experts, length=2, mask=torch.ones(3, 2)),
           "route_examples: mask is torch.float32 of shape")  # fmt: skip
    yield lambda: ops.route_examples(experts.float(), length=2), "experts is torch.float32, need"
    yield lambda: ops.route_types(experts, logits), "route_types: experts is torch.float64, need"
    yield lambda: ops.keep_local(ids, -1, 2), "keep_local: first is -1 and count 2, need at least"
    yield (lambda: ops.mutual_information_loss(logits, ids[:, 0], 0),
           "mutual_information_loss: n_tasks is 0, need at least 1")  # fmt: skip
    yield (lambda: ops.mutual_information_loss(logits, ids[1:, 0], 2),
           r"mutual_information_loss: tasks has shape \(49,\), need T = 50")  # fmt: skip


@pytest.mark.parametrize("number", range(len(list(refusals()))))
def test_refusals(number):
    function, message = list(refusals())[number]
    with pytest.raises(ValueError, match=message):
        function()
