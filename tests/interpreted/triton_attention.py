"""The Triton attention kernels against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself. float16 reads its tiles by descriptor, float32 by pointers; a tile has 32
queries and 16 keys (16 and 32 where keys own the result), so that these sizes have whole tiles,
tiles that cross an end, and none.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import (
    Case,
    Results,
    attend,
    bitwise,
    dtype_name,
    eager_attention,
    int32,
    make_inputs,
    summed_magnitudes,
)
from attention_masks import pair_mask, read_backward_mask, read_mask
from conftest import Target
from yardstick import assert_errs_at_most_twice_stock

import tilewright
from tilewright import ShiftedSegments, choose, settings
from tilewright.ops.attention import reference

TRITON = Target("triton_gpu")
DTYPES = (torch.float32, torch.float16)
SEED = 0x1234_5678_9ABC_DEF0  # both of Philox's key words matter

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def problem_of(q, k, v, extra_kv=None, **options):
    return choose.OPERATORS["flash_attention"].problem(q, k, v, **options)


def stock(q, k, v, extra_kv=None, **options):
    """scaled_dot_product_attention where it can, else written out; the log-sum-exp in float32."""
    problem = problem_of(q, k, v, **options)
    visible = reference.visible_pairs(problem)
    packed = options.get("cu_seqlens") is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    if extra_kv is not None:
        n_rows = options["cu_seqlens"].numel() - 1 if packed else q.shape[0]
        extra = [
            t[None].expand(n_rows, *t.shape) if t.dim() == 3 else t for t in extra_kv
        ]  # each (rows, P, Hkv, .)
        n_extra = extra[0].shape[1]
        sees = torch.ones(q.shape[1], n_extra, dtype=torch.bool)
        if packed:
            document = torch.arange(n_rows).repeat_interleave(options["cu_seqlens"].diff())
            sees = document[:, None] == torch.arange(n_rows).repeat_interleave(n_extra)
            extra = [t.flatten(0, 1)[None] for t in extra]
        visible = torch.cat([sees.expand(*visible.shape[:2], *sees.shape), visible], 3)
        k, v = (torch.cat(pair, 1) for pair in zip(extra, (k, v), strict=True))
    rest = {n: options.get(n) for n in ("scale", "softcap", "sinks")}
    _, lse = eager_attention(q.float(), k.float(), v.float(), visible, **rest)
    if not (problem.dropout_p or rest["softcap"] or rest["sinks"] is not None):
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), visible, scale=rest["scale"],
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)  # fmt: skip
        # rows that see nothing are 0 by our contract
        out = torch.where(visible.any(-1).transpose(1, 2)[..., None], out, 0.0)
        return (out[0], lse[0]) if packed else (out, lse)
    # values that are unit vectors: what comes out is the weights, (B, Lq, H, Lk)
    units = torch.eye(k.shape[1], dtype=q.dtype)[None, :, None].expand(q.shape[0], -1, 1, -1)
    weights, _ = eager_attention(q, k, units.expand(-1, -1, k.shape[2], -1), visible, **rest)
    weights = weights.transpose(1, 2)
    if problem.dropout_p:
        weights = (weights * reference.dropout_factor(problem)).to(q.dtype)
    values = v.transpose(1, 2).repeat_interleave(problem.queries_per_kv_head, 1)
    out = (weights @ values).transpose(1, 2)
    return (out[0], lse[0]) if packed else (out, lse)


def both_ways(attention, tensors, dout, dlse, **options) -> dict:
    """out, lse and the gradients of all tensors, with upstream gradients for both results.

    tensors   q, k, v, and if they take part sinks, extra_k, extra_v
    """
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    q, k, v, *_ = leaves.values()
    if "sinks" in leaves:
        options["sinks"] = leaves["sinks"]
    if "extra_k" in leaves:
        options["extra_kv"] = leaves["extra_k"], leaves["extra_v"]
    out, lse = attention(q, k, v, **options)
    gradients = torch.autograd.grad([out, lse], list(leaves.values()), [dout, dlse.to(lse.dtype)])
    names = [f"d{name}" for name in leaves]
    return {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}


def by_reference(q, k, v, **options):
    return tilewright.flash_attention(q, k, v, return_lse=True, impl="reference", **options)


def by_triton(q, k, v, **options):
    return attend(TRITON, q, k, v, return_lse=True, **options)


def magnitudes(truth, tensors, dout, options) -> dict:
    """What `summed_magnitudes` says of the sums behind each result, where it knows the call."""
    if "extra_k" in tensors or options.get("dropout_p"):
        return {}
    results = Results(truth["out"].detach(), truth["lse"].detach())
    q, k, v = (tensors[name] for name in "qkv")
    options = options | {"sinks": tensors.get("sinks")}
    return vars(summed_magnitudes(q, k, v, dout, results, **options))


def check(tensors, dout, options, given=None):
    """Forward and backward within the error rule, and the rule sees an error of 1 % in each.

    given   what the kernels get in the place of `tensors`, if that shall make no difference
    """
    generator = torch.Generator().manual_seed(1)
    lse_shape = (*dout.shape[:-3], dout.shape[-2], dout.shape[-3])
    dlse = torch.randn(lse_shape, generator=generator)
    ours = both_ways(by_triton, given or tensors, dout, dlse, **options)
    theirs = both_ways(stock, tensors, dout, dlse, **options)
    wide = {n: t.double() for n, t in tensors.items()}
    truth = both_ways(by_reference, wide, dout.double(), dlse.double(), **options)
    assert ours["out"].is_contiguous() and ours["lse"].dtype == torch.float32
    terms = magnitudes(truth, tensors, dout, options)
    for name in truth:
        results = [r[name].detach() for r in (ours, theirs, truth)]
        assert_errs_at_most_twice_stock(name, *results, terms.get(name))
        with pytest.raises(AssertionError):
            assert_errs_at_most_twice_stock(name, 1.01 * results[0], *results[1:], terms.get(name))
    return ours


DOCUMENTS = ((37, 37), (0, 0), (1, 1), (50, 50))
UNEQUAL_DOCUMENTS = ((5, 20), (0, 7), (13, 0), (40, 9), (1, 38))
CUT, WRAPPED = ShiftedSegments(16), ShiftedSegments(16, wraparound=True)

FEATURES = {
    "causal": Case(40, 70, 2, 1, head_dim=40, is_causal=True),
    "causal-whole-tiles": Case(64, 64, 2, 2, head_dim=64, is_causal=True),
    "causal-rows-that-see-nothing": Case(70, 33, 2, 1, head_dim=40, is_causal=True),
    "one-query": Case(1, 50, 2, 1, batch=4, head_dim=16, is_causal=True),
    "one-key": Case(40, 1, 2, 1, head_dim=16),
    "bidirectional": Case(45, 67, 2, 2, head_dim=64, batch=2),
    "window": Case(66, 80, 2, 1, head_dim=40, is_causal=True, window=(20, None)),
    "window-on-both-sides": Case(50, 66, 2, 1, head_dim=40, window=(19, 5)),
    "window-of-one": Case(40, 40, 2, 1, head_dim=16, is_causal=True, window=(0, 0)),
    "packed": Case(documents=DOCUMENTS, head_dim=40, is_causal=True),
    "packed-bidirectional": Case(documents=UNEQUAL_DOCUMENTS, head_dim=40),
    "packed-unequal-causal": Case(documents=UNEQUAL_DOCUMENTS, head_dim=40, is_causal=True),
    "packed-window": Case(documents=DOCUMENTS, head_dim=16, window=(9, 3)),
    "padded": Case(40, 70, batch=3, head_dim=40, live=((0, 50), (13, 70), (0, 0))),
    "padded-causal": Case(48, 48, batch=2, head_dim=16, live=((0, 30), (7, 48)), is_causal=True),
    "softcap": Case(50, 66, 2, 1, head_dim=40, is_causal=True, softcap=2.0, magnitude=2.0),
    "sinks": Case(34, 50, 6, 2, head_dim=40, is_causal=True, sinks=True),
    "sinks-alone": Case(40, 20, 2, 1, head_dim=16, is_causal=True, sinks=True),
    "scale": Case(40, 50, 2, 1, head_dim=40, scale=0.31),
    "negative-scale": Case(40, 50, 2, 1, head_dim=40, is_causal=True, scale=-0.2),
    "large-scores": Case(40, 70, 2, 1, head_dim=40, is_causal=True, magnitude=3.0),
    "seven-heads-a-key": Case(40, 40, 7, 1, head_dim=16, is_causal=True),
    "two-heads-a-key": Case(40, 40, 4, 2, head_dim=80, is_causal=True),
    "narrow": Case(40, 50, 2, 1, head_dim=8, value_dim=24, is_causal=True),
    "unequal-widths": Case(40, 50, 2, 1, head_dim=80, value_dim=40, is_causal=True),
    "no-width-divides": Case(40, 50, 2, 1, head_dim=35, value_dim=13, is_causal=True),
    "two-passes": Case(40, 40, 1, 1, head_dim=136, value_dim=8, is_causal=True),
    "shifted": Case(72, 72, 3, 1, head_dim=40, is_causal=True, segments=CUT),
    "shifted-bidirectional": Case(60, 70, 2, 1, head_dim=16, segments=ShiftedSegments(33)),
    "shifted-window": Case(70, 70, 2, 1, head_dim=16, window=(9, 3), segments=ShiftedSegments(33)),
    "shifted-packed": Case(documents=DOCUMENTS, head_dim=16, is_causal=True, segments=CUT),
    "shifted-padded": Case(
        50, 50, batch=2, head_dim=16, is_causal=True, segments=CUT, live=((0, 37), (9, 50))
    ),
    "wraparound": Case(80, 80, 2, 1, head_dim=40, segments=ShiftedSegments(40, wraparound=True)),
    "wraparound-causal": Case(64, 64, 2, 1, head_dim=16, is_causal=True, segments=WRAPPED),
    "wraparound-packed": Case(
        documents=((32, 32), (0, 0), (48, 48)), head_dim=16, is_causal=True, segments=WRAPPED
    ),
    "wraparound-padded": Case(
        64, 64, batch=2, head_dim=16, is_causal=True, segments=WRAPPED, live=((0, 48), (5, 37))
    ),
}  # fmt: skip


def inputs_of(case, dtype, **more):
    """The tensors that gradients are wanted of, dout, and the other options."""
    q, k, v, dout, options = make_inputs(case, dtype)
    tensors = {"q": q, "k": k, "v": v}
    if "sinks" in options:
        tensors["sinks"] = options.pop("sinks")
    return tensors, dout, options | more


@by_dtype
@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
def test_forward_and_backward(case, dtype):
    check(*inputs_of(case, dtype))


def mask_with_holes(batch, n_keys):
    """Two keys of three live, the first row's ends among the dead; the last row has none."""
    mask = torch.rand(batch, n_keys, generator=torch.Generator().manual_seed(3)) < 0.66
    mask[0, :5] = mask[0, -3:] = False
    mask[-1] = False
    return mask


HOLES = {
    "bidirectional": Case(40, 70, batch=3, head_dim=40),
    "causal": Case(40, 70, batch=3, head_dim=16, is_causal=True, softcap=5.0),
    "shifted": Case(50, 50, batch=3, head_dim=16, is_causal=True, segments=CUT),
}


@by_dtype
@pytest.mark.parametrize("case", HOLES.values(), ids=HOLES)
def test_key_mask_with_holes(case, dtype):
    """Also: what stands at dead keys does not matter, NaN included."""
    mask = mask_with_holes(case.batch, case.n_keys)
    tensors, dout, options = inputs_of(case, dtype, key_mask=mask)
    dead = ~mask[:, :, None, None]
    spoilt = {n: tensors[n].masked_fill(dead, float("nan")) for n in ("k", "v")}
    ours = check(tensors, dout, options, given=tensors | spoilt)
    assert not ours["dk"][~mask].any() and not ours["dv"][~mask].any()


EXTRA = {
    "per-row": Case(40, 50, batch=2, head_dim=40, is_causal=True),
    "shared": Case(50, 20, batch=2, head_dim=16, is_causal=True),
    "packed": Case(documents=DOCUMENTS, head_dim=16, is_causal=True),
}


@by_dtype
@pytest.mark.parametrize("name", EXTRA)
def test_extra_keys(name, dtype):
    case = EXTRA[name]
    tensors, dout, options = inputs_of(case, dtype)
    lead = {"per-row": (2, 5), "shared": (5,), "packed": (len(DOCUMENTS), 5)}[name]
    for extra in ("extra_k", "extra_v"):
        tensors[extra] = torch.randn(*lead, case.kv_heads, case.head_dim).to(dtype)
    check(tensors, dout, options)


DROPOUT = {
    "causal": Case(40, 50, 2, 1, head_dim=40, is_causal=True, batch=2),
    "packed": Case(documents=DOCUMENTS, head_dim=16),
    "window": Case(50, 50, 2, 2, head_dim=16, window=(13, 6), softcap=3.0),
    "shifted": Case(50, 50, 2, 1, head_dim=16, segments=ShiftedSegments(18)),
    "wraparound": Case(72, 72, 2, 1, head_dim=16, segments=ShiftedSegments(18, wraparound=True)),
}


@by_dtype
@pytest.mark.parametrize("case", DROPOUT.values(), ids=DROPOUT)
def test_dropout(case, dtype):
    seed = torch.tensor([SEED])
    check(*inputs_of(case, dtype, dropout_p=0.3, dropout_seed=seed))


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("seed", [0, SEED], ids=hex)
def test_the_dropped_pairs_are_philox_words(way, seed):
    """Equal scores and unit vectors show each weight: kept exactly where the formula says."""
    n_queries, n_keys, heads, p = 37, 43, 2, 0.45
    q = torch.zeros(2, n_queries, heads, 8)
    k = torch.zeros(2, n_keys, heads, 8)
    v = torch.eye(n_keys)[:, None].expand(2, -1, heads, -1)
    if way == "backward":
        v = torch.zeros(2, n_keys, heads, n_queries)
    v = v.clone().requires_grad_()
    out, _ = by_triton(q, k, v, dropout_p=p, dropout_seed=torch.tensor([seed]))
    kept = out.transpose(1, 2) > 0
    if way == "backward":
        dout = torch.eye(n_queries)[:, None].expand_as(out)
        kept = torch.autograd.grad(out, v, dout)[0].permute(0, 2, 3, 1) > 0
    head_row = torch.arange(2 * heads).view(2, heads, 1, 1)
    queries, keys = torch.arange(n_queries)[:, None], torch.arange(n_keys)
    assert torch.equal(kept, reference.philox_uniform(seed, head_row, queries, keys) >= p)


MASKS = {
    "causal": dict(is_causal=True),
    "window": dict(window=(7, 4)),
    "shifted": dict(is_causal=True, segments=ShiftedSegments(12)),
    "shifted-odd": dict(segments=ShiftedSegments(11)),
    "wraparound": dict(is_causal=True, segments=ShiftedSegments(12, wraparound=True)),
}


@pytest.mark.parametrize("read", [read_mask, read_backward_mask], ids=["forward", "backward"])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_exactly_the_visible_pairs(options, read):
    wanted = pair_mask(2, [(48, 48)], **options)
    assert torch.equal(read(TRITON, torch.float32, 48, 48, batch=1, **options)[0], wanted)


def transposed(t):
    """The same values as a view of a (B, H, L, D) tensor."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(t):
    """The same values with a stride of 2 in the last axis, NaN in between."""
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


def off_by_one(t):
    """The same values, one element past an aligned address."""
    return t.new_zeros(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)


@by_dtype
@pytest.mark.parametrize("layout", [transposed, every_second, off_by_one])
def test_strided_tensors_give_the_same_bits(layout, dtype):
    case = Case(40, 50, 2, 1, head_dim=40, value_dim=24, is_causal=True)
    q, k, v, dout, _ = make_inputs(case, dtype)
    results = []
    for lay_out in (torch.clone, layout):
        leaves = [lay_out(t).detach().requires_grad_() for t in (q, k, v)]
        out, lse = by_triton(*leaves, is_causal=True)
        results.append((out, lse, *torch.autograd.grad(out, leaves, lay_out(dout))))
    assert all(bitwise(a, b) for a, b in zip(*results, strict=True))


@by_dtype
@pytest.mark.parametrize("axes", ["all", "tokens", "heads", "batch"])
def test_an_expanded_upstream_gradient(axes, dtype):
    """dout with stride 0, as .sum() hands it down, equals its contiguous copy bitwise."""
    case = Case(33, 40, 2, 1, head_dim=16, batch=2, is_causal=True)
    q, k, v, dout, _ = make_inputs(case, dtype)
    narrow = {
        "all": dout[:1, :1, :1, :1],
        "tokens": dout[:, :1],
        "heads": dout[:, :, :1],
        "batch": dout[:1],
    }[axes]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, _ = by_triton(*leaves, is_causal=True)
    upstream = narrow.expand_as(out)
    a = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    b = torch.autograd.grad(out, leaves, upstream.contiguous())
    assert all(bitwise(x, y) for x, y in zip(a, b, strict=True))


@by_dtype
@pytest.mark.parametrize("number", [0, len(DOCUMENTS) - 1], ids=["first", "last"])
def test_a_document_does_not_depend_on_the_others(number, dtype):
    """Bitwise the same packed and alone, infinities in the neighbours included: the first
    document's last tile reaches into them."""
    q, k, v, dout, options = make_inputs(Case(documents=DOCUMENTS, is_causal=True), dtype)
    ends = options["cu_seqlens"].tolist()
    own = slice(ends[number], ends[number + 1])
    others = torch.ones(ends[-1], dtype=torch.bool)
    others[own] = False
    for t in (q, k, v, dout):
        t[others] = float("inf")
    dlse = torch.zeros(2, ends[-1])
    packed = both_ways(by_triton, {"q": q, "k": k, "v": v}, dout, dlse, **options)
    n = own.stop - own.start
    alone = both_ways(
        by_triton, {"q": q[own], "k": k[own], "v": v[own]}, dout[own], dlse[:, :n],
        is_causal=True, cu_seqlens=int32([0, n]),
    )  # fmt: skip
    for name, t in alone.items():
        assert t.isfinite().all(), name
        inside = packed[name][:, own] if name == "lse" else packed[name][own]
        assert bitwise(inside, t), name


@by_dtype
def test_tokens_in_no_document(dtype):
    """Before the first document and past the last: out 0, lse -inf, gradients 0."""
    q, k, v, dout, _ = make_inputs(Case(60, 60, head_dim=16), dtype)
    tensors = {"q": q[0], "k": k[0], "v": v[0]}
    dlse = torch.randn(2, 60)
    ours = both_ways(by_triton, tensors, dout[0], dlse, cu_seqlens=int32([5, 20, 41]))
    nowhere = torch.tensor([i < 5 or i >= 41 for i in range(60)])
    assert (ours["lse"][:, nowhere] == float("-inf")).all()
    assert ours["lse"][:, ~nowhere].isfinite().all()
    for name in ("out", "dq", "dk", "dv"):
        assert not ours[name][nowhere].any() and ours[name].isfinite().all(), name


@by_dtype
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)], ids=["q", "k"])
def test_a_gradient_does_not_depend_on_which_others_are_needed(needs, dtype):
    q, k, v, dout, _ = make_inputs(Case(40, 40, head_dim=16, is_causal=True), dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(by_triton(*leaves, is_causal=True)[0], leaves, dout)
    some = [t.clone().requires_grad_(need) for t, need in zip((q, k, v), needs, strict=True)]
    by_triton(*some, is_causal=True)[0].backward(dout)
    for leaf, need, gradient in zip(some, needs, wanted, strict=True):
        assert bitwise(leaf.grad, gradient) if need else leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_no_queries_or_no_keys(shape):
    q, k, v, dout, _ = make_inputs(Case(*shape, head_dim=16), torch.float32)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = by_triton(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    assert not out.any() and (lse == float("-inf")).all()
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves, strict=True))


def ragged_cache(dtype, slots=100, queries=1, heads=4, kv_heads=2, width=40, value_width=24):
    """q, k, v, key_lengths, key_starts; every dead slot holds NaN."""
    lengths = [slots, 33, slots - 5, queries, 0]
    starts = [0, 7, 70, 0, 0]
    q = torch.randn(5, queries, heads, width).to(dtype)
    k = torch.randn(5, slots, kv_heads, width).to(dtype)
    v = torch.randn(5, slots, kv_heads, value_width).to(dtype)
    for row, (start, end) in enumerate(zip(starts, lengths, strict=True)):
        for t in (k, v):
            t[row, :start] = float("nan")
            t[row, end:] = float("nan")
    return q, k, v, dict(key_lengths=int32(lengths), key_starts=int32(starts))


def decode(q, k, v, **options):
    return tilewright.flash_decode(q, k, v, return_lse=True, impl="triton_gpu", **options)


def decoded_by_eager(q, k, v, key_lengths, key_starts, is_causal=True, window_left=None, **rest):
    """Each row by stock torch over its own live keys."""
    outs, lses = [], []
    for row, (start, end) in enumerate(zip(key_starts.tolist(), key_lengths.tolist(), strict=True)):
        at = torch.arange(q.shape[1])[:, None] + end - q.shape[1]
        keys = torch.arange(start, end)
        visible = (keys <= at) if is_causal else torch.ones(q.shape[1], end - start).bool()
        if window_left is not None:
            visible = visible & (keys >= at - window_left)
        visible = visible.expand(1, q.shape[2], -1, -1)
        one = q[row : row + 1], k[row : row + 1, start:end], v[row : row + 1, start:end]
        outs.append(eager_attention(*one, visible, **rest)[0])
        lses.append(eager_attention(*(t.float() for t in one), visible, **rest)[1])
    return torch.cat(outs), torch.cat(lses)


DECODE = {
    "one-query": ({}, {}),
    "many-queries": (dict(queries=11), {}),
    "bidirectional": (dict(queries=3), dict(is_causal=False)),
    "window": (dict(queries=3), dict(window_left=20)),
    "window-many-packs": (dict(queries=11, heads=7, kv_heads=1), dict(window_left=9)),
    "softcap": ({}, dict(softcap=2.0)),
    "scale": ({}, dict(scale=-0.4)),
    "sinks": (dict(queries=2), dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))),
    "seven-heads-a-key": (dict(heads=7, kv_heads=1, width=64, value_width=64), {}),
    "a-head-a-key": (dict(heads=2, width=80, value_width=80), {}),
    "narrow": (dict(width=8, value_width=8), {}),
}


@by_dtype
@pytest.mark.parametrize("shape, options", DECODE.values(), ids=DECODE)
def test_decode(shape, options, dtype):
    q, k, v, ragged = ragged_cache(dtype, **shape)
    ours = decode(q, k, v, **ragged, **options)
    theirs = decoded_by_eager(q, k, v, **ragged, **options)
    truth = tilewright.flash_decode(
        q.double(), *(t.double() for t in (k, v)), **ragged, **options, return_lse=True,
        impl="reference",
    )  # fmt: skip
    for name, *results in zip(("out", "lse"), ours, theirs, truth, strict=True):
        assert_errs_at_most_twice_stock(name, *results)
        with pytest.raises(AssertionError):
            assert_errs_at_most_twice_stock(name, 1.01 * results[0], *results[1:])


@by_dtype
def test_every_number_of_splits_gives_the_same_bits(dtype):
    """Contiguous and paged: four chunks of 32 keys, dealt out to any number of programs."""
    q, k, v, ragged = ragged_cache(dtype, queries=2)
    whole = decode(q, k, v, **ragged, num_splits=1)
    for num_splits in (3, 9, None):
        split = decode(q, k, v, **ragged, num_splits=num_splits)
        assert all(bitwise(a, b) for a, b in zip(whole, split, strict=True)), num_splits


@by_dtype
@pytest.mark.parametrize("page_size", [1, 7, 48])
def test_pages_give_the_same_bits(page_size, dtype):
    """Pages of any size in any order; what stands in unused pages and table entries is not read."""
    q, k, v, ragged = ragged_cache(dtype, queries=2)
    n_pages = -(-k.shape[1] // page_size)
    order = torch.randperm(5 * n_pages + 2)[: 5 * n_pages].view(5, n_pages)
    pages = []
    for t in (k, v):
        room = t.new_full((5 * n_pages + 2, page_size, *t.shape[2:]), float("nan"))
        padded = F.pad(t, (0, 0, 0, 0, 0, n_pages * page_size - t.shape[1]))
        room[order.flatten()] = padded.reshape(-1, page_size, *t.shape[2:])
        pages.append(room)
    used = -(-ragged["key_lengths"].long() // page_size)
    table = torch.where(torch.arange(n_pages) < used[:, None], order, -(2**30)).int()
    contiguous = decode(q, k, v, **ragged, num_splits=1)
    for num_splits in (3, None):
        paged = decode(q, *pages, **ragged, page_table=table, num_splits=num_splits)
        assert all(bitwise(a, b) for a, b in zip(contiguous, paged, strict=True)), num_splits


def test_bfloat16_is_refused():
    q = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Triton's interpreter computes bfloat16 wrongly"):
        tilewright.flash_attention(q, q, q, impl="triton_gpu")
