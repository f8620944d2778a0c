"""Gradients of the attention room: layouts, the log-sum-exp, sinks, extra keys, what is needed."""

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
    eager_attention,
    gradients,
    int32,
    make_inputs,
    prepared,
    summed_magnitudes,
    visible_pairs,
)
from yardstick import assert_errs_at_most_twice_stock

import tilewright
from tilewright import ShiftedSegments

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def transposed(t):
    """The same values as a view of a (B, H, L, D) tensor."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(t):
    """The same values within a larger tensor whose other elements are NaN."""
    room = t.new_full([n + 3 for n in t.shape], float("nan"))
    inner = room[tuple(slice(1, 1 + n) for n in t.shape)]
    inner.copy_(t)
    return inner


def every_second(t):
    """The same values with a stride of 2 in the last axis, NaN in between."""
    room = t.new_full((*t.shape, 2), float("nan"))
    room[..., 0] = t
    return room[..., 0]


def backwards_in_memory(t):
    """The same values, laid out (D, H, L, B)."""
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


LAYOUTS = (transposed, sliced, every_second, backwards_in_memory)


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_inputs_give_the_same_bits(impl, layout, dtype):
    case = Case(75, 90, 4, 2, head_dim=40, value_dim=24, batch=2, is_causal=True)
    q, k, v, dout, options = make_inputs(case, dtype)
    plain = gradients(impl, q, k, v, dout, **options)
    views = [layout(t.to(impl.device)) for t in (q, k, v)]
    for t, view in zip((q, k, v), views, strict=True):
        assert bitwise(t, view) and not view.is_contiguous()
        view.requires_grad_()
    out, lse = attend(impl, *views, return_lse=True, **options)
    assert out.is_contiguous()
    grads = torch.autograd.grad(out, views, layout(dout.to(impl.device)))
    assert bitwise(plain, Results(out.detach(), lse.detach(), *grads))


@by_dtype
def test_slices_of_a_fused_projection_give_the_same_bits(impl, dtype):
    """q, k, v as three slices of one (B, L, (H + 2 Hkv) D) tensor, as models make them."""
    q, k, v, dout, options = make_inputs(Case(70, 70, 4, 2, head_dim=32, is_causal=True), dtype)
    plain = gradients(impl, q, k, v, dout, **options)
    fused = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=2).to(impl.device)
    fused.requires_grad_()
    parts = [p.unflatten(2, (-1, 32)) for p in fused.split([128, 64, 64], dim=2)]
    out = attend(impl, *parts, **options)
    (gradient,) = torch.autograd.grad(out, fused, dout.to(impl.device))
    assert bitwise(out, plain.out)
    wanted = torch.cat([plain.dq.flatten(2), plain.dk.flatten(2), plain.dv.flatten(2)], dim=2)
    assert bitwise(gradient, wanted)


@by_dtype
@pytest.mark.parametrize("axes", ["all", "tokens", "heads", "batch"])
def test_an_expanded_upstream_gradient(impl, axes, dtype):
    """dout with stride 0, as .sum() hands it down, equals its contiguous copy bitwise."""
    q, k, v, dout, options = make_inputs(
        Case(65, 65, 4, 2, head_dim=24, batch=2, is_causal=True), dtype
    )
    narrow = {
        "all": dout[:1, :1, :1, :1],
        "tokens": dout[:, :1],
        "heads": dout[:, :, :1],
        "batch": dout[:1],
    }[axes]
    q, k, v, narrow = (t.to(impl.device) for t in (q, k, v, narrow))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = attend(impl, *leaves, **options)
    expanded = narrow.expand_as(out)
    assert 0 in expanded.stride()
    a = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
    b = torch.autograd.grad(out, leaves, expanded.contiguous())
    assert all(bitwise(x, y) for x, y in zip(a, b, strict=True))


@by_dtype
def test_expanded_keys_and_values(impl, dtype):
    """One set of keys for all batch rows, without a copy; their gradient is summed by autograd."""
    q, k, v, dout, options = make_inputs(Case(40, 50, 4, 2, head_dim=16, batch=3), dtype)
    k, v = k[:1], v[:1]
    shared = gradients(impl, q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), dout, **options)
    copied = gradients(impl, q, k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1), dout, **options)
    assert bitwise(shared.out, copied.out) and bitwise(shared.dq, copied.dq)
    assert bitwise(shared.dk, copied.dk) and bitwise(shared.dv, copied.dv)


@by_dtype
def test_misaligned_tensors_give_the_same_bits(impl, dtype):
    q, k, v, dout, options = make_inputs(Case(50, 50, 2, 1, head_dim=32, is_causal=True), dtype)
    plain = gradients(impl, q, k, v, dout, **options)

    def off_by_one(t):
        return t.new_zeros(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)

    *views, upstream = (off_by_one(t.to(impl.device)) for t in (q, k, v, dout))
    for view in views:
        view.requires_grad_()
    out, lse = attend(impl, *views, return_lse=True, **options)
    grads = torch.autograd.grad(out, views, upstream)
    assert bitwise(plain, Results(out.detach(), lse.detach(), *grads))


@by_dtype
@pytest.mark.parametrize("through", ["lse", "out-and-lse"])
@pytest.mark.parametrize("options", ["causal", "softcap", "sinks", "shifted", "blind-rows"])
def test_the_gradient_of_the_log_sum_exp(impl, options, through, dtype):
    case = {
        "causal": Case(70, 70, 4, 2, head_dim=24, is_causal=True),
        "softcap": Case(70, 70, 4, 2, head_dim=24, softcap=3.0),
        "sinks": Case(70, 70, 4, 2, head_dim=24, is_causal=True, sinks=True),
        "shifted": Case(70, 70, 4, 2, head_dim=24, is_causal=True, segments=ShiftedSegments(16)),
        "blind-rows": Case(70, 20, 4, 2, head_dim=24, is_causal=True),
    }[options]
    q, k, v, dout, kwargs = make_inputs(case, dtype)
    dlse = torch.randn(1, 4, 70)

    def both(attention, q, k, v, dout, dlse, **o):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        if o["sinks"] is not None:
            leaves.append(o["sinks"].detach().clone().requires_grad_())
            o["sinks"] = leaves[3]
        out, lse = attention(*leaves[:3], **o)
        outputs, upstream = (lse,), (dlse.to(lse.dtype),)
        if through == "out-and-lse":
            outputs, upstream = (out, lse), (dout, dlse.to(lse.dtype))
        return torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)

    kwargs.setdefault("sinks", None)
    visible = visible_pairs(q, k, v, **kwargs)

    def stock(q, k, v, **o):
        return eager_attention(q, k, v, visible, softcap=o["softcap"], sinks=o["sinks"])

    wide = kwargs | {"sinks": None if kwargs["sinks"] is None else kwargs["sinks"].double()}
    truth = both(
        lambda *a, **o: tilewright.flash_attention(*a, return_lse=True, impl="reference", **o),
        *(t.double() for t in (q, k, v, dout, dlse)), **wide,
    )  # fmt: skip
    on_device = {n: o.to(impl.device) if torch.is_tensor(o) else o for n, o in kwargs.items()}
    ours = both(
        lambda *a, **o: attend(impl, *a, return_lse=True, **o),
        *(t.to(impl.device) for t in (q, k, v, dout, dlse)), **on_device,
    )  # fmt: skip
    yardstick = both(stock, q, k, v, dout, dlse, **kwargs)
    forward = prepared(case, dtype).truth
    terms = vars(summed_magnitudes(q, k, v, dout, forward, **kwargs))
    for name, *results in zip(("dq", "dk", "dv", "dsinks"), ours, yardstick, truth, strict=False):
        assert_errs_at_most_twice_stock(name, *results, terms=terms[name])


def _extra_inputs(case, n_extra, dtype, shared):
    q, k, v, dout, options = make_inputs(case, dtype)
    rows = case.batch if case.documents is None else len(case.documents)
    lead = () if shared else (rows,)
    ek = torch.randn(*lead, n_extra, case.kv_heads, case.head_dim).to(dtype)
    ev = torch.randn(*lead, n_extra, case.kv_heads, case.value_dim or case.head_dim).to(dtype)
    return q, k, v, dout, ek, ev, options


def _with_extra(attention, q, k, v, dout, ek, ev, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, ek, ev)]
    out, lse = attention(*leaves[:3], extra_kv=tuple(leaves[3:]), return_lse=True, **options)
    return out, lse, *torch.autograd.grad(out, leaves, dout)


def _eager_with_extra(q, k, v, extra_kv, is_causal=False, return_lse=True, **unused):
    """Stock: the extra keys concatenated before the others, in the batch form."""
    ek, ev = (t[None].expand(q.shape[0], -1, -1, -1) if t.dim() == 3 else t for t in extra_kv)
    n_extra = ek.shape[1]
    visible = torch.ones(1, 1, q.shape[1], k.shape[1] + n_extra, dtype=torch.bool)
    if is_causal:
        visible[..., n_extra:] = visible[..., n_extra:].tril(k.shape[1] - q.shape[1])
    return eager_attention(q, torch.cat([ek, k], 1), torch.cat([ev, v], 1), visible)


@by_dtype
@pytest.mark.parametrize("shared", [False, True], ids=["per-row", "shared"])
@pytest.mark.parametrize("shape", [(60, 60), (40, 9)], ids=str)
def test_extra_keys_equal_concatenated_ones(impl, shape, shared, dtype):
    """Prefix tuning: a gated sum of two attentions is attention over the concatenation."""
    case = Case(*shape, 4, 2, head_dim=24, batch=2, is_causal=True)
    q, k, v, dout, ek, ev, options = _extra_inputs(case, 7, dtype, shared)
    inputs = (q, k, v, dout, ek, ev)
    truth = _with_extra(_eager_with_extra, *(t.double() for t in inputs), **options)
    stock = _with_extra(_eager_with_extra, *inputs, **options)
    ours = _with_extra(
        lambda *a, **o: attend(impl, *a, **o), *(t.to(impl.device) for t in inputs), **options
    )
    names = ("out", "lse", "dq", "dk", "dv", "dek", "dev")
    for name, mine, theirs, wanted in zip(names, ours, stock, truth, strict=True):
        if name != "lse":  # eager's own log-sum-exp has rounded scores in it
            assert_errs_at_most_twice_stock(name, mine, theirs, wanted)
    exact = _eager_with_extra(*(t.float() for t in (q, k, v)), (ek.float(), ev.float()), **options)
    assert_errs_at_most_twice_stock("lse", ours[1], exact[1], truth[1])


@pytest.mark.parametrize("shared", [False, True], ids=["per-document", "shared"])
def test_extra_keys_of_packed_documents(impl, shared):
    case = Case(documents=((30, 30), (0, 0), (1, 1), (17, 17)), heads=4, kv_heads=2, head_dim=16,
                is_causal=True)  # fmt: skip
    q, k, v, dout, ek, ev, options = _extra_inputs(case, 5, torch.float32, shared)
    packed = _with_extra(
        lambda *a, **o: attend(impl, *a, **o),
        *(t.to(impl.device) for t in (q, k, v, dout, ek, ev)), **options,
    )  # fmt: skip
    ends = options["cu_seqlens"].tolist()
    for n in range(4):
        part = slice(ends[n], ends[n + 1])
        row_ek, row_ev = (t[None] if shared else t[n : n + 1] for t in (ek, ev))
        alone = _with_extra(
            _eager_with_extra, *(t[None, part].double() for t in (q, k, v, dout)),
            row_ek.double(), row_ev.double(), is_causal=True,
        )  # fmt: skip
        for at, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
            assert torch.allclose(packed[at][part].cpu().double(), alone[at][0], atol=1e-5), name


def test_no_extra_keys_change_nothing(impl):
    """A prefix of length 0, also where rows see nothing at all."""
    case = Case(40, 9, 4, 2, head_dim=16, is_causal=True)
    q, k, v, dout, ek, ev, options = _extra_inputs(case, 0, torch.float32, False)
    plain = gradients(impl, q, k, v, dout, **options)
    none = ek.to(impl.device), ev.to(impl.device)
    assert bitwise(plain, gradients(impl, q, k, v, dout, extra_kv=none, **options))
    packed = make_inputs(Case(documents=((5, 5), (3, 3)), heads=4, kv_heads=2, head_dim=16),
                         torch.float32)  # fmt: skip
    empty = tuple(torch.zeros(0, 2, 16, device=impl.device) for _ in range(2))
    ours = gradients(impl, *packed[:4], extra_kv=empty, **packed[4])
    assert bitwise(ours, gradients(impl, *packed[:4], **packed[4]))


def test_extra_keys_rescue_rows_that_see_nothing_else(impl):
    """40 queries and 9 causal keys: 31 rows see the prefix alone; finite and as concatenated."""
    case = Case(40, 9, 2, 1, head_dim=16, is_causal=True)
    q, k, v, dout, ek, ev, options = _extra_inputs(case, 3, torch.float32, False)
    ours = _with_extra(
        lambda *a, **o: attend(impl, *a, **o),
        *(t.to(impl.device) for t in (q, k, v, dout, ek, ev)), **options,
    )  # fmt: skip
    assert all(t.isfinite().all() for t in ours)
    only_prefix, _ = eager_attention(q[:, :31], ek, ev, torch.ones(1, 1, 31, 3, dtype=torch.bool))
    assert torch.allclose(ours[0][:, :31].cpu(), only_prefix, atol=1e-6)


NEEDS = [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]


@by_dtype
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_needed(impl, needs, dtype):
    q, k, v, dout, options = make_inputs(Case(70, 70, 4, 2, head_dim=32, is_causal=True), dtype)
    all_of_them = gradients(impl, q, k, v, dout, **options)
    leaves = [
        t.to(impl.device).clone().requires_grad_(need)
        for t, need in zip((q, k, v), needs, strict=True)
    ]
    attend(impl, *leaves, **options).backward(dout.to(impl.device))
    wanted = (all_of_them.dq, all_of_them.dk, all_of_them.dv)
    for leaf, need, gradient in zip(leaves, needs, wanted, strict=True):
        assert bitwise(leaf.grad, gradient) if need else leaf.grad is None


def test_only_the_sinks_need_a_gradient(impl):
    q, k, v, dout, options = make_inputs(
        Case(40, 40, 4, 2, is_causal=True, sinks=True), torch.float32
    )
    sinks = options.pop("sinks").to(impl.device).requires_grad_()
    q, k, v = (t.to(impl.device) for t in (q, k, v))
    attend(impl, q, k, v, sinks=sinks, **options).backward(dout.to(impl.device))
    wanted = gradients(impl, q, k, v, dout, sinks=sinks, **options)
    assert bitwise(sinks.grad, wanted.dsinks) and q.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_sinks_of_the_inputs_dtype(impl, dtype):
    """A model keeps its sinks in its own dtype; their gradient comes back in it."""
    q, k, v, dout, options = make_inputs(Case(40, 40, 4, 2, is_causal=True, sinks=True), dtype)
    rounded = options["sinks"].to(dtype)
    low = gradients(impl, q, k, v, dout, **(options | {"sinks": rounded}))
    wide = gradients(impl, q, k, v, dout, **(options | {"sinks": rounded.float()}))
    assert bitwise(low.out, wide.out) and low.dsinks.dtype == dtype
    assert torch.allclose(low.dsinks.float(), wide.dsinks, rtol=torch.finfo(dtype).eps)


def test_sinks_with_rows_that_see_no_key(impl):
    """Such a row's softmax is the sink alone: out 0, lse the sink, and no NaN in any gradient."""
    case = Case(30, 10, 4, 2, head_dim=16, is_causal=True, sinks=True, batch=8)
    inputs = prepared(case, torch.float32)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert not ours.out[:, :20].any()
    sinks = inputs.options["sinks"]
    assert torch.allclose(ours.lse[:, :, :20].cpu(), sinks[:, None].expand(8, -1, 20), rtol=1e-6)
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv", "dsinks"))


def test_a_sink_of_minus_infinity_is_no_sink(impl):
    q, k, v, dout, options = make_inputs(Case(30, 30, 2, 1, is_causal=True), torch.float32)
    none = gradients(impl, q, k, v, dout, **options)
    off = gradients(impl, q, k, v, dout, sinks=torch.full((2,), float("-inf")), **options)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.allclose(getattr(off, name), getattr(none, name), atol=1e-6), name
    assert not off.dsinks.any()


def test_a_second_backward_is_identical(impl):
    q, k, v, dout, options = make_inputs(
        Case(70, 70, 4, 2, is_causal=True, batch=2), torch.bfloat16
    )
    leaves = [t.to(impl.device).requires_grad_() for t in (q, k, v)]
    out = attend(impl, *leaves, **options)
    upstream = dout.to(impl.device)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(out, leaves, upstream)
    assert all(bitwise(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_changed(impl):
    case = Case(70, 70, 4, 2, is_causal=True, sinks=True, batch=2, live=((0, 70), (5, 60)))
    q, k, v, dout, options = make_inputs(case, torch.float32)
    tensors = [q, k, v, dout, options["sinks"], options["key_mask"]]
    copies = [t.clone() for t in tensors]
    gradients(impl, q, k, v, dout, **options)
    assert all(bitwise(t, copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 6, 2, 1, head_dim=3, value_dim=2, is_causal=True, sinks=True),
        Case(5, 5, 4, 2, head_dim=2, softcap=1.5, window=(2, 1)),
        Case(7, 7, 3, 1, head_dim=2, is_causal=True, segments=ShiftedSegments(4)),
        Case(8, 8, 2, 2, head_dim=2, is_causal=True, segments=ShiftedSegments(4, True)),
        Case(heads=2, head_dim=2, documents=((3, 2), (0, 1), (2, 3)), is_causal=True),
        Case(4, 4, 2, 1, head_dim=2, batch=2, live=((1, 4), (0, 0))),
        Case(3, 3, 2, 1, head_dim=2, magnitude=40.0, is_causal=True),
    ],
    ids=["sinks", "softcap", "shifted", "wraparound", "packed", "dead-row", "large-logits"],
)
def test_the_reference_passes_gradcheck(case):
    q, k, v, _, options = make_inputs(case, torch.float32)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    sinks = options.pop("sinks", None)
    if sinks is not None:
        leaves.append(sinks.double().requires_grad_())

    def attention(q, k, v, sinks=None):
        out, lse = tilewright.flash_attention(
            q, k, v, sinks=sinks, return_lse=True, impl="reference", **options
        )
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(attention, leaves)


def test_gradcheck_with_extra_keys():
    q, k, v, _, ek, ev, options = _extra_inputs(
        Case(4, 3, 2, 1, head_dim=2, is_causal=True), 2, torch.float64, True
    )
    leaves = [t.requires_grad_() for t in (q, k, v, ek, ev)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, ek, ev: tilewright.flash_attention(
            q, k, v, extra_kv=(ek, ev), return_lse=True, impl="reference", **options
        ),
        leaves,
    )


def test_gradients_of_packed_documents_with_three_keys(impl):
    """The shape that once hung and made NaN elsewhere: cu_q [0,76,110,256], cu_k [0,1,2,3]."""
    case = Case(documents=((76, 1), (34, 1), (146, 1)), heads=4, kv_heads=1, head_dim=64)
    inputs = prepared(case, torch.bfloat16)
    assert inputs.options["cu_seqlens"].tolist() == [0, 76, 110, 256]
    assert torch.equal(inputs.options["cu_seqlens_k"], int32([0, 1, 2, 3]))
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv"))
