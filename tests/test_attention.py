"""Flash attention against float64: never more than twice as wrong as stock torch."""

import pytest
import torch
from attention_inputs import (
    DTYPES,
    Case,
    Results,
    assert_accurate,
    attend,
    bitwise,
    dtype_name,
    gradients,
    make_inputs,
    move,
    prepared,
    with_gradients,
)

import tilewright

# the (queries, keys) of FlashAttention's own tests, odd ones first of all
GRID = (
    (1, 1), (1, 3), (2, 1), (3, 3), (511, 1), (3, 513), (64, 128), (113, 203), (113, 211),
    (108, 256), (128, 217), (239, 1), (799, 3), (256, 512), (307, 256), (384, 256), (640, 128),
    (1023, 1024), (1024, 1023),
)  # fmt: skip
TILE_EDGES = (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129)
HEAD_DIMS = (1, 3, 8, 16, 40, 59, 64, 80, 96, 111, 128, 192, 256)
UNEQUAL_DIMS = ((3, 5), (192, 128), (64, 128), (40, 59), (8, 256), (256, 8))
HEADS = ((1, 1), (6, 6), (6, 2), (6, 1), (7, 1), (8, 1), (9, 3), (14, 2), (56, 8))

CASES = {}
for n, (lq, lk) in enumerate(GRID):
    # enough elements that stock torch is not right by luck
    many = {} if lq * lk > 200_000 else {"batch": 2, "heads": 4, "kv_heads": 2}
    many |= {"batch": 16} if lq * lk < 100 else {}
    # every shape with one kind of mask, neighbours with different ones
    kind = ("full", "causal", "window")[n % 3] if lq * lk < 1_000_000 else "causal"
    mask = {"full": {}, "causal": {"is_causal": True}, "window": {"window": (lk // 3, lq // 5)}}
    CASES[f"{lq}x{lk}-{kind}"] = Case(lq, lk, **many, **mask[kind])
for n in TILE_EDGES:
    CASES[f"{n}x{n}-causal"] = Case(n, n, is_causal=True, batch=2, head_dim=32)
for d in HEAD_DIMS:
    CASES[f"D{d}"] = Case(37, 53, 4, 2, d, is_causal=True, batch=1 if d > 8 else 32)
for d, dv in UNEQUAL_DIMS:
    CASES[f"D{d}-Dv{dv}"] = Case(
        37, 53, 4, 2, d, dv, is_causal=True, batch=1 if d + dv > 16 else 32
    )
for h, hkv in HEADS:
    CASES[f"H{h}-Hkv{hkv}"] = Case(41, 41, is_causal=True, heads=h, kv_heads=hkv, head_dim=32)
CASES |= {
    "window-left": Case(150, 150, is_causal=True, window=(20, None), head_dim=40),
    "window-both": Case(150, 170, window=(11, 30), head_dim=40),
    "window-right": Case(90, 130, window=(None, 3), head_dim=40),
    "window-self": Case(70, 70, window=(0, 0), head_dim=40),
    "window-wider-than-all": Case(70, 70, is_causal=True, window=(1000, 1000)),
    "softcap": Case(100, 100, is_causal=True, softcap=2.0),
    "softcap-window": Case(120, 120, is_causal=True, softcap=30.0, window=(25, 0)),
    "scale": Case(100, 100, is_causal=True, scale=0.37),
    "scale-negative": Case(60, 60, scale=-0.2),
    "scale-zero": Case(60, 60, scale=0.0),
    "sinks": Case(80, 80, is_causal=True, heads=4, sinks=True),
    "sinks-softcap-window": Case(80, 80, softcap=5.0, window=(9, 9), heads=4, sinks=True),
    "logits-x5": Case(100, 100, is_causal=True, magnitude=5**0.5),
    "logits-x50": Case(100, 100, is_causal=True, magnitude=50**0.5),
}

by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@by_dtype
@by_case
def test_errs_at_most_twice_stock_torch(impl, case, dtype):
    inputs = prepared(case, dtype)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert ours.out.dtype == ours.dq.dtype == ours.dk.dtype == ours.dv.dtype == dtype
    assert ours.out.is_contiguous() and ours.lse.dtype == torch.float32
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv") + ("dsinks",) * case.sinks)
    options = move(inputs.options, impl.device)
    q, k, v = (t.to(impl.device) for t in (inputs.q, inputs.k, inputs.v))
    out, lse = attend(impl, q, k, v, return_lse=True, **options)
    assert bitwise(out, ours.out) and bitwise(lse, ours.lse), "differs without gradients"


SPOILT = {
    "out": lambda r: Results(r.out * 1.01, r.lse, r.dq, r.dk, r.dv),
    "lse": lambda r: Results(r.out, r.lse * 1.01, r.dq, r.dk, r.dv),
    "dq": lambda r: Results(r.out, r.lse, r.dq * 1.01, r.dk, r.dv),
    "dk": lambda r: Results(r.out, r.lse, r.dq, r.dk * 1.01, r.dv),
    "dv": lambda r: Results(r.out, r.lse, r.dq, r.dk, r.dv * 1.01),
}


@by_dtype
@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("case", ["113x203-causal", "D59", "window-both", "softcap", "logits-x5"])
def test_the_rule_fails_a_result_spoilt_by_one_percent(case, what, dtype):
    inputs = prepared(CASES[case], dtype)
    right = Results(*(t.to(dtype) for t in vars(inputs.truth).values() if t is not None))
    right = Results(right.out, inputs.truth.lse.float(), right.dq, right.dk, right.dv)
    assert_accurate(right, inputs, SPOILT)
    with pytest.raises(AssertionError, match=f"{what}: rms error"):
        assert_accurate(SPOILT[what](right), inputs, (what,))


@by_dtype
@pytest.mark.parametrize("spoilt", ["scale", "mask"])
def test_the_rule_fails_a_kernel_spoilt_by_one_percent(spoilt, dtype):
    inputs = prepared(CASES["113x203-causal"], dtype)
    change = {"scale": {"scale": 1.01 * 64**-0.5}, "mask": {"window": (150, 0)}}[spoilt]
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    ours = with_gradients(
        lambda *a, **o: tilewright.flash_attention(*a, impl="reference", **o),
        q, k, v, dout, **(inputs.options | change),
    )  # fmt: skip
    for name in ("out", "lse", "dq", "dk") + ("dv",) * (spoilt == "mask"):
        with pytest.raises(AssertionError, match=f"{name}: "):
            assert_accurate(ours, inputs, (name,))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@by_dtype
def test_empty_lengths(impl, shape, dtype):
    q, k, v, dout, options = make_inputs(Case(*shape, batch=2, is_causal=True), dtype)
    ours = gradients(impl, q, k, v, dout, **options)
    assert not ours.out.any() and torch.all(ours.lse == float("-inf"))
    assert not ours.dq.any() and not ours.dk.any() and not ours.dv.any()


def test_an_empty_batch(impl_once):
    q, k, v, dout, options = make_inputs(Case(5, 5, batch=0), torch.float32)
    ours = gradients(impl_once, q, k, v, dout, **options)
    assert ours.out.shape == (0, 5, 2, 64) and ours.dk.shape == (0, 5, 1, 64)


@by_dtype
def test_lse_counts_the_visible_keys_of_equal_scores(impl, dtype):
    zeros = torch.zeros(1, 70, 2, 16, dtype=dtype, device=impl.device)
    v = torch.ones(1, 70, 2, 16, dtype=dtype, device=impl.device)
    out, lse = attend(impl, zeros, zeros, v, is_causal=True, return_lse=True)
    counts = torch.arange(1, 71.0).expand(1, 2, 70)
    assert torch.allclose(lse.cpu().exp(), counts, rtol=1e-5)
    assert (out.cpu() - 1).abs().max() <= torch.finfo(dtype).eps, "a mean of ones is one"


@by_dtype
def test_nan_in_a_query_stays_in_its_row(impl, dtype):
    q, k, v, _, options = make_inputs(Case(70, 70, heads=4, is_causal=True, batch=2), dtype)
    q, k, v = (t.to(impl.device) for t in (q, k, v))
    out, lse = attend(impl, q, k, v, return_lse=True, **options)
    q[1, 33, 2, 5] = float("nan")
    spoilt, spoilt_lse = attend(impl, q, k, v, return_lse=True, **options)
    assert spoilt[1, 33, 2].isnan().all() and spoilt_lse[1, 2, 33].isnan()
    spoilt[1, 33, 2], spoilt_lse[1, 2, 33] = out[1, 33, 2], lse[1, 2, 33]
    assert bitwise(spoilt, out) and bitwise(spoilt_lse, lse)


@by_dtype
def test_nan_in_a_key_reaches_those_who_see_it_and_no_other_head_or_row(kernel, dtype):
    q, k, v, _, options = make_inputs(
        Case(70, 70, heads=4, kv_heads=2, is_causal=True, batch=2), dtype
    )
    q, k, v = (t.to(kernel.device) for t in (q, k, v))
    out = attend(kernel, q, k, v, **options)
    k[1, 40, 1, 3] = float("nan")
    spoilt = attend(kernel, q, k, v, **options)
    assert spoilt[1, 40:, 2:].isnan().all(), "NaN was hidden"
    spoilt[1, :, 2:] = out[1, :, 2:]
    assert bitwise(spoilt, out)


@by_dtype
def test_infinite_scores(impl, dtype):
    """-inf is a key of weight 0; +inf has no softmax."""
    q, k, v, _, _ = make_inputs(Case(9, 40, head_dim=8), dtype)
    q, k, v = (t.to(impl.device) for t in (q, k, v))
    q[..., 0], k[..., 0] = 1.0, 0.0
    without = attend(impl, q, k[:, :39], v[:, :39])
    k[:, 39], k[:, 39, :, 0] = 0.0, float("-inf")
    with_one, lse = attend(impl, q, k, v, return_lse=True)
    assert with_one.isfinite().all() and lse.isfinite().all()
    assert torch.allclose(with_one.float(), without.float(), atol=4 * torch.finfo(dtype).eps)
    k[:, 39, :, 0] = float("inf")
    assert attend(impl, q, k, v).isnan().all()


@by_dtype
def test_scores_far_below_zero_and_far_above(impl, dtype):
    """The softmax does not depend on a common offset of the scores, however large."""
    q, k, v, dout, _ = make_inputs(Case(20, 45, head_dim=8), dtype)
    q[..., 0], k[..., 0] = 1.0, 0.0
    far = 240.0 if dtype == torch.float16 else 2.0**20
    for offset in (far, -far):
        shifted = k.clone()
        shifted[..., 0] = offset
        results = gradients(impl, q, shifted, v, dout, scale=1.0 if far == 240.0 else 2.0**-10)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert getattr(results, name).isfinite().all(), name
        middle = results.lse.mean().item()
        wanted = offset * (1.0 if far == 240.0 else 2.0**-10)
        assert abs(middle - wanted) < 20
