"""Inputs, stock results and the truth of the attention tests.

A `Case` says what is attended to; `prepared(case, dtype)` holds its inputs, what stock torch makes
of them, and what float64 makes of them. They are kept for the next implementation, never changed.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from yardstick import assert_errs_at_most_twice_stock

import tilewright
from tilewright import ShiftedSegments, choose
from tilewright.ops.attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Case:
    """One attention call. `documents`: packed form, (queries, keys) of each; n_queries and n_keys
    are then ignored. `live`: the live keys [start, end) of each batch row."""

    n_queries: int = 0
    n_keys: int = 0
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    batch: int = 1
    is_causal: bool = False
    window: tuple | None = None
    scale: float | None = None
    softcap: float = 0.0
    segments: ShiftedSegments | None = None
    documents: tuple | None = None
    live: tuple | None = None
    sinks: bool = False
    magnitude: float = 1.0


@dataclass(frozen=True)
class Results:
    out: torch.Tensor
    lse: torch.Tensor | None = None
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dsinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """q, k, v, dout and options of a call, with its stock and its true results.

    terms   for each result the sum of the magnitudes of what is summed up in float32
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    options: dict
    stock: Results
    truth: Results
    terms: Results


def _ends(lengths) -> list[int]:
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    return ends


def make_inputs(case: Case, dtype):
    """q, k, v, dout and the options of the public call, on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((case, dtype)).encode()))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    same_names = ("is_causal", "window", "scale", "softcap", "segments")
    options = {name: getattr(case, name) for name in same_names}
    value_dim = case.value_dim or case.head_dim
    lead_q, lead_k = (case.batch, case.n_queries), (case.batch, case.n_keys)
    if case.documents is not None:
        ends_q, ends_k = (_ends(lengths) for lengths in zip(*case.documents, strict=True))
        lead_q, lead_k = (ends_q[-1],), (ends_k[-1],)
        options.update(cu_seqlens=int32(ends_q), cu_seqlens_k=int32(ends_k))
    if case.live is not None:
        key_mask = torch.zeros(case.batch, case.n_keys, dtype=torch.bool)
        for row, (start, end) in enumerate(case.live):
            key_mask[row, start:end] = True
        options["key_mask"] = key_mask
    if case.sinks:
        options["sinks"] = normal(case.heads)
    q = normal(*lead_q, case.heads, case.head_dim) * case.magnitude
    k = normal(*lead_k, case.kv_heads, case.head_dim) * case.magnitude
    v = normal(*lead_k, case.kv_heads, value_dim)
    dout = normal(*lead_q, case.heads, value_dim)
    return *(t.to(dtype) for t in (q, k, v, dout)), options


def move(options: dict, device: str) -> dict:
    """The options with their tensors on a device."""
    return {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}


def attend(target, q, k, v, **options):
    """`tilewright.flash_attention` by this target, or a skip with its reason."""
    target.require("flash_attention", q, k, v, **options)
    return tilewright.flash_attention(q, k, v, impl=target.name, **options)


def with_gradients(attention, q, k, v, dout, **options) -> Results:
    """`attention` forward and backward; gradients of q, k, v and of sinks if they are given."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    if options.get("sinks") is not None:
        leaves.append(options["sinks"].detach().clone().requires_grad_())
        options = {**options, "sinks": leaves[3]}
    out, lse = attention(*leaves[:3], return_lse=True, **options)
    return Results(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def gradients(target, q, k, v, dout, **options) -> Results:
    """This target forward and backward, or a skip with its reason."""
    q, k, v, dout = (t.to(target.device) for t in (q, k, v, dout))
    return with_gradients(
        lambda *a, **o: attend(target, *a, **o), q, k, v, dout, **move(options, target.device)
    )


def visible_pairs(q, k, v, **options) -> torch.Tensor:
    """The reference's mask of a call: bool (B, H, Lq, Lk)."""
    problem = choose.OPERATORS["flash_attention"].problem(q, k, v, **options)
    return reference.visible_pairs(problem)


def eager_attention(q, k, v, visible, scale=None, softcap=0.0, sinks=None):
    """Attention as models write it out: products in the dtype, softmax in float32.

    q (B, Lq, H, D)   k, v (B, Lk, Hkv, .)   visible (B, H, Lq, Lk). Returns out and lse (float32).
    """
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    terms = scores.float().masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*terms.shape[:3], 1)
        terms = torch.cat([terms, column], dim=-1)
    some = (terms > float("-inf")).any(-1, keepdim=True)
    terms = torch.where(some, terms, 0.0)
    weights = torch.where(some, torch.softmax(terms, dim=-1), 0.0)[..., : k.shape[2]].to(q.dtype)
    lse = torch.where(some[..., 0], torch.logsumexp(terms, dim=-1), float("-inf"))
    return (weights @ v).transpose(1, 2), lse


def stock_attention(q, k, v, **options):
    """Stock torch on the same inputs: scaled_dot_product_attention where it can, else eager.

    lse is eager attention's in float32, since scaled_dot_product_attention does not return it.
    """
    visible = visible_pairs(q, k, v, **options)
    packed = options.get("cu_seqlens") is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    rest = {n: options.get(n) for n in ("scale", "softcap", "sinks")}
    with torch.no_grad():
        _, lse = eager_attention(q.float(), k.float(), v.float(), visible, **rest)
    if rest["softcap"] or rest["sinks"] is not None:
        out, _ = eager_attention(q, k, v, visible, **rest)
    else:
        how = {"attn_mask": visible}
        special = ("window", "segments", "key_mask", "cu_seqlens")
        if all(options.get(n) is None for n in special):
            if not options.get("is_causal"):
                how = {}
            elif q.shape[1] == k.shape[1]:
                how = {"is_causal": True}
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), scale=rest["scale"],
            enable_gqa=q.shape[2] != k.shape[2], **how,
        ).transpose(1, 2)  # fmt: skip
        # rows that see nothing are 0 by our contract
        out = torch.where(visible.any(-1).transpose(1, 2)[..., None], out, 0.0)
    return (out[0], lse[0]) if packed else (out, lse)


def without_return_lse(attention):
    return lambda *a, return_lse=False, **o: attention(*a, **o)


def summed_magnitudes(q, k, v, dout, truth: Results, **options) -> Results:
    """What the results would be if every product counted with its magnitude, in float64.

    dS = P (dP - delta) is a difference of two sums. Of a query that sees one key they cancel: the
    truth is 0, and what is left of float32 sums is rounding of their size, stock's too unless by
    luck.
    """
    visible = visible_pairs(q, k, v, **options)
    packed = options.get("cu_seqlens") is not None
    if packed:
        q, k, v, dout = (t[None] for t in (q, k, v, dout))
        truth = Results(truth.out[None], truth.lse[None])
    group = q.shape[2] // k.shape[2]
    q, k, v, dout = (t.double().transpose(1, 2) for t in (q, k, v, dout))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = q.shape[3] ** -0.5 if options.get("scale") is None else options["scale"]
    scores, softcap = scale * q @ k.mT, options.get("softcap")
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    lse = truth.lse.masked_fill(truth.lse == float("-inf"), 0.0)[..., None]
    weights = torch.exp(scores.masked_fill(~visible, float("-inf")) - lse)
    q, k, v, dout = (t.abs() for t in (q, k, v, dout))
    delta = dout * truth.out.transpose(1, 2).abs()
    pairs = weights * (dout @ v.mT + delta.sum(-1, keepdim=True))

    def to_keys(t):  # (B, H, Lk, .) summed over the heads that share a key head
        return t.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    dsinks = None
    if options.get("sinks") is not None:
        share = torch.exp(options["sinks"].double()[None, :, None] - lse[..., 0])
        dsinks = (share * delta.sum(-1)).sum((0, 2))
    out, dq = ((w @ t).transpose(1, 2) for w, t in ((weights, v), (abs(scale) * pairs, k)))
    lse = (weights * (abs(scale) * q @ k.mT)).sum(-1)
    dk, dv = to_keys(abs(scale) * pairs.mT @ q), to_keys(weights.mT @ dout)
    if packed:
        out, lse, dq, dk, dv = (t[0] for t in (out, lse, dq, dk, dv))
    return Results(out, lse, dq, dk, dv, dsinks)


@lru_cache(maxsize=24)
def prepared(case: Case, dtype) -> Prepared:
    q, k, v, dout, options = make_inputs(case, dtype)
    stock = with_gradients(without_return_lse(stock_attention), q, k, v, dout, **options)
    wide = {n: o.double() if n == "sinks" and o is not None else o for n, o in options.items()}
    truth = with_gradients(
        lambda *a, **o: tilewright.flash_attention(*a, impl="reference", **o),
        q.double(), k.double(), v.double(), dout.double(), **wide,
    )  # fmt: skip
    terms = summed_magnitudes(q, k, v, dout, truth, **options)
    return Prepared(q, k, v, dout, options, stock, truth, terms)


def assert_accurate(ours: Results, case: Prepared, names):
    """The error-ratio rule for each of the named results."""
    for name in names:
        stock = getattr(case.stock, name)
        assert_errs_at_most_twice_stock(
            name, getattr(ours, name), stock.nan_to_num(0.0) if name != "lse" else stock,
            getattr(case.truth, name), getattr(case.terms, name),
        )  # fmt: skip


def bitwise(a, b) -> bool:
    """Whether two results, or two tensors, have the same bits; NaN equals the same NaN."""
    if isinstance(a, Results):
        return all(bitwise(getattr(a, n), getattr(b, n)) for n in a.__dataclass_fields__)
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_bytes = [t.detach().cpu().contiguous().view(torch.uint8) for t in (a, b) if t.numel()]
    return not as_bytes or torch.equal(*as_bytes)
