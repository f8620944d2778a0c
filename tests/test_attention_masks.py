"""Which keys a query sees: every mask read out of the implementations, forward and backward."""

import random

import pytest
import torch
from attention_inputs import (
    DTYPES,
    Case,
    assert_accurate,
    bitwise,
    dtype_name,
    gradients,
    int32,
    make_inputs,
    prepared,
)
from attention_masks import packed_ends, pair_mask, read_backward_mask, read_mask

import tilewright

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SHAPES = ((1, 1), (1, 200), (200, 1), (5, 70), (70, 5), (63, 65), (96, 96), (130, 129), (40, 256))
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window-7-0": {"window": (7, 0)},
    "window-20-33": {"window": (20, 33)},
    "window-left": {"is_causal": True, "window": (64, None)},
    "window-right": {"window": (None, 16)},
    "window-self": {"window": (0, 0)},
    "causal-window-both": {"is_causal": True, "window": (31, 31)},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_and_window(impl, shape, mask):
    wanted = pair_mask(2, [shape], **mask)
    assert torch.equal(read_mask(impl, torch.float32, *shape, batch=1, **mask)[0], wanted)
    if min(shape) > 1:
        backward = read_backward_mask(impl, torch.float32, *shape, batch=1, **mask)
        assert torch.equal(backward[0], wanted)


@by_dtype
def test_causal_mask_in_each_dtype(impl, dtype):
    wanted = pair_mask(2, [(77, 131)], is_causal=True, window=(50, 0))
    options = {"batch": 1, "is_causal": True, "window": (50, 0)}
    assert torch.equal(read_mask(impl, dtype, 77, 131, **options)[0], wanted)
    assert torch.equal(read_backward_mask(impl, dtype, 77, 131, **options)[0], wanted)


DOCUMENTS = {
    "one": [(50, 50)],
    "three": [(7, 7), (33, 33), (60, 60)],
    "empty-and-single": [(0, 0), (1, 1), (0, 0), (64, 64), (1, 1), (0, 0)],
    "all-empty-but-one": [(0, 0), (0, 0), (3, 3)],
    "queries-without-keys": [(5, 0), (9, 12), (4, 0)],
    "keys-without-queries": [(0, 5), (9, 12), (0, 4)],
    "fewer-keys-than-queries": [(76, 1), (34, 1), (146, 1)],
    "fewer-queries-than-keys": [(1, 40), (2, 33), (3, 17)],
}


@pytest.mark.parametrize("mask", ["full", "causal", "window-7-0", "window-20-33"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents(impl, documents, mask):
    shape = (sum(lq for lq, _ in documents), sum(lk for _, lk in documents))
    options = MASKS[mask] | packed_ends(documents)
    wanted = pair_mask(2, documents, **MASKS[mask])
    assert torch.equal(read_mask(impl, torch.float32, *shape, **options), wanted)
    backward = read_backward_mask(impl, torch.float32, *shape, **options)
    assert torch.equal(backward, wanted)


@by_dtype
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents_err_at_most_twice_stock_torch(impl, documents, dtype):
    case = Case(
        documents=tuple(documents), is_causal=True, heads=4, kv_heads=2, head_dim=40, value_dim=24
    )
    inputs = prepared(case, dtype)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv"))


@by_dtype
def test_packed_documents_equal_dense_runs_bitwise(impl, dtype):
    documents = ((76, 76), (1, 1), (0, 0), (34, 34), (146, 146))
    case = Case(documents=documents, is_causal=True, heads=4, kv_heads=2, head_dim=32)
    q, k, v, dout, options = make_inputs(case, dtype)
    packed = gradients(impl, q, k, v, dout, **options)
    start = 0
    for n, _ in documents:
        part = slice(start, start + n)
        alone = gradients(impl, *(t[None, part] for t in (q, k, v, dout)), is_causal=True)
        for name in ("out", "dq", "dk", "dv"):
            assert bitwise(getattr(packed, name)[part], getattr(alone, name)[0]), (name, n)
        assert bitwise(packed.lse[:, part], alone.lse[0])
        start += n


def test_tokens_of_no_document_see_nothing(impl):
    """cu_seqlens may begin after the first token and end before the last one."""
    q, k, v, dout, _ = make_inputs(Case(documents=((40, 40),), heads=2), torch.float32)
    cu = int32([3, 10, 30])
    ours = gradients(impl, q, k, v, dout, cu_seqlens=cu, is_causal=True)
    inner = gradients(impl, *(t[3:30] for t in (q, k, v, dout)), cu_seqlens=cu - 3, is_causal=True)
    outside = torch.tensor([*range(3), *range(30, 40)])
    for name in ("out", "dq", "dk", "dv"):
        assert bitwise(getattr(ours, name)[3:30], getattr(inner, name)), name
        assert not getattr(ours, name)[outside].any(), f"{name} of a token outside all documents"
    assert bitwise(ours.lse[:, 3:30], inner.lse)
    assert torch.all(ours.lse[:, outside] == float("-inf"))


def test_no_documents_at_all(impl):
    q, k, v, dout, _ = make_inputs(Case(documents=((0, 0),)), torch.float32)
    ours = gradients(impl, q, k, v, dout, cu_seqlens=int32([0]))
    assert ours.out.shape == (0, 2, 64) and ours.dk.shape == (0, 1, 64)


PADDING = {
    "right": [(0, 90), (0, 33), (0, 1)],
    "left": [(0, 90), (57, 90), (89, 90)],
    "both": [(10, 80), (0, 64), (63, 65)],
    "a-row-without-keys": [(0, 90), (0, 0), (20, 50)],
}


@pytest.mark.parametrize("mask", ["full", "causal", "window-20-33", "window-left"])
@pytest.mark.parametrize("live", PADDING.values(), ids=PADDING)
def test_key_mask(impl, live, mask):
    key_mask = torch.zeros(len(live), 90, dtype=torch.bool)
    for row, (start, end) in enumerate(live):
        key_mask[row, start:end] = True
    key_mask[0, 40:43] = False  # a hole
    wanted = pair_mask(2, [(90, 90)], **MASKS[mask]) & key_mask[:, None, None, :]
    options = MASKS[mask] | {"key_mask": key_mask, "batch": len(live)}
    assert torch.equal(read_mask(impl, torch.float32, 90, 90, **options), wanted)
    assert torch.equal(read_backward_mask(impl, torch.float32, 90, 90, **options), wanted)


@by_dtype
@pytest.mark.parametrize("live", PADDING.values(), ids=PADDING)
def test_key_mask_errs_at_most_twice_stock_torch(impl, live, dtype):
    case = Case(90, 90, batch=len(live), live=tuple(live), is_causal=True, heads=4, head_dim=32)
    inputs = prepared(case, dtype)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv"))


@by_dtype
def test_what_stands_at_dead_keys_does_not_matter(impl, dtype):
    case = Case(70, 70, batch=2, live=((0, 41), (22, 70)), is_causal=True, heads=4, kv_heads=2)
    q, k, v, dout, options = make_inputs(case, dtype)
    before = gradients(impl, q, k, v, dout, **options)
    dead = ~options["key_mask"][:, :, None, None]
    for garbage in (3.0, float("nan"), float("inf")):
        k2, v2 = (t.masked_fill(dead, garbage) for t in (k, v))
        assert bitwise(before, gradients(impl, q, k2, v2, dout, **options)), garbage


@by_dtype
@pytest.mark.parametrize(
    "why",
    [
        {"is_causal": True, "n_queries": 60, "n_keys": 13},
        {"window": (0, 0), "n_queries": 60, "n_keys": 13},
        {"live": ((0, 0),), "n_queries": 30, "n_keys": 30},
        {"live": ((20, 30),), "is_causal": True, "n_queries": 30, "n_keys": 30},
    ],
    ids=["more-queries-than-keys", "window", "no-live-key", "left-padding"],
)
def test_rows_that_see_nothing(impl, why, dtype):
    """Output 0, lse -inf, and gradients that are finite: zero for the row and for unseen keys."""
    case = Case(**why, heads=4, kv_heads=2, head_dim=24)
    inputs = prepared(case, dtype)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    blind = inputs.truth.lse == float("-inf")  # (B, H, Lq)
    assert blind.any()
    assert torch.all(ours.lse.cpu()[blind] == float("-inf"))
    assert not ours.out.cpu().transpose(1, 2)[blind].any()
    assert not ours.dq.cpu().transpose(1, 2)[blind].any()
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv"))
    # whatever such a row holds, it moves nobody's gradient
    q = inputs.q.masked_fill(blind.transpose(1, 2)[..., None], 1000.0)
    dout = inputs.dout.masked_fill(blind.transpose(1, 2)[..., None], 1000.0)
    again = gradients(impl, q, inputs.k, inputs.v, dout, **inputs.options)
    assert bitwise(again.dk, ours.dk) and bitwise(again.dv, ours.dv)
    assert bitwise(again.dq, ours.dq) and bitwise(again.out, ours.out)


def _random_call(seed):
    """A shape with a mask that nobody would think of."""
    rng = random.Random(seed)
    lq, lk = rng.randint(1, 200), rng.randint(1, 200)
    side = [rng.choice([None, rng.randint(0, 80)]) for _ in range(2)]
    options = {
        "is_causal": rng.random() < 0.5,
        "window": tuple(side) if rng.random() < 0.6 else None,
    }
    if rng.random() < 0.4:
        options["segments"] = tilewright.ShiftedSegments(
            rng.randint(1, 120), first_shifted_head=rng.randint(0, 2)
        )
    return lq, lk, options, rng


@pytest.mark.parametrize("seed", range(24))
def test_random_dense_masks(impl, seed):
    lq, lk, options, _ = _random_call(seed)
    wanted = pair_mask(2, [(lq, lk)], **options)
    assert torch.equal(read_mask(impl, torch.float32, lq, lk, batch=1, **options)[0], wanted)
    backward = read_backward_mask(impl, torch.float32, lq, lk, batch=1, **options)
    assert torch.equal(backward[0], wanted)


@pytest.mark.parametrize("seed", range(100, 116))
def test_random_packed_masks(impl, seed):
    _, _, options, rng = _random_call(seed)
    documents = [(rng.randint(0, 40), rng.randint(0, 40)) for _ in range(rng.randint(1, 6))]
    documents.append((3, 3))
    shape = (sum(lq for lq, _ in documents), sum(lk for _, lk in documents))
    wanted = pair_mask(2, documents, **options)
    options |= packed_ends(documents)
    assert torch.equal(read_mask(impl, torch.float32, *shape, **options), wanted)
    assert torch.equal(read_backward_mask(impl, torch.float32, *shape, **options), wanted)


def test_a_mask_off_by_one_is_seen():
    """The read-out itself: neighbouring windows give different masks."""
    shape = (30, 30)
    read = [pair_mask(1, [shape], window=(left, 0)) for left in (6, 7)]
    assert (read[0] != read[1]).sum() == 30 - 7
