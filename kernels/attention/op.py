"""torch.library schemas, fakes and autograd of the attention room.

The choice among implementations is made inside the operators, so that a compiled graph holds one
opaque call whatever runs in it. Neither triton nor _C is imported before a call needs it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.attention import reference
from tilewright.ops.attention.problem import Problem

library = torch.library.Library("tilewright", "FRAGMENT")

# what forward and backward share after their tensors; `rule` below keeps the same order
_RULE = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, Tensor? sinks, "
    "Tensor? dropout_seed, float scale, bool is_causal, int window_left, int window_right, "
    "float softcap, int group_size, int first_shifted_head, bool wraparound, float dropout_p, "
    "str impl"
)
library.define(f"flash_attention(Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor, Tensor)")
library.define(
    "flash_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, bool needs_dq, bool needs_dkv, {_RULE}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "flash_decode(Tensor q, Tensor k, Tensor v, Tensor? page_table, Tensor key_starts, "
    "Tensor key_lengths, Tensor? sinks, float scale, bool is_causal, int window_left, "
    "float softcap, int num_splits, str impl) -> (Tensor, Tensor)"
)

N_RULE = 15
SINK_TERMS = 4096  # below the 32,768 elements from which torch splits a sum among threads


def rule(p: Problem, impl: str) -> tuple:
    """The trailing arguments of the operators, from a problem record."""
    return (
        p.cu_seqlens_q, p.cu_seqlens_k, p.key_mask, p.sinks, p.dropout_seed, p.scale,
        p.is_causal, p.window_left, p.window_right, p.softcap, p.group_size,
        p.first_shifted_head, p.wraparound, p.dropout_p, impl,
    )  # fmt: skip


def _problem(q, k, v, *r, needs_grad=False) -> tuple[Problem, str]:
    """The problem record and `impl` again, from the operators' arguments."""
    names = (
        "cu_seqlens_q", "cu_seqlens_k", "key_mask", "sinks", "dropout_seed", "scale", "is_causal",
        "window_left", "window_right", "softcap", "group_size", "first_shifted_head",
        "wraparound", "dropout_p",
    )  # fmt: skip
    problem = Problem(
        device=q.device.type, dtype=q.dtype,
        batch=q.shape[0], n_queries=q.shape[1], n_heads=q.shape[2], head_dim=q.shape[3],
        n_keys=k.shape[1], n_kv_heads=k.shape[2], value_dim=v.shape[3],
        needs_grad=needs_grad, **dict(zip(names, r[:-1], strict=True)),
    )  # fmt: skip
    return problem, r[-1]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _implementation(name: str):
    if name == "cpp_cpu":
        from tilewright.ops.attention import cpp_cpu

        return cpp_cpu
    if name == "triton_gpu":
        from tilewright.ops.attention import triton_gpu

        return triton_gpu
    return _ReferenceImplementation


def _check_lengths(p: Problem) -> None:
    """Refuse cu_seqlens that name no documents, and lengths that wraparound cannot cut."""
    for argument, cu, n_tokens in (
        ("cu_seqlens", p.cu_seqlens_q, p.n_queries),
        ("cu_seqlens_k", p.cu_seqlens_k, p.n_keys),
    ):
        ends = [0] if cu is None else cu.tolist()
        if ends[0] < 0:
            raise ValueError(f"flash_attention: {argument} starts at {ends[0]}, need at least 0")
        for i, (begin, end) in enumerate(pairwise(ends)):
            if end < begin:
                raise ValueError(
                    f"flash_attention: {argument}[{i + 1}] is {end}, need at least "
                    f"{argument}[{i}] = {begin}"
                )
        if ends[-1] > n_tokens:
            raise ValueError(
                f"flash_attention: {argument} ends at {ends[-1]}, past the {n_tokens} tokens given"
            )
    if not p.wraparound:
        return
    documents = [(p.n_queries, p.n_keys, p.n_keys)]  # queries, keys, keys from first to last live
    if p.cu_seqlens_q is not None and p.cu_seqlens_k is not None:  # both or none
        lengths = zip(p.cu_seqlens_q.diff().tolist(), p.cu_seqlens_k.diff().tolist(), strict=True)
        documents = [(n_q, n_k, n_k) for n_q, n_k in lengths]
    elif p.key_mask is not None:
        places = [row.nonzero().flatten().tolist() or [0, -1] for row in p.key_mask]
        documents = [(p.n_queries, p.n_keys, at[-1] - at[0] + 1) for at in places]
    for n_q, n_k, live in documents:
        if n_q != n_k or live % p.group_size:
            raise ValueError(
                f"flash_attention: wraparound needs group_size {p.group_size} to divide every "
                f"length, and as many queries as keys; got {n_q} queries and {live} live keys"
            )


class _ReferenceImplementation:
    """The reference in the operators' dtypes, with the value checks that kernels make too."""

    @staticmethod
    def forward(q, k, v, p):
        _check_lengths(p)
        out, lse = reference.flash_attention(q, k, v, p)
        return out.to(q.dtype).contiguous(), lse.to(lse_dtype(q.dtype))

    @staticmethod
    def backward(dout, dlse, q, k, v, out, lse, p, needs_dq, needs_dkv):
        with torch.enable_grad():
            q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
            out, lse = reference.flash_attention(q64, k64, v64, p)
            upstream = [dout.double(), torch.zeros_like(lse) if dlse is None else dlse.double()]
            grads = torch.autograd.grad([out, lse], [q64, k64, v64], upstream)
        needed = (needs_dq, needs_dkv, needs_dkv)
        return tuple(
            g.to(q.dtype).contiguous() if needs else q.new_empty(0)
            for g, needs in zip(grads, needed, strict=True)
        )

    @staticmethod
    def decode(q, k, v, p, num_splits):
        n_pages, page_slots = k.shape[:2]
        pages = [[]] * p.batch if p.page_table is None else p.page_table.tolist()
        for row, (length, start) in enumerate(
            zip(p.key_lengths.tolist(), p.key_starts.tolist(), strict=True)
        ):
            slots = page_slots if p.page_table is None else len(pages[row]) * page_slots
            if not 0 <= length <= slots:
                raise ValueError(
                    f"flash_decode: key_lengths[{row}] is {length}, need 0 to {slots}, the slots "
                    "of a row"
                )
            if start < 0:
                raise ValueError(f"flash_decode: key_starts[{row}] is {start}, need at least 0")
            for index, page in enumerate(pages[row][: -(-length // page_slots)]):
                if not 0 <= page < n_pages:
                    raise ValueError(
                        f"flash_decode: page_table[{row}, {index}] is {page}, need 0 to "
                        f"{n_pages - 1}, the pages of k_cache"
                    )
        out, lse = reference.flash_decode(q, k, v, p)
        return out.to(q.dtype), lse.to(lse_dtype(q.dtype))


def _run_forward(q, k, v, p: Problem, impl: str):
    return _implementation(choose.choose("flash_attention", impl, p)).forward(q, k, v, p)


def _run_decode(q, k, v, p: Problem, num_splits: int, impl: str):
    name = choose.choose("flash_decode", impl, p)
    return _implementation(name).decode(q, k, v, p, num_splits)


def _forward(q, k, v, *r):
    return _run_forward(q, k, v, *_problem(q, k, v, *r))


def _backward(dout, dlse, q, k, v, out, lse, needs_dq, needs_dkv, *r):
    p, impl = _problem(q, k, v, *r, needs_grad=True)
    name = choose.choose("flash_attention", impl, p)
    return _implementation(name).backward(dout, dlse, q, k, v, out, lse, p, needs_dq, needs_dkv)


def _decode(q, k, v, page_table, key_starts, key_lengths, sinks, scale, is_causal, window_left,
            softcap, num_splits, impl):  # fmt: skip
    p = Problem(
        device=q.device.type, dtype=q.dtype,
        batch=q.shape[0], n_queries=q.shape[1], n_heads=q.shape[2], head_dim=q.shape[3],
        n_keys=k.shape[1], n_kv_heads=k.shape[2], value_dim=v.shape[3], scale=scale,
        is_causal=is_causal, window_left=window_left, softcap=softcap, sinks=sinks,
        page_table=page_table, key_starts=key_starts, key_lengths=key_lengths,
    )  # fmt: skip
    return _run_decode(q, k, v, p, num_splits, impl)


for _name, _function in (
    ("flash_attention", _forward),
    ("flash_attention_backward", _backward),
    ("flash_decode", _decode),
):
    library.impl(_name, _function, "CPU")
    library.impl(_name, _function, "CUDA")


def _outputs_like(q, v):
    batch, n_queries, n_heads, _ = q.shape
    out = q.new_empty(batch, n_queries, n_heads, v.shape[3])
    return out, q.new_empty(batch, n_heads, n_queries, dtype=lse_dtype(q.dtype))


@torch.library.register_fake("tilewright::flash_attention", lib=library)
def _(q, k, v, *r):
    return _outputs_like(q, v)


@torch.library.register_fake("tilewright::flash_decode", lib=library)
def _(q, k, v, *r):
    return _outputs_like(q, v)


@torch.library.register_fake("tilewright::flash_attention_backward", lib=library)
def _(dout, dlse, q, k, v, out, lse, needs_dq, needs_dkv, *r):
    dq = q.new_empty(q.shape if needs_dq else (0,))
    dk = k.new_empty(k.shape if needs_dkv else (0,))
    dv = v.new_empty(v.shape if needs_dkv else (0,))
    return dq, dk, dv


def sink_gradient(dout, dlse, out, lse, sinks):
    """dsinks[h] = sum over rows of exp(sink_h - lse) (dlse - dout . out)."""
    row = -(dout.to(lse.dtype) * out).sum(-1).transpose(1, 2)  # (B, H, Lq)
    if dlse is not None:
        row = row + dlse
    weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    terms = torch.where(lse > float("-inf"), weight * row, 0.0).transpose(0, 1).flatten(1)  # (H, .)
    # torch deals one long sum out by the number of threads: short ones first, in a fixed order
    n_rest = -terms.shape[1] % SINK_TERMS
    terms = torch.nn.functional.pad(terms, (0, n_rest)).unflatten(1, (-1, SINK_TERMS))
    return terms.sum(-1).sum(-1).to(sinks.dtype)


def _setup_context(ctx, inputs, output):
    q, k, v, *r = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *r[:5])
    ctx.rule = r[5:]


def _autograd_backward(ctx, dout, dlse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    sinks, needs = tensors[3], ctx.needs_input_grad
    n_none = [None] * N_RULE
    if dout is None and dlse is None:
        return (None, None, None, *n_none)
    if dout is None:
        dout = torch.zeros_like(out)
    needs_dq, needs_dkv = needs[0], needs[1] or needs[2]
    dq = dk = dv = None
    if needs_dq or needs_dkv:
        dq, dk, dv = torch.ops.tilewright.flash_attention_backward(
            dout, dlse, q, k, v, out, lse, needs_dq, needs_dkv, *tensors, *ctx.rule
        )
    if needs[6]:
        n_none[3] = sink_gradient(dout, dlse, out, lse, sinks)
    return (
        dq if needs[0] else None,
        dk if needs[1] else None,
        dv if needs[2] else None,
        *n_none,
    )


torch.library.register_autograd(
    "tilewright::flash_attention",
    _autograd_backward,
    setup_context=_setup_context,
    lib=library,
)


class _FlashAttention(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, q, k, v, *r):
        outputs = _forward(q, k, v, *r)
        _setup_context(ctx, (q, k, v, *r), outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return _autograd_backward(ctx, dout, dlse)


def call_flash_attention(q, k, v, p: Problem, impl: str):
    """The registered operator, or in plain eager mode what it would end up calling."""
    r = rule(p, impl)
    if not may_go_direct(q, k, v, *r[:5]):
        return torch.ops.tilewright.flash_attention(q, k, v, *r)
    wants_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if torch.is_grad_enabled() and (wants_grad or (p.sinks is not None and p.sinks.requires_grad)):
        return _FlashAttention.apply(q, k, v, *r)
    return _run_forward(q, k, v, p, impl)


def call_flash_decode(q, k, v, p: Problem, num_splits: int, impl: str):
    """The registered operator, or in plain eager mode what it would end up calling."""
    wants_grad = q.requires_grad or k.requires_grad or v.requires_grad
    needs_refusal = wants_grad and torch.is_grad_enabled()
    if not needs_refusal and may_go_direct(q, k, v):
        return _run_decode(q, k, v, p, num_splits, impl)
    return torch.ops.tilewright.flash_decode(
        q, k, v, p.page_table, p.key_starts, p.key_lengths, p.sinks, p.scale, p.is_causal,
        p.window_left, p.softcap, num_splits, impl,
    )  # fmt: skip


def _decode_backward(ctx, dout, dlse):
    raise NotImplementedError(
        "flash_decode: it has no gradient; call it under torch.no_grad(), or use flash_attention"
    )


torch.library.register_autograd("tilewright::flash_decode", _decode_backward, lib=library)
