"""Routers and their losses: choice, gates and gradients against formulas and transformers' own."""

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)

from tilewright import ops

T, E, K = 50, 12, 3
RULES = {
    "softmax": {},
    "renormalized": dict(renormalize=True, scale=2.5),
    "of-chosen": dict(score="softmax_of_chosen"),
    "sigmoid": dict(score="sigmoid"),
    "groups-and-bias": dict(
        score="sigmoid", renormalize=True, n_groups=4, kept_groups=2, scale=2.5,
        selection_bias=torch.linspace(-0.3, 0.3, E),
    ),
}  # fmt: skip
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def logits_of(dtype=torch.float64, seed=0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(logits, score="softmax", renormalize=False, scale=1.0, selection_bias=None,
            n_groups=1, kept_groups=1):  # fmt: skip
    """Token by token, expert by expert, in Python numbers: the ids and gates."""
    ids, gates = [], []
    for row in logits.double():
        scores = row.sigmoid() if score == "sigmoid" else row.exp() / row.exp().sum()
        by = [float(s) for s in scores]
        if selection_bias is not None:
            by = [b + float(c) for b, c in zip(by, selection_bias, strict=True)]
        wide = E // n_groups
        groups = [sum(sorted(by[g * wide : (g + 1) * wide])[-2:]) for g in range(n_groups)]
        kept = sorted(range(n_groups), key=lambda g: (-groups[g], g))[:kept_groups]
        allowed = [e for e in range(E) if e // wide in kept]
        best = sorted(allowed, key=lambda e: (-by[e], e))[:K]
        g = [float(scores[e]) for e in best]
        if score == "softmax_of_chosen" or renormalize:
            g = [v / sum(g) for v in g]
        ids.append(best)
        gates.append([scale * v for v in g])
    return torch.tensor(ids), torch.tensor(gates, dtype=torch.float64)


@by_rule
def test_choice_and_gates_by_hand(rule):
    logits = logits_of()
    ids, gates = by_hand(logits, **rule)
    route = ops.route_tokens(logits, K, **rule)
    assert torch.equal(route.ids, ids)
    torch.testing.assert_close(route.gates, gates, rtol=1e-6, atol=1e-7)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = logits.to(dtype)
        ids, gates = by_hand(narrow, **rule)
        route = ops.route_tokens(narrow, K, **rule)
        assert route.gates.dtype == route.scores.dtype == torch.float32
        assert torch.equal(route.ids, ids)
        torch.testing.assert_close(route.gates.double(), gates, rtol=1e-5, atol=1e-6)


@by_rule
def test_gradients_by_finite_differences(rule):
    logits = logits_of()[:6].requires_grad_()
    ids = ops.route_tokens(logits, K, **rule).ids

    def function(given):
        route = ops.route_tokens(given, K, ids=ids, **rule)
        return route.gates, route.scores

    assert torch.autograd.gradcheck(function, logits)


@by_rule
def test_a_choice_made_before_gives_the_same_route(rule):
    logits = logits_of(torch.float32)
    route = ops.route_tokens(logits, K, **rule)
    again = ops.route_tokens(logits, K, ids=route.ids.int(), **rule)
    assert all(torch.equal(a, b) for a, b in zip(route, again, strict=True))


@by_rule
def test_ties_go_to_the_lowest_index(rule):
    rule = {n: v for n, v in rule.items() if n != "selection_bias"}
    logits = torch.zeros(70, E)
    assert ops.route_tokens(logits, K, **rule).ids.tolist() == [list(range(K))] * 70
    logits[:, 7] = 1.0
    # of the groups left over, the first as well
    assert ops.route_tokens(logits, K, **rule).ids.tolist() == [[7, 0, 1]] * 70


def test_ids_of_minus_one_go_nowhere():
    logits = logits_of(torch.float32).requires_grad_()
    ids = ops.route_tokens(logits, K).ids
    ids[0], ids[1, 2] = -1, -1
    for score in ("softmax", "softmax_of_chosen", "sigmoid"):
        route = ops.route_tokens(logits, K, ids=ids, score=score, renormalize=True)
        assert not route.gates[0].any() and route.gates[1, 2] == 0
        torch.testing.assert_close(route.gates[1].sum(), torch.tensor(1.0))
        grad = torch.autograd.grad(route.gates.square().sum(), logits)[0]
        assert grad.isfinite().all() and not grad[0].any() and grad[1].any()


def test_logits_are_those_of_float32_and_keep_x_alone():
    x = torch.randn(T, 40).bfloat16().requires_grad_()
    weight, bias = torch.randn(E, 40).bfloat16().requires_grad_(), torch.randn(E)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        logits = ops.router_logits(x, weight, bias)
    assert sorted(t.data_ptr() for t in kept) == sorted((x.data_ptr(), weight.data_ptr()))
    wide = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    need = wide[0] @ wide[1].T + bias
    assert logits.dtype == torch.float32 and torch.equal(logits, need)
    d = torch.randn(T, E)
    for got, of in zip(
        torch.autograd.grad(logits, (x, weight), d), torch.autograd.grad(need, wide, d), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), of, rtol=8e-3, atol=1e-6)


def test_deepseeks_router_chooses_alike():
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, E))
    x = torch.randn(T, 32)
    _, gates, ids = router(x)
    route = ops.route_tokens(
        ops.router_logits(x, router.weight), K, score="sigmoid", renormalize=True, scale=2.5,
        n_groups=4, kept_groups=2, selection_bias=router.e_score_correction_bias,
    )  # fmt: skip
    sets = (t.sort(1).values for t in (ids, route.ids))
    assert torch.equal(*sets)
    by_expert = [torch.zeros(T, E).scatter(1, i, g) for i, g in ((ids, gates), route[:2])]
    torch.testing.assert_close(by_expert[1], by_expert[0])


def test_mixtrals_router_chooses_alike():
    router = MixtralTopKRouter(
        MixtralConfig(hidden_size=32, num_local_experts=E, num_experts_per_tok=K)
    )
    torch.nn.init.normal_(router.weight)
    x = torch.randn(T, 32)
    logits, gates, ids = router(x)
    route = ops.route_tokens(logits, K, renormalize=True)
    assert torch.equal(route.ids, ids)
    torch.testing.assert_close(route.gates, gates)


# --- capacity, expert choice ---


def test_capacity_keeps_the_documented_slots():
    logits = torch.full((5, 3), -9.0)
    logits[:, 0] = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])  # all choose expert 0 first, then 1
    logits[:, 1] = 0.0
    kept = {
        "arrival": [[True, True], [True, True], [False, False], [False, False], [False, False]],
        "score": [[False, True], [False, False], [False, True], [True, False], [True, False]],
    }
    for order, want in kept.items():
        route = ops.route_tokens(logits, 2, capacity=2, capacity_order=order)
        assert (route.ids >= 0).tolist() == want, order
        assert torch.equal(route.gates > 0, route.ids >= 0)
        assert ops.tokens_per_expert(route.ids, 3).tolist() == [2, 2, 0]
    torch.manual_seed(3)
    drawn = {
        tuple((ops.route_tokens(logits, 1, capacity=2, capacity_order="random").ids >= 0)[:, 0]
              .tolist())
        for _ in range(40)
    }  # fmt: skip
    assert len(drawn) > 5 and all(sum(row) == 2 for row in drawn)


def test_first_choices_come_before_second_ones():
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    route = ops.route_tokens(logits, 2, capacity=2)
    assert route.ids.tolist() == [[1, -1], [0, 1], [0, -1]]


@pytest.mark.parametrize("capacity", [0, 3, T])
def test_expert_choice(capacity):
    logits = logits_of(torch.float32).requires_grad_()
    route = ops.choose_tokens(logits, capacity)
    scores = logits.detach().softmax(-1)
    assert ops.tokens_per_expert(route.ids, E).tolist() == [capacity] * E
    for e in range(E):
        best = sorted(range(T), key=lambda t: (-float(scores[t, e]), t))[:capacity]
        assert (route.ids[:, e] == e).nonzero()[:, 0].tolist() == sorted(best)
    assert torch.equal(route.gates, scores.masked_fill(route.ids < 0, 0))


def test_expert_choice_runs_through_the_experts():
    x, w1, w2 = torch.randn(T, 16), torch.randn(E, 12, 16), torch.randn(E, 16, 6)
    route = ops.choose_tokens(logits_of(torch.float32), 5)
    y = ops.moe_mlp(x, route.ids, route.gates, w1, w2)
    dense = torch.zeros(T, 16)
    for e in range(E):
        gate, up = (x @ w1[e].T).chunk(2, 1)
        dense += route.gates[:, e : e + 1] * ((torch.nn.functional.silu(gate) * up) @ w2[e].T)
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4)


# --- losses ---


def test_balanced_and_collapsed_routers_have_the_documented_losses():
    uniform = torch.full((24, E), 1 / E)
    even = torch.arange(24 * K).view(24, K) % E
    for counted, value in (("all", K), ("mean", 1), ("first", 1)):
        assert ops.balance_loss(uniform, even, counted=counted).item() == pytest.approx(value)
        one_hot = torch.zeros(24, E)
        one_hot[:, 3] = 1
        collapsed = ops.balance_loss(one_hot, torch.full((24, K), 3), counted=counted)
        assert collapsed.item() == pytest.approx(value * E)
    gates = torch.ones(24, K)
    assert ops.importance_loss(gates, even, E).item() == pytest.approx(0, abs=1e-6)
    assert ops.importance_loss(gates, even * 0, E).item() == pytest.approx(E - 1)
    assert ops.router_z_loss(torch.zeros(4, E)).item() == pytest.approx(torch.tensor(E).log() ** 2)


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_of_transformers(masked):
    logits = logits_of(torch.float32).requires_grad_()
    mask = (torch.arange(T) % 3 != 0).view(1, T) if masked else None
    theirs = load_balancing_loss_func((logits,), E, K, None if mask is None else mask.long())
    route = ops.route_tokens(logits, K)
    ours = ops.balance_loss(route.scores, route.ids, mask=None if mask is None else mask[0])
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert grads[0].any()


def test_masked_tokens_count_in_no_loss():
    logits, mask = logits_of(torch.float32), torch.arange(T) % 4 != 1
    noise = torch.rand(E) + 0.5
    noisy = logits + noise * torch.randn(T, E)
    route = ops.route_tokens(logits, K)
    kept = [t[mask] for t in (*route, logits, noisy)]
    pairs = [
        (ops.balance_loss(route.scores, route.ids, mask=mask),
         ops.balance_loss(kept[2], kept[0])),
        (ops.router_z_loss(logits, mask=mask), ops.router_z_loss(kept[3])),
        (ops.importance_loss(route.gates, route.ids, E, mask=mask),
         ops.importance_loss(kept[1], kept[0], E)),
        (ops.load_loss(logits, noisy, noise, K, mask=mask),
         ops.load_loss(kept[3], kept[4], noise, K)),
    ]  # fmt: skip
    for ours, need in pairs:
        assert need != 0
        torch.testing.assert_close(ours, need)


def test_the_load_is_what_new_noise_would_choose():
    logits, noise = logits_of()[:1], 0.7
    noisy = logits + noise * torch.randn(1, E, dtype=torch.float64)
    draws = 200_000
    for e in range(0, E, 5):  # all other experts' noise stays
        again = noisy.expand(draws, E).clone()
        again[:, e] = logits[0, e] + noise * torch.randn(draws, dtype=torch.float64)
        share = (again.topk(K).indices == e).any(1).double().mean()
        one = torch.zeros(E, dtype=torch.float64)
        largest = noisy[0].topk(K + 1).values
        bound = largest[K] if noisy[0, e] >= largest[K - 1] else largest[K - 1]
        one[e] = torch.special.ndtr((logits[0, e] - bound) / noise)
        assert abs(share - one[e]) < 0.005
    loads = torch.stack([
        torch.special.ndtr(
            (logits[0, e] - sorted(torch.cat([noisy[0, :e], noisy[0, e + 1 :]]))[-K]) / noise
        )
        for e in range(E)
    ])  # fmt: skip
    need = loads.var(unbiased=False) / loads.mean() ** 2
    got = ops.load_loss(logits, noisy, torch.tensor(noise), K)
    torch.testing.assert_close(got.double(), need, rtol=1e-5, atol=0)


def test_losses_without_tokens_are_zero():
    nothing = torch.zeros(0, E)
    ids = torch.zeros(0, K, dtype=torch.int64)
    for loss in (
        ops.balance_loss(nothing, ids),
        ops.router_z_loss(nothing),
        ops.importance_loss(torch.zeros(0, K), ids, E),
    ):
        assert loss.item() == 0


# --- balancing by bias ---


def test_the_bias_moves_towards_balance_and_leaves_the_gates_alone():
    bias = torch.zeros(3)
    ops.update_router_bias(bias, torch.tensor([5, 1, 3]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0]
    logits = logits_of(torch.float32)
    route = ops.route_tokens(logits, K, score="sigmoid", selection_bias=torch.randn(E))
    assert torch.equal(route.gates, logits.sigmoid().gather(1, route.ids))


def test_biases_balance_a_skewed_router():
    logits = logits_of(torch.float32) + torch.linspace(-2, 2, E)
    bias = torch.zeros(E)

    def spread():
        ids = ops.route_tokens(logits, K, score="sigmoid", selection_bias=bias).ids
        counts = ops.tokens_per_expert(ids, E)
        return counts, int(counts.max() - counts.min())

    _, before = spread()
    for _ in range(400):
        ops.update_router_bias(bias, spread()[0], rate=3e-3)
    assert before > 25 and spread()[1] <= 5


# --- refusals ---


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(score="tanh"), "no score 'tanh'. Known: softmax, softmax_of_chosen, sigmoid"),
        (dict(top_k=13), "top_k is 13, need 1 to 12: E as in logits"),
        (dict(n_groups=5), "n_groups is 5, need a divisor of E = 12"),
        (dict(n_groups=4, kept_groups=5), "kept_groups is 5, need 1 to n_groups = 4"),
        (dict(n_groups=6, kept_groups=1), "1 groups of 2 experts, need at least top_k = 3"),
        (dict(capacity=-1), "capacity is -1, need at least 0"),
        (dict(capacity_order="none"), "no capacity_order 'none'. Known: arrival, score, random"),
        (dict(selection_bias=torch.zeros(3)), r"selection_bias has shape \(3,\), need E = 12"),
        (dict(ids=torch.zeros(T, 2).long()), r"ids is torch.int64 of shape \(50, 2\), need int32"),
        (dict(ids=torch.full((T, K), 12)), "ids are 12 to 12, need -1 to 11"),
        (dict(ids=torch.zeros(T, K).long(), capacity=3), "capacity is 3 beside ids, need None"),
        (dict(logits=torch.zeros(T, E).long()), "logits is torch.int64, need float32"),
        (dict(logits=torch.zeros(E)), r"logits has shape \(12,\), need axes \(T, E\)"),
    ],
)
def test_route_tokens_refuses(change, message):
    with pytest.raises(ValueError, match=f"route_tokens: {message}"):
        ops.route_tokens(**{"logits": logits_of(), "top_k": K, **change})


def test_the_other_functions_refuse():
    ids = torch.zeros(T, K).long()
    for function, message in (
        (lambda: ops.choose_tokens(logits_of(), T + 1), "choose_tokens: capacity is 51, need 0 to"),
        (lambda: ops.balance_loss(logits_of(), ids, counted="none"), "balance_loss: no counted"),
        (lambda: ops.balance_loss(logits_of(), ids[1:]), "balance_loss: ids has shape .* T = 50"),
        (lambda: ops.balance_loss(logits_of(), ids, mask=ids), "balance_loss: mask has shape"),
        (lambda: ops.tokens_per_expert(logits_of(), E), "tokens_per_expert: ids is torch.float64"),
        (lambda: ops.load_loss(logits_of(), logits_of(), 1.0, E), "load_loss: top_k is 12, need"),
        (lambda: ops.router_logits(logits_of(), torch.zeros(E, 3)), "router_logits: weight has"),
        (lambda: ops.importance_loss(ids, ids[1:], E), "importance_loss: ids has shape"),
        (lambda: ops.update_router_bias(torch.zeros(3), torch.zeros(4)), "update_router_bias: cou"),
    ):
        with pytest.raises(ValueError, match=message):
            function()


# --- soft ---


def soft_by_hand(x, logits, w1, w2, mask=None):
    """Slot by slot, in float64."""
    x, logits, w1, w2 = (t.double() for t in (x, logits, w1, w2))
    y = torch.zeros_like(x)
    n_experts, mixtures = logits.shape[-2:]
    for b in range(x.shape[0]):
        kept = torch.arange(x.shape[1]) if mask is None else mask[b].nonzero()[:, 0]
        tokens, own = x[b, kept], logits[b, kept]
        for e in range(n_experts):
            for p in range(mixtures):
                slot = own[:, e, p].softmax(0) @ tokens
                gate, up = (w1[e] @ slot).chunk(2)
                out = w2[e] @ (torch.nn.functional.silu(gate) * up)
                share = own.exp()[:, e, p] / own.exp().sum((1, 2))
                y[b] = y[b].index_add(0, kept, share[:, None] * out)
    return y


@pytest.mark.parametrize("masked", [False, True])
def test_soft_moe_by_hand(masked):
    x, logits = torch.randn(2, 9, 16), torch.randn(2, 9, 3, 2)
    w1, w2 = torch.randn(3, 12, 16) / 4, torch.randn(3, 16, 6) / 2
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [5]]) if masked else None
    leaves = [t.requires_grad_() for t in (x, logits, w1, w2)]
    y, need = ops.soft_moe(*leaves, mask=mask), soft_by_hand(*leaves, mask)
    torch.testing.assert_close(y.double(), need, rtol=1e-4, atol=1e-5)
    assert need.std() > 0.05
    dy = torch.randn(2, 9, 16)
    pairs = zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(need, leaves, dy.double()),
        strict=True,
    )  # fmt: skip
    for got, of in pairs:
        torch.testing.assert_close(got, of, rtol=1e-3, atol=1e-5)
    if masked:
        assert not y[1, 5:].any()
        nothing = ops.soft_moe(*leaves, mask=torch.zeros(2, 9, dtype=torch.bool))
        assert not nothing.any()


def test_soft_moe_refuses():
    x, w1, w2 = torch.randn(9, 16), torch.randn(3, 12, 16), torch.randn(3, 16, 6)
    with pytest.raises(ValueError, match=r"soft_moe: logits has shape \(8, 3, 2\), need \(9,\)"):
        ops.soft_moe(x, torch.randn(8, 3, 2), w1, w2)
    with pytest.raises(ValueError, match=r"soft_moe: mask is torch.float32 of shape \(9,\), need"):
        ops.soft_moe(x, torch.randn(9, 3, 2), w1, w2, mask=torch.ones(9))
