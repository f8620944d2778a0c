"""Where a delta grows and what gives way: the largest gradients, and exchanges of values."""

import random
import re

import pytest
import torch

from tilewright import choose, ops
from tilewright.ops import WeightDelta
from tilewright.ops.sparse import reference, regrow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def whole_numbers(*shape, most=3):
    """Small whole numbers, many of them 0: products are exact, and ties are everywhere."""
    return torch.randint(-most, most + 1, shape).float()


def require(target, dy, x):
    target.require("largest_gradients", dy.to(target.device), x.to(target.device), 1)


def largest(target, dy, x, k):
    """By this target, on its device."""
    dy, x = dy.to(target.device), x.to(target.device)
    return ops.largest_gradients(dy, x, k, impl=target.name).cpu()


# --- the largest gradients ---

SHAPES = {  # tokens, in, out: tiles of 48 or 64 by 256, chunks of 512 tokens, items of 768 or 1024
    "one-of-everything": (1, 1, 1),
    "narrow": (7, 3, 200),
    "flat": (5, 300, 2),
    "within-a-tile": (20, 60, 30),
    "tile": (33, 256, 48),
    "past-a-tile": (65, 257, 49),
    "past-a-chunk": (513, 70, 90),
    "past-an-item": (9, 100, 1100),
    "two-panels": (40, 520, 130),
}


@by_dtype
@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_set_is_that_of_a_dense_top_k(impl, shape, share, dtype):
    """Ties as well: of equal gradients the first places."""
    tokens, n_in, n_out = shape
    dy, x = whole_numbers(tokens, n_out).to(dtype), whole_numbers(tokens, n_in).to(dtype)
    require(impl, dy, x)
    k = round(share * n_in * n_out)
    found = largest(impl, dy, x, k)
    assert found.dtype == torch.int64 and found.shape == (k,)
    assert torch.equal(found, reference.largest_gradients(dy, x, k))


@by_dtype
def test_random_gradients(impl, dtype):
    """What is chosen beyond a rounding's width is what float64 chooses."""
    dy, x = torch.randn(300, 150).to(dtype), torch.randn(300, 330).to(dtype)
    require(impl, dy, x)
    k = 500
    found = largest(impl, dy, x, k)
    sizes = (dy.double().T @ x.double()).abs().flatten()
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[found] = True
    terms = (dy.double().abs().T @ x.double().abs()).flatten()
    bound = sizes.topk(k).values[-1]
    slack = torch.finfo(torch.float32).eps * terms
    assert (sizes[chosen] >= bound - slack[chosen]).all()
    assert (sizes[~chosen] <= bound + slack[~chosen]).all()
    assert (sizes[chosen] > 1.01 * bound).sum() > k / 2  # a kernel off by a percent would show


def test_all_gradients_alike(impl):
    """Nothing but ties: dy is 0, or everything is 1."""
    for value in (0.0, 1.0):
        dy, x = torch.full((40, 130), value), torch.ones(40, 300)
        require(impl, dy, x)
        found = largest(impl, dy, x, 777)
        assert torch.equal(found, torch.arange(777))


def test_any_number_of_threads_gives_the_same_set(kernel_once):
    dy, x = torch.randn(64, 700).bfloat16(), torch.randn(64, 900).bfloat16()
    require(kernel_once, dy, x)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(largest(kernel_once, dy, x, 5000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


def test_leading_axes_strides_and_no_tokens(impl):
    dy, x = whole_numbers(3, 5, 40), whole_numbers(3, 5, 50)
    require(impl, dy, x)
    plain = largest(impl, dy.flatten(0, 1), x.flatten(0, 1), 90)
    assert torch.equal(largest(impl, dy, x, 90), plain)
    wide_dy, wide_x = torch.full((15, 60), float("nan")), torch.full((50, 15), float("nan"))
    wide_dy[:, 7:47], wide_x[:] = dy.flatten(0, 1), x.flatten(0, 1).T
    found = largest(impl, wide_dy[:, 7:47], wide_x.T, 90)
    assert torch.equal(found, plain)
    none = largest(impl, dy[:0], x[:0], 7)
    assert torch.equal(none, torch.arange(7))
    assert largest(impl, dy[..., :0], x, 0).shape == (0,)


def test_nan_is_never_large(impl):
    dy, x = whole_numbers(10, 40), whole_numbers(10, 50)
    dy[3, 7] = float("nan")  # a row of the gradient
    require(impl, dy, x)
    found = largest(impl, dy, x, 39 * 50)
    assert not (found // 50 == 7).any()
    message = "largest_gradients: only 1950 entries of dy^T x are numbers, need k = 1951"
    with pytest.raises(ValueError, match=re.escape(message)):
        largest(impl, dy, x, 39 * 50 + 1)


@pytest.mark.usefixtures("clean_memory")
def test_opcheck_and_explain():
    dy, x = torch.randn(6, 10), torch.randn(6, 12)
    torch.library.opcheck(torch.ops.tilewright.largest_gradients.default, (dy, x, 9, "auto"))
    for label, problem in choose.OPERATORS["largest_gradients"].sample().items():
        assert choose.explain_problem("largest_gradients", problem).chosen is not None, label


def test_the_gradient_is_nowhere_in_memory(kernel_once):
    """Only what is found is a tensor; the kernel's own memory is bounded by its pools."""
    if kernel_once.device != "cpu":
        pytest.skip("reads the profiler's record of the CPU's allocator")
    dy, x = torch.randn(32, 512), torch.randn(32, 768)
    require(kernel_once, dy, x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        largest(kernel_once, dy, x, 4000)
    events = profile.profiler.kineto_results.events()
    blocks = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    assert blocks and max(blocks) < 4 * 512 * 768 / 4


# --- exchanges ---


def random_delta(n_out, n_in, n, kind=torch.float32) -> WeightDelta:
    places = torch.randperm(n_out * n_in)[:n]
    return WeightDelta.from_flat(places, whole_numbers(n).to(kind), n_out, n_in)


def as_dense(delta: WeightDelta):
    active = torch.zeros(delta.out_features * delta.in_features, dtype=torch.bool)
    active[delta.places()] = True
    return delta.dense().flatten().double(), active


def expect_like_reference(delta, regrown, scores, count):
    """Against the dense reference; and the invariants."""
    values, active, is_new = reference.regrow(*as_dense(delta), scores, count)
    after = regrown.delta
    after.expect_whole("test")
    found_values, found_active = as_dense(after)
    assert torch.equal(found_active, active) and torch.equal(found_values, values)
    assert torch.equal(after.places()[regrown.is_new], is_new.nonzero()[:, 0])
    assert after.nnz == delta.nnz and after.columns.dtype == delta.columns.dtype
    stayed = ~regrown.is_new
    assert torch.equal(after.places()[stayed], delta.places()[regrown.source[stayed]])
    assert torch.equal(after.values[stayed], delta.values[regrown.source[stayed]])
    assert ((regrown.candidate >= 0) == regrown.is_new).all()
    # state goes along: each value's own place as its state
    moved = regrown.carry(delta.places(), torch.full((len(scores),), -7))
    assert torch.equal(moved[stayed], after.places()[stayed]) and (moved[~stayed] == -7).all()


@pytest.mark.parametrize("seed", range(60))
def test_an_exchange_by_gradient_is_that_of_the_dense_reference(seed):
    """Ties, candidates that are active, too few of them, none to leave, all to leave."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n_out, n_in = pick.randint(1, 12), pick.randint(1, 15)
    size = n_out * n_in
    delta = random_delta(n_out, n_in, pick.randint(0, size), pick.choice(DTYPES[:2]))
    candidates = torch.randperm(size)[: pick.randint(0, size)].sort().values
    scores = whole_numbers(len(candidates))
    count = pick.randint(0, delta.nnz)
    regrown = ops.regrow_by_gradient(delta, candidates, scores, count)
    dense = torch.full((size,), float("nan"), dtype=torch.float64)
    dense[candidates] = scores.abs().double()
    expect_like_reference(delta, regrown, dense, count)
    assert torch.equal(regrown.delta.places()[regrown.is_new],
                       candidates[regrown.candidate[regrown.is_new]])  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_an_exchange_by_extremes_is_that_of_the_dense_reference(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n_out, n_in = pick.randint(1, 12), pick.randint(1, 15)
    delta = random_delta(n_out, n_in, pick.randint(0, n_out * n_in))
    rows, columns = whole_numbers(n_out).abs(), whole_numbers(n_in).abs()
    if seed % 3 == 0:
        rows, columns = torch.rand(n_out), torch.rand(n_in)
    count = pick.randint(0, delta.nnz)
    scores = reference.extreme_scores(rows, columns, as_dense(delta)[1]).flatten()
    free = int((~scores.isnan()).sum())
    regrown = ops.regrow_by_extremes(delta, rows, columns, count)
    expect_like_reference(delta, regrown, scores, min(count, free))


def test_many_ties_across_chunks_of_rows():
    """Equal products in more rows than are looked through at once, most of them active."""
    rows, columns = torch.ones(900), torch.ones(5)
    active = torch.arange(900 * 5)
    active = active[(active < 3000) & (active % 7 != 0)]
    places, scores = regrow.best_products(rows, columns, active, 500)
    free = torch.tensor([p for p in range(4500) if p >= 3000 or p % 7 == 0])
    assert torch.equal(places, free[:500]) and (scores == 1).all()


def test_extremes_of_a_large_layer_are_not_laid_out():
    """2**17 by 2**16: their products would be 32 GiB."""
    rows, columns = torch.rand(2**17), torch.rand(2**16)
    rows[99_999], columns[65_535] = 3.0, 2.0
    delta = WeightDelta.from_flat(
        torch.tensor([99_999 * 2**16 + 65_535]), torch.ones(1), 2**17, 2**16
    )
    regrown = ops.regrow_by_extremes(delta, rows, columns, 1)
    assert regrown.is_new.all()
    (place,) = regrown.delta.places().tolist()
    others = torch.cat([rows[:99_999], rows[100_000:]]).max() * 2.0, columns[:-1].max() * 3.0
    assert rows[place // 2**16] * columns[place % 2**16] == max(others)


def test_fifty_exchanges_keep_every_invariant():
    torch.manual_seed(0)
    delta = random_delta(40, 60, 240)
    for step in range(50):
        places = torch.randperm(2400)[:240].sort().values
        count = int(240 * ops.share_to_regrow(step, 50, is_first=step == 0))
        before = set(delta.places().tolist())
        regrown = ops.regrow_by_gradient(delta, places, torch.randn(240), count)
        delta = regrown.delta.with_values(torch.randn(240))
        delta.expect_whole("test")
        assert delta.nnz == 240 and len(set(delta.places().tolist())) == 240
        assert len(set(delta.places().tolist()) - before) == int(regrown.is_new.sum()) <= count


def test_survivors_keep_their_bits():
    """Also those that are neither numbers a sum could reproduce nor of float32."""
    values = torch.tensor([1e-42, -0.0, 3.14159, 2.0**-133]).bfloat16()
    delta = WeightDelta.from_flat(torch.tensor([0, 5, 9, 11]), values, 3, 4)
    regrown = ops.regrow_by_gradient(delta, torch.tensor([3]), torch.ones(1), 1)
    kept = regrown.source[~regrown.is_new]
    before, after = values[kept], regrown.delta.values[~regrown.is_new]
    assert torch.equal(before.view(torch.int16), after.view(torch.int16)) and len(kept) == 3


# --- the share, refusals ---


def test_the_share_follows_its_schedule():
    assert ops.share_to_regrow(0, 100, is_first=True) == 1.0
    assert ops.share_to_regrow(50, 100) == pytest.approx(0.1)
    assert ops.share_to_regrow(100, 100) == 0.0 and ops.share_to_regrow(101, 100) == 0.0
    cosine = [ops.share_to_regrow(s, 100, schedule="cosine", is_first=s == 0) for s in (0, 50, 100)]
    assert cosine == pytest.approx([0.2, 0.1, 0.0])


good = WeightDelta.from_flat(torch.tensor([3, 5, 18, 127]), torch.ones(4), 8, 16)
two, ones8, ones16 = torch.tensor([1, 2]), torch.ones(8), torch.ones(16)
REFUSED = {
    "k": (ops.largest_gradients, (ones8[None], ones16[None], 129), "k is 129, need a whole number"),
    "k-is-a-share": (ops.largest_gradients, (ones8[None], ones16[None], 0.1), "k is 0.1, need"),
    "axes": (
        ops.largest_gradients, (ones8, ones16, 1),
        "dy has shape (8,) and x (16,), need (..., O) and (..., I)",
    ),
    "leading": (
        ops.largest_gradients, (torch.zeros(3, 8), torch.zeros(4, 16), 1),
        "dy has shape (3, 8) and x (4, 16), need",
    ),
    "dtypes": (
        ops.largest_gradients, (torch.zeros(3, 8).half(), torch.zeros(3, 16), 1),
        "x is torch.float32, need torch.float16 as in dy",
    ),
    "count": (
        ops.regrow_by_gradient, (good, two, torch.ones(2), 5),
        "count is 5, need a whole number, 0 <= count <= N = 4",
    ),
    "candidates-dtype": (
        ops.regrow_by_gradient, (good, two.int(), torch.ones(2), 1),
        "candidates are torch.int32 of shape (2,) and scores of (2,), need int64",
    ),
    "scores-shape": (
        ops.regrow_by_gradient, (good, two, torch.ones(3), 1), "scores of (3,), need int64 of (C,)"
    ),
    "twice": (
        ops.regrow_by_gradient, (good, torch.tensor([2, 2]), torch.ones(2), 1),
        "candidates do not ascend",
    ),
    "past-the-last": (
        ops.regrow_by_gradient, (good, torch.tensor([2, 128]), torch.ones(2), 1),
        "candidate 128, need 0 <= place < O I = 128",
    ),
    "nan-score": (
        ops.regrow_by_gradient, (good, two, torch.tensor([1.0, float("nan")]), 1),
        "scores holds NaN, need numbers",
    ),
    "nan-value": (
        ops.regrow_by_gradient, (good.with_values(torch.full((4,), float("nan"))), two, two, 1),
        "values holds NaN, need numbers",
    ),
    "extremes-shape": (
        ops.regrow_by_extremes, (good, ones16, ones16, 1),
        "row_extremes is torch.float32 of shape (16,), need float32 of (8,): O as in delta",
    ),
    "extremes-negative": (
        ops.regrow_by_extremes, (good, ones8, -ones16, 1),
        "column_extremes holds -1.0, need none negative",
    ),
    "schedule": (ops.share_to_regrow, (1, 2), "no schedule 'step'. Known: linear, cosine"),
    "step": (ops.share_to_regrow, (-1, 2), "step is -1 of 2, need 0 or more of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("function, arguments, message", REFUSED.values(), ids=REFUSED)
def test_refusals(function, arguments, message):
    options = {"schedule": "step"} if "schedule" in message else {}
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        function(*arguments, **options)
    assert str(refusal.value).startswith(f"{function.__name__}: ")
