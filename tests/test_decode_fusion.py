"""Dynamic logits fusion: the strength of an expert is the root of a divergence."""

import math

import pytest
import torch

import tilewright as tw

KL_BOUND = 1e-6  # what is promised of |KL(a) - K|, at the least


def models(rows=12, width=900, experts=1, seed=0, dtype=torch.float32):
    """Logits of a large model, experts and their base, with various sharpness."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size):
        return torch.randn(rows, width, generator=generator) * size

    sharpness = torch.linspace(0.3, 4, rows)[:, None]
    base = normal(1.0) * sharpness
    large = base * 1.2 + normal(0.7)
    tuned = [base + normal(0.5 + 0.3 * t) for t in range(experts)]
    return large.to(dtype), [t.to(dtype) for t in tuned], base.to(dtype)


def fuse(impl, large, tuned, base, **options):
    """`fuse_logits` by an implementation, on its device; the results are on the CPU."""
    device = impl.device
    large, base = large.to(device), base.to(device)
    tuned = tuned.to(device) if isinstance(tuned, torch.Tensor) else [t.to(device) for t in tuned]
    return [t.cpu() for t in tw.fuse_logits(large, tuned, base, **options, impl=impl.name)]


def divergence(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def blend(large, tuned, base, a):
    delta = [t.double() - base.double() for t in tuned]
    return large.double() + sum(a[:, t, None] * d for t, d in enumerate(delta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 511, 512, 513, 5000])
def test_the_divergence_is_the_experts_or_a_is_the_largest(width, dtype, impl):
    large, tuned, base = models(width=width, dtype=dtype)
    fused, a = fuse(impl, large, tuned, base)
    assert fused.dtype == torch.float32 and a.shape == (12, 1) and (0 <= a).all() and (a <= 2).all()
    wanted = divergence(tuned[0], base)
    got = divergence(blend(large, tuned, base, a), large)
    is_cut = a[:, 0] == 2
    assert ((got - wanted).abs()[~is_cut] < KL_BOUND).all()
    assert (got[is_cut] <= wanted[is_cut]).all()
    if width > 500:
        assert (~is_cut).sum() > 6
    torch.testing.assert_close(fused, blend(large, tuned, base, a).float(), rtol=1e-6, atol=1e-5)


def test_a_large_model_that_is_the_base_gives_one(impl):
    _, tuned, base = models()
    fused, a = fuse(impl, base, tuned, base)
    assert torch.equal(a, torch.ones_like(a))
    torch.testing.assert_close(fused, tuned[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(fused.argmax(-1), tuned[0].argmax(-1))


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_an_expert_that_is_the_base_changes_nothing(constant, impl):
    large, _, base = models()
    base = (base * 64).round() / 64  # so that adding the constant is exact
    fused, a = fuse(impl, large, base + constant, base)
    assert torch.equal(a, torch.zeros_like(a)) and torch.equal(fused, large)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_constants_added_to_logits_change_nothing(which, impl):
    large, tuned, base = models()
    given = [(t * 64).round() / 64 for t in (large, tuned[0], base)]
    fused, a = fuse(impl, *given)
    given[which] = given[which] + 17.0
    shifted, b = fuse(impl, *given)
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    # 2e-5: float32 near 20 has steps of 2e-6
    torch.testing.assert_close(shifted.softmax(-1), fused.softmax(-1), rtol=2e-5, atol=1e-9)


def test_newton_finds_the_minimum_of_a_dense_grid(impl):
    large, tuned, base = models()
    _, a = fuse(impl, large, tuned, base)
    ticks = torch.linspace(0, 2, 2001, dtype=torch.float64)
    wanted = divergence(tuned[0], base)
    misses = torch.stack(
        [
            (divergence(blend(large, tuned, base, t.expand(12, 1)), large) - wanted) ** 2
            for t in ticks
        ]
    )
    best = ticks[misses.argmin(0)]
    assert ((a[:, 0] - best).abs() <= 1e-3).all()


def test_rows_are_independent(impl):
    large, tuned, base = models(experts=2)
    for rule, experts in (("single", tuned[:1]), ("per_expert", tuned), ("grid", tuned)):
        kwargs = dict(rule=rule, grid_points=6)
        fused, a = fuse(impl, large, experts, base, **kwargs)
        for row in (0, 7):
            one = slice(row, row + 1)
            alone, b = fuse(impl, large[one], [t[one] for t in experts], base[one], **kwargs)
            if impl.name == "cpp_cpu":
                assert torch.equal(alone, fused[one]) and torch.equal(b, a[one])
            else:
                torch.testing.assert_close(b, a[one])


def test_the_grid_rule_is_the_least_miss_of_its_points(impl):
    large, tuned, base = models(rows=5, width=300, experts=2)
    _, a = fuse(impl, large, tuned, base, rule="grid", grid_points=9)
    wanted = torch.stack([divergence(t, base) for t in tuned], 1)
    ticks = torch.linspace(0, 2, 9, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    misses = torch.stack(
        [
            ((divergence(blend(large, tuned, base, p.expand(5, 2)), large)[:, None] - wanted) ** 2)
            .sum(-1)
            for p in points
        ]
    )  # fmt: skip
    torch.testing.assert_close(a, points[misses.argmin(0)], rtol=0, atol=0)


def test_per_expert_scales_the_lone_strengths_to_the_mean_divergence(impl):
    large, tuned, base = models(experts=3)
    alone = torch.cat([fuse(impl, large, t, base)[1] for t in tuned], 1)
    _, a = fuse(impl, large, tuned, base, rule="per_expert")
    ratio = a / alone
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)
    got = divergence(blend(large, tuned, base, a), large)
    wanted = torch.stack([divergence(t, base) for t in tuned], 1).mean(1)
    is_cut = a.amax(1) >= 2 - 1e-12
    assert ((got - wanted).abs()[~is_cut] < KL_BOUND).all() and (~is_cut).sum() > 6
    one, single = (
        fuse(impl, large, tuned[:1], base, rule=rule)[1] for rule in ("per_expert", "single")
    )
    assert torch.equal(one, single)


def test_masked_and_extreme_logits(impl):
    large, tuned, base = models(rows=4)
    large[:, ::3] = -math.inf
    fused, a = fuse(impl, large, tuned, base)
    assert (fused[:, ::3] == -math.inf).all() and a.isfinite().all() and (a > 0).all()
    large[:, 1] = 1e4  # so sure that no a within reach moves it
    fused, a = fuse(impl, large, tuned, base)
    assert torch.equal(a, torch.full_like(a, 2.0)) and (fused.argmax(-1) == 1).all()


def test_the_solver_takes_few_passes():
    from tilewright.ops.decode import cpp_cpu, fusion

    passes = []
    for seed in range(60):
        large, tuned, base = models(rows=1, seed=seed)
        calls = []

        def counted(*args, calls=calls):
            calls.append(None)
            return cpp_cpu.tilt(*args)

        fusion.strengths(counted, large, tuned, base, "single", 2.0, 21)
        passes.append(len(calls) - 3)  # three are for K and for the unchanged sums
    assert max(passes) <= 12 and sorted(passes)[len(passes) // 2] <= 7


PLAIN = dict(large=torch.zeros(2, 4), tuned_small=torch.zeros(2, 4), base_small=torch.zeros(2, 4))
REFUSED = {
    r"tuned_small\[0\] has shape \(2, 5\), need V = 4 as in large": {
        "tuned_small": torch.zeros(2, 5)
    },
    r"base_small has shape \(1, 4\), need B = 2": {"base_small": torch.zeros(1, 4)},
    "base_small is torch.float16, need torch.float32": {"base_small": torch.zeros(2, 4).half()},
    "tuned_small is an empty list": {"tuned_small": []},
    "no rule 'mean'. Known: single, grid, per_expert": {"rule": "mean"},
    'rule is "single" and tuned_small holds 2 experts': {"tuned_small": [torch.zeros(2, 4)] * 2},
    "a_max is 0, need a positive number": {"a_max": 0},
    "grid_points is 1 for 1 experts": {"grid_points": 1},
    "row 1 of large, tuned or base holds NaN": {
        "tuned_small": torch.tensor([[0.0] * 4, [math.nan] + [0.0] * 3])
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError, match=f"fuse_logits: {message}"):
        tw.fuse_logits(**{**PLAIN, **REFUSED[message]})
