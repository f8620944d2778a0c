"""flash_decode: splits, pages, ragged rows, dead slots, and agreement with the formula."""

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import DTYPES, bitwise, dtype_name, int32
from yardstick import assert_errs_at_most_twice_stock

import tilewright

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def cache(dtype, rows=3, queries=1, slots=700, heads=8, kv_heads=2, width=64, value_width=None):
    """q, k, v with ragged lengths and starts; every dead slot holds NaN."""
    q = torch.randn(rows, queries, heads, width).to(dtype)
    k = torch.randn(rows, slots, kv_heads, width).to(dtype)
    v = torch.randn(rows, slots, kv_heads, value_width or width).to(dtype)
    lengths = [slots, slots // 3 + queries, slots - 1, queries, 0][:rows]
    starts = [0, slots // 7, 5, 0, 0][:rows]
    for row, (start, end) in enumerate(zip(starts, lengths, strict=True)):
        for t in (k, v):
            t[row, :start] = float("nan")
            t[row, end:] = float("nan")
    return q, k, v, int32(lengths), int32(starts)


def decode(target, q, k, v, lengths, starts, **options):
    q, k, v, lengths, starts = (t.to(target.device) for t in (q, k, v, lengths, starts))
    options = {
        n: o.to(target.device) if isinstance(o, torch.Tensor) else o for n, o in options.items()
    }
    given = dict(key_lengths=lengths, key_starts=starts)
    described = {n: o for n, o in options.items() if n != "num_splits"}
    target.require("flash_decode", q, k, v, **given, **described)
    return tilewright.flash_decode(q, k, v, **given, return_lse=True, impl=target.name, **options)


def written_out(
    q, k, v, lengths, starts, is_causal=True, window_left=None, softcap=0.0, sinks=None
):
    """The formula row by row in the dtype of q; also says which rows see anything."""
    group = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for row, (start, end) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        position = torch.arange(end)
        at = torch.arange(q.shape[1])[:, None] + end - q.shape[1]
        seen = (position >= start).expand(q.shape[1], -1)
        if is_causal:
            seen = seen & (position <= at)
        if window_left is not None:
            seen = seen & (position >= at - window_left)
        alive = (position >= start)[:, None, None]
        keys = k[row, :end].where(alive, 0).repeat_interleave(group, 1).transpose(0, 1)
        values = v[row, :end].where(alive, 0).repeat_interleave(group, 1).transpose(0, 1)
        scores = (q[row].transpose(0, 1) @ keys.mT) * q.shape[3] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = scores.to(wide).masked_fill(~seen, float("-inf"))
        if sinks is not None:
            column = sinks.to(wide)[:, None, None].expand(-1, q.shape[1], 1)
            scores = torch.cat([scores, column], -1)
        some = (scores > float("-inf")).any(-1, keepdim=True)
        weights = torch.where(some, F.softmax(torch.where(some, scores, 0.0), -1), 0.0)
        outs.append((weights[..., :end].to(q.dtype) @ values).transpose(0, 1))
        lses.append(torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1) - torch.inf)
    return torch.stack(outs), torch.stack(lses)


SHAPE = ("rows", "queries", "slots", "heads", "kv_heads", "width", "value_width")
FEATURES = {
    "one-query": {},
    "many-queries": dict(queries=17),
    "bidirectional": dict(queries=5, is_causal=False),
    "window": dict(queries=3, window_left=40),
    "softcap": dict(softcap=2.0),
    "sinks": dict(sinks=True),
    "seven-heads-a-key": dict(heads=7, kv_heads=1, width=40, value_width=24),
    "a-head-a-key": dict(heads=4, kv_heads=4, width=128),
    "empty-row": dict(rows=5, slots=300),
    "widest": dict(heads=2, kv_heads=1, width=256, slots=90),
}


@by_dtype
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_errs_at_most_twice_stock_torch(impl, feature, dtype):
    options = dict(feature)
    made = {n: options.pop(n) for n in SHAPE if n in options}
    q, k, v, lengths, starts = cache(dtype, **made)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(q.shape[2])
    out, lse = decode(impl, q, k, v, lengths, starts, **options)
    stock, _ = written_out(q, k, v, lengths, starts, **options)
    wide = {n: o.double() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    truth, true_lse = written_out(q.double(), k.double(), v.double(), lengths, starts, **wide)
    assert_errs_at_most_twice_stock("out", out, stock, truth)
    # lse is float32 whatever the dtype: its bound is the rounding of sums of this magnitude
    magnitude = k.float().nan_to_num(0.0).abs().amax() * q.float().abs().sum(-1).amax()
    allowed = 2 * torch.finfo(torch.float32).eps * magnitude * q.shape[3] ** -0.5
    finite = true_lse.isfinite()
    assert torch.equal(lse.cpu().isfinite(), finite)
    assert ((lse.cpu().double() - true_lse)[finite].abs() <= allowed).all()


@by_dtype
def test_every_split_gives_the_same_bits(impl, dtype):
    args = cache(dtype, queries=2, slots=1500, heads=4, kv_heads=1)
    whole = decode(impl, *args)
    for n in (1, 3, 8):
        assert all(
            bitwise(a, b) for a, b in zip(whole, decode(impl, *args, num_splits=n), strict=True)
        ), n


def paged(t, page, order):
    """The same cache cut into pages in the given order, unused ones and slots filled with NaN."""
    rows, slots = t.shape[:2]
    per_row = -(-slots // page)
    room = t.new_full((rows, per_row * page, *t.shape[2:]), float("nan"))
    room[:, :slots] = t
    pages = t.new_full((rows * per_row + 3, page, *t.shape[2:]), float("nan"))
    pages[order] = room.reshape(rows * per_row, page, *t.shape[2:])
    return pages


@by_dtype
@pytest.mark.parametrize("page", [1, 4, 5, 16, 128, 256, 1000])
def test_pages_in_any_order_give_the_same_bits(impl, page, dtype):
    q, k, v, lengths, starts = cache(dtype, queries=3, slots=620)
    whole = decode(impl, q, k, v, lengths, starts)
    per_row = -(-620 // page)
    order = torch.randperm(3 * per_row + 3)[: 3 * per_row]
    table = order.view(3, per_row).int()
    cut = decode(
        impl, q, paged(k, page, order), paged(v, page, order), lengths, starts, page_table=table
    )
    assert all(bitwise(a, b) for a, b in zip(whole, cut, strict=True))


@by_dtype
def test_a_row_does_not_depend_on_the_others(impl, dtype):
    q, k, v, lengths, starts = cache(dtype, rows=5, queries=2, heads=6, kv_heads=3)
    together = decode(impl, q, k, v, lengths, starts)
    for row in range(5):
        part = slice(row, row + 1)
        alone = decode(impl, q[part], k[part], v[part], lengths[part], starts[part])
        assert all(bitwise(a[part], b) for a, b in zip(together, alone, strict=True)), row


@by_dtype
def test_any_number_of_threads_gives_the_same_bits(impl, dtype):
    args = cache(dtype, slots=1500)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(decode(impl, *args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(bitwise(a, b) for a, b in zip(results[0], other, strict=True))


def test_heads_side_by_side_and_apart_give_the_same_bits(impl):
    """The layouts of a cache: (B, S, Hkv, D), and (B, Hkv, S, D) as transformers keeps it."""
    q, k, v, lengths, starts = cache(torch.bfloat16, rows=2, heads=16, kv_heads=8, slots=2100)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    first, second = decode(impl, q, k, v, lengths, starts), decode(impl, q, *apart, lengths, starts)
    assert all(bitwise(a, b) for a, b in zip(first, second, strict=True))


def test_any_strides_give_the_same_bits(impl):
    q, k, v, lengths, starts = cache(torch.float32, heads=4, kv_heads=2, width=24)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (q, k, v)]
    assert spread[1].stride(-1) == 2
    first, second = decode(impl, q, k, v, lengths, starts), decode(impl, *spread, lengths, starts)
    assert all(bitwise(a, b) for a, b in zip(first, second, strict=True))


@by_dtype
def test_one_query_of_flash_attention_over_a_long_cache(impl, dtype):
    """It takes the decode kernel, knows a mask with holes, and has a gradient."""
    q, k, v = (torch.randn(2, n, h, 64).to(dtype) for n, h in ((1, 4), (300, 2), (300, 2)))
    mask = torch.rand(2, 300) > 0.4
    impl.require("flash_attention", *(t.to(impl.device) for t in (q, k, v)))

    def run(which, *tensors):
        leaves = [t.detach().to(which.device if which else "cpu").requires_grad_() for t in tensors]
        out = tilewright.flash_attention(
            *leaves, is_causal=True, key_mask=mask.to(leaves[0].device),
            impl=which.name if which else "reference",
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    def stock(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in leaves), attn_mask=mask[:, None, None], enable_gqa=True
        ).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    truth = run(None, *(t.double() for t in (q, k, v)))
    for name, ours, theirs, true in zip(
        ("out", "dq", "dk", "dv"), run(impl, q, k, v), stock(q, k, v), truth, strict=True
    ):
        assert_errs_at_most_twice_stock(name, ours, theirs, true)


REFUSALS = {
    "length-past-the-slots": (dict(lengths=[701, 3, 3]), r"key_lengths\[0\] is 701, need 0 to 700"),
    "negative-length": (dict(lengths=[3, -1, 3]), r"key_lengths\[1\] is -1, need 0 to 700"),
    "negative-start": (dict(starts=[0, 0, -2]), r"key_starts\[2\] is -2, need at least 0"),
    "page-past-the-end": (
        dict(table=[[0, 1], [2, 9], [4, 5]]),
        r"page_table\[1, 1\] is 9, need 0 to 5",
    ),
    "negative-page": (
        dict(table=[[0, 1], [-1, 3], [4, 5]]),
        r"page_table\[1, 0\] is -1, need 0 to 5",
    ),
}


@pytest.mark.parametrize("given, message", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("name", ["reference", "cpp_cpu"])
def test_values_out_of_range_are_refused(name, given, message):
    q, k, v, lengths, starts = cache(torch.float32)
    options = {}
    if "table" in given:
        k, v = (t[:, :600].reshape(6, 300, *t.shape[2:]) for t in (k, v))
        lengths, options["page_table"] = int32([600, 600, 600]), int32(given["table"])
    lengths = int32(given["lengths"]) if "lengths" in given else lengths
    starts = int32(given["starts"]) if "starts" in given else starts
    with pytest.raises(ValueError, match=message):
        tilewright.flash_decode(
            q, k, v, key_lengths=lengths, key_starts=starts, impl=name, **options
        )


def test_it_has_no_gradient():
    q, k, v, lengths, starts = cache(torch.float32)
    with pytest.raises(NotImplementedError, match="flash_decode: it has no gradient"):
        tilewright.flash_decode(
            q.requires_grad_(), k, v, key_lengths=lengths, key_starts=starts
        ).sum().backward()
