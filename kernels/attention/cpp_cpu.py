"""torch tensors -> pointers, extents and strides of the C++ kernels (csrc/attention)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.attention.problem import Problem
from tilewright.ops.common.cpu import NAMES, why_not_on_cpu

NO_VIEW = (0, 0, 0, 0, 0)
DECODE_KEYS = 256  # below, packing k and v costs little
DECODE_ROWS = 16  # queries times heads that share a key: more are faster as a tile of the forward


def why_not(p: Problem) -> str | None:
    return why_not_on_cpu(p.device, p.dtype)


def _view(t: torch.Tensor) -> tuple[int, ...]:
    if t.is_conj() or t.is_neg():
        raise ValueError("flash_attention: a conjugated or negated view; call .resolve_neg() first")
    return (t.data_ptr(), *t.stride())


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _extents(p: Problem) -> tuple[int, ...]:
    return (
        p.batch, p.n_queries, p.n_keys, p.n_heads, p.n_kv_heads, p.head_dim, p.value_dim,
    )  # fmt: skip


def _rule(p: Problem) -> tuple:
    seed = 0 if p.dropout_seed is None else int(p.dropout_seed.item())
    return (
        p.scale, p.softcap, p.is_causal, p.wraparound, p.window_left, p.window_right,
        p.group_size, p.first_shifted_head, p.dropout_p, seed,
    )  # fmt: skip


class _Held:
    """The small tensors of a call in the layout the kernels read, kept alive until it returns."""

    def __init__(self, p: Problem):
        self.cu_q = None if p.cu_seqlens_q is None else p.cu_seqlens_q.contiguous()
        self.cu_k = None if p.cu_seqlens_k is None else p.cu_seqlens_k.contiguous()
        self.mask = None if p.key_mask is None else p.key_mask.contiguous()
        self.sinks = None if p.sinks is None else p.sinks.float().contiguous()

    def packed(self) -> tuple[int, int, int]:
        n = 0 if self.cu_q is None else self.cu_q.numel() - 1
        return _address(self.cu_q), _address(self.cu_k), n


def _outputs(q, v, p: Problem):
    shape = (p.batch, p.n_queries, p.n_heads)
    covers_all = p.cu_seqlens_q is None  # packed documents may end before the last token
    new = q.new_empty if covers_all else q.new_zeros
    out = new(*shape, p.value_dim)
    lse = q.new_empty(shape[0], shape[2], shape[1], dtype=torch.float32)
    if not covers_all:
        lse.fill_(float("-inf"))
    return out, lse


def _is_decode(p: Problem) -> bool:
    """Few queries over keys that lie in order: the decode kernel reads k and v once, unpacked.

    A matter of shape and rule alone, so that a row's result cannot depend on its batch.
    """
    return (
        p.cu_seqlens_q is None
        and not p.group_size
        and not p.dropout_p
        and p.n_keys >= DECODE_KEYS
        and p.n_queries * p.queries_per_kv_head <= DECODE_ROWS
    )


def forward(q, k, v, p: Problem):
    if _is_decode(p):
        rows = torch.int32
        everything = p.with_(
            key_starts=torch.zeros(p.batch, dtype=rows),
            key_lengths=torch.full((p.batch,), p.n_keys, dtype=rows),
        )
        return decode(q, k, v, everything, 0)
    out, lse = _outputs(q, v, p)
    held = _Held(p)
    native().attention_forward(
        NAMES[p.dtype], _view(q), _view(k), _view(v), _view(out), lse.data_ptr(), _extents(p),
        _rule(p), held.packed(), _address(held.mask), _address(held.sinks),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, p: Problem, needs_dq: bool, needs_dkv: bool):
    new = torch.empty_like if p.cu_seqlens_q is None else torch.zeros_like

    def like(t, wanted):
        return new(t, memory_format=torch.contiguous_format) if wanted else t.new_empty(0)

    dq, dk, dv = like(q, needs_dq), like(k, needs_dkv), like(v, needs_dkv)
    held = _Held(p)
    dlse = None if dlse is None else dlse.float().contiguous()
    native().attention_backward(
        NAMES[p.dtype], _view(dout), _address(dlse), _view(q), _view(k), _view(v), _view(out),
        lse.contiguous().data_ptr(), _view(dq) if needs_dq else NO_VIEW,
        _view(dk) if needs_dkv else NO_VIEW, _view(dv) if needs_dkv else NO_VIEW, _extents(p),
        _rule(p), held.packed(), _address(held.mask), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def decode(q, k, v, p: Problem, num_splits: int):
    out, lse = _outputs(q, v, p)
    held = _Held(p)
    table = None if p.page_table is None else p.page_table.contiguous()
    assert p.key_starts is not None and p.key_lengths is not None  # every decode has them
    starts, lengths = p.key_starts.contiguous(), p.key_lengths.contiguous()
    pages_per_row = 1 if table is None else table.shape[1]
    native().attention_decode(
        NAMES[p.dtype], _view(q), _view(k), _view(v), _view(out), lse.data_ptr(), _extents(p),
        _rule(p), _address(table), (pages_per_row, k.shape[1], k.shape[0]),
        starts.data_ptr(), lengths.data_ptr(), _address(held.mask), _address(held.sinks),
        num_splits, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def append(k, v, k_cache, v_cache, key_lengths, page_table) -> None:
    batch, n, n_kv_heads, head_dim = k.shape
    slots = k_cache.shape[1]
    table = None if page_table is None else page_table.contiguous()
    lengths = key_lengths.contiguous()
    native().attention_append(
        _view(k), _view(v), _view(k_cache), _view(v_cache),
        (batch, n, slots, n_kv_heads, n_kv_heads, head_dim, v.shape[3]), k.itemsize,
        _address(table), (1 if table is None else table.shape[1], slots, k_cache.shape[0]),
        lengths.data_ptr(),
    )  # fmt: skip
