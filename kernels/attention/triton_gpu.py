"""Launchers of the Triton kernels: tensors and the problem record -> kernel arguments."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import torch
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

from tilewright import settings
from tilewright.ops.attention import triton_config as config
from tilewright.ops.attention.problem import Problem
from tilewright.ops.attention.triton_backward import (
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_row_terms_kernel,
)
from tilewright.ops.attention.triton_decode import (
    attention_combine_kernel,
    attention_decode_kernel,
)
from tilewright.ops.attention.triton_forward import attention_forward_kernel, live_range_kernel

_UNLIMITED = 2**30  # a window or group wider than any document; sums with positions stay in int32
_WHOLE, _CUT, _WRAPPED = 0, 1, 2  # as triton_tiles.py numbers them


def why_not(p: Problem) -> str | None:
    """None if the Triton kernels can run this problem here, else the reason."""
    interpreted = settings.triton_is_interpreted()
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(p.dtype).removeprefix('torch.')} is not among float32, bfloat16, float16"
    if interpreted:
        if p.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return None
    if p.device != "cuda":
        return f"tensors are on {p.device}, and TRITON_INTERPRET is not 1"
    if torch.version.hip:
        return "written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "needs compute capability 8.0, this GPU has {}.{}".format(*capability)
    return None


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with; tests compile it without starting it."""

    kernel: KernelInterface
    programs: int
    arguments: dict
    num_warps: int = 4
    num_stages: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self) -> None:
        if self.programs == 0:
            return
        options = {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip
        on_device = (
            torch.cuda.device(self.device)
            if self.device.type == "cuda"
            else contextlib.nullcontext()
        )
        with on_device:
            self.kernel[(self.programs,)](**self.arguments, **options)


def _launch(kernel, programs: int, arguments: dict, tiles: config.Tiles, device) -> Launch:
    return Launch(kernel, programs, arguments, tiles.num_warps, tiles.num_stages, device)


def _capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The GPU's compute capability, None under the interpreter."""
    if settings.triton_is_interpreted():
        return None
    return torch.cuda.get_device_capability(tensor.device)


def _strides(name: str, t: torch.Tensor) -> dict[str, int]:
    b, n, h, d = t.stride()
    return {f"{name}_stride_b": b, f"{name}_stride_t": n, f"{name}_stride_h": h,
            f"{name}_stride_d": d}  # fmt: skip


def _fits_descriptor(t: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read (B, tokens, heads, width): 16-byte strides and base."""
    if t.numel() == 0 or t.stride(3) != 1 or t.data_ptr() % 16:
        return False
    return all(
        n == 1 or (stride > 0 and stride * t.itemsize % 16 == 0)
        for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
    )


def _by_descriptor(capability, *tensors: torch.Tensor) -> bool:
    """Whether to read tiles by descriptor: 16-bit types where the copy engine exists."""
    if capability is not None and capability < (9, 0):
        return False
    return all(t.itemsize == 2 and _fits_descriptor(t) for t in tensors)


def _source(t: torch.Tensor, rows: int, width: int, by_descriptor: bool):
    """What a kernel reads (rows, width) tiles of one head from: a descriptor, or the tensor."""
    if not by_descriptor:
        return t
    t = t.transpose(1, 2)  # (B, heads, tokens, width)
    # the stride of an axis of one element is free; the copy engine wants a multiple of 16 bytes
    strides = [16 if n == 1 else s for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, width])


def _terms_source(terms: torch.Tensor, p: Problem, queries: int, by_descriptor: bool):
    """What a kernel reads `queries` row terms from: a descriptor, or the tensor (2, B H, pitch)."""
    if not by_descriptor:
        return terms
    # in batch form, queries past the end read as zeros; packed documents are checked in the kernel
    last = p.n_queries if p.cu_seqlens_q is None else terms.shape[2]
    shape = [2, terms.shape[1], last]
    return TensorDescriptor(terms, shape, list(terms.stride()), [1, 1, queries])


def _live_range(p: Problem) -> list[Launch]:
    """The launch that fills `live` (B, 3) from key_mask, if there is one."""
    if p.key_mask is None:
        return []
    mask = p.key_mask.view(torch.uint8)
    live = torch.empty(p.batch, 3, dtype=torch.int32, device=mask.device)
    arguments = {
        "key_mask_ptr": mask, "live_ptr": live,
        "stride_b": mask.stride(0), "stride_t": mask.stride(1), "n_keys": p.n_keys, "BLOCK": 1024,
    }  # fmt: skip
    return [Launch(live_range_kernel, p.batch, arguments, device=mask.device)]


def _slots(cu_seqlens: torch.Tensor | None, n_tokens: int, block: int) -> int:
    """How many tiles of `block` tokens the documents need at most, without reading cu_seqlens."""
    if cu_seqlens is None:
        return -(-n_tokens // block)
    # one more tile a document, and for the tokens before all and past all (find_document)
    return n_tokens // block + cu_seqlens.numel() + 1 if n_tokens else 0


def _rule(p: Problem, device: torch.device, live: torch.Tensor | None) -> dict:
    """The arguments that all kernels of forward and backward share."""
    left, right = (
        _UNLIMITED if w < 0 else min(w, _UNLIMITED) for w in (p.window_left, p.window_right)
    )
    segments = (_WRAPPED if p.wraparound else _CUT) if p.group_size else _WHOLE
    if p.is_causal and segments != _WRAPPED:
        right = 0
    n_documents = 0 if p.cu_seqlens_q is None else p.cu_seqlens_q.numel() - 1
    mask = None if p.key_mask is None else p.key_mask.view(torch.uint8)
    seed = p.dropout_seed if p.dropout_p else None
    group = min(p.group_size, _UNLIMITED)
    return {
        "cu_q_ptr": p.cu_seqlens_q, "cu_k_ptr": p.cu_seqlens_k,
        "live_ptr": live, "key_mask_ptr": mask,
        "seed_ptr": None if seed is None else seed.to(device),
        "mask_stride_b": 0 if mask is None else mask.stride(0),
        "mask_stride_t": 0 if mask is None else mask.stride(1),
        "n_queries": p.n_queries, "n_keys": p.n_keys, "n_heads": p.n_heads,
        "queries_per_kv_head": p.queries_per_kv_head,
        "n_documents": n_documents, "n_steps": (n_documents + 1).bit_length(),
        "scale": p.scale, "softcap": p.softcap, "left": left, "right": right,
        "group": group, "group_shift": group // 2, "first_shifted_head": p.first_shifted_head,
        # uniform >= p, in units of 2**-24
        "threshold": math.ceil(p.dropout_p * 2**24), "keep_scale": 1.0 / (1.0 - p.dropout_p),
        "D": p.head_dim, "DV": p.value_dim,
        "BLOCK_D": config.block_width(p.head_dim), "BLOCK_DV": config.block_width(p.value_dim),
        "SEGMENTS": segments, "IS_CAUSAL": p.is_causal, "IS_PACKED": p.cu_seqlens_q is not None,
        "HAS_KEY_MASK": mask is not None, "HAS_SOFTCAP": p.softcap > 0,
        "HAS_DROPOUT": p.dropout_p > 0,
    }  # fmt: skip


def forward_launches(q, k, v, out, lse, p: Problem, capability) -> list[Launch]:
    """The launches of one forward pass, in order."""
    launches = _live_range(p)
    live = launches[0].arguments["live_ptr"] if launches else None
    rule = _rule(p, q.device, live)
    width = max(rule["BLOCK_D"], rule["BLOCK_DV"])
    is_crowded = p.softcap > 0 or p.dropout_p > 0
    tiles = config.forward_tiles(capability, p.dtype, width, is_crowded)
    by_descriptor = _by_descriptor(capability, q, k, v)
    n_slots = _slots(p.cu_seqlens_q, p.n_queries, tiles.queries)
    arguments = {
        "q": _source(q, tiles.queries, rule["BLOCK_D"], by_descriptor),
        "k": _source(k, tiles.keys, rule["BLOCK_D"], by_descriptor),
        "v": _source(v, tiles.keys, rule["BLOCK_DV"], by_descriptor),
        "out_ptr": out, "lse_ptr": lse, "sinks_ptr": p.sinks,
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **rule,
        "n_slots": n_slots, "BLOCK_Q": tiles.queries, "BLOCK_K": tiles.keys,
        "HAS_SINKS": p.sinks is not None, "BY_DESCRIPTOR": by_descriptor,
    }  # fmt: skip
    programs = n_slots * p.n_heads * p.batch
    return [*launches, _launch(attention_forward_kernel, programs, arguments, tiles, q.device)]


def forward(q, k, v, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Lq, H, Dv) in q.dtype, contiguous, and lse (B, H, Lq) in float32."""
    q, p = _with_positive_scale(q, p)
    out = q.new_empty(p.batch, p.n_queries, p.n_heads, p.value_dim)
    lse = q.new_empty(p.batch, p.n_heads, p.n_queries, dtype=torch.float32)
    for launch in forward_launches(q, k, v, out, lse, p, _capability(q)):
        launch.run()
    return out, lse


def _with_positive_scale(q, p: Problem):
    """The kernels take a maximum before they scale, so a negative scale moves into q."""
    return (q, p) if p.scale >= 0 else (-q, p.with_(scale=-p.scale))


def backward_launches(
    dout, dlse, q, k, v, out, lse, dq, dk, dv, p: Problem, capability
) -> list[Launch]:
    """The launches of one backward pass, in order; dq or both of dk and dv may be None."""
    launches = _live_range(p)
    live = launches[0].arguments["live_ptr"] if launches else None
    rule = _rule(p, q.device, live)
    n_rows = p.batch * p.n_heads
    pitch = -(-p.n_queries // 4) * 4  # each document's terms begin on 16 bytes (terms_origin)
    if p.cu_seqlens_q is not None:
        pitch += 4 * (p.cu_seqlens_q.numel() + 1)
    terms = torch.empty(2, n_rows, pitch, dtype=torch.float32, device=q.device)
    rows = 64 if p.value_dim <= 128 else 32  # more would not fit into registers
    n_slots = _slots(p.cu_seqlens_q, p.n_queries, rows)
    dlse_b, dlse_h, dlse_t = (0, 0, 0) if dlse is None else dlse.stride()
    arguments = {
        "out_ptr": out, "dout_ptr": dout, "lse_ptr": lse, "dlse_ptr": dlse, "terms_ptr": terms,
        "cu_q_ptr": p.cu_seqlens_q, **_strides("dout", dout),
        "dlse_stride_b": dlse_b, "dlse_stride_h": dlse_h, "dlse_stride_t": dlse_t,
        "n_queries": p.n_queries, "n_heads": p.n_heads, "n_documents": rule["n_documents"],
        "n_steps": rule["n_steps"], "n_rows": n_rows, "terms_pitch": pitch, "n_slots": n_slots,
        "IS_PACKED": rule["IS_PACKED"], "HAS_DLSE": dlse is not None,
        "DV": p.value_dim, "BLOCK_DV": rule["BLOCK_DV"], "BLOCK_Q": rows,
    }  # fmt: skip
    programs = n_slots * p.n_heads * p.batch
    launches.append(Launch(attention_row_terms_kernel, programs, arguments, device=q.device))

    width = max(rule["BLOCK_D"], rule["BLOCK_DV"])
    by_descriptor = _by_descriptor(capability, q, k, v, dout)
    strides = {**_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("dout", dout)}

    def shared(tiles: config.Tiles, n_slots: int) -> dict:
        return {
            "q": _source(q, tiles.queries, rule["BLOCK_D"], by_descriptor),
            "k": _source(k, tiles.keys, rule["BLOCK_D"], by_descriptor),
            "v": _source(v, tiles.keys, rule["BLOCK_DV"], by_descriptor),
            "dout": _source(dout, tiles.queries, rule["BLOCK_DV"], by_descriptor),
            **strides, **rule, "n_rows": n_rows, "terms_pitch": pitch, "n_slots": n_slots,
            "BLOCK_Q": tiles.queries, "BLOCK_K": tiles.keys, "BY_DESCRIPTOR": by_descriptor,
        }  # fmt: skip

    if dq is not None:
        tiles = config.dq_tiles(capability, p.dtype, width)
        n_slots = _slots(p.cu_seqlens_q, p.n_queries, tiles.queries)
        arguments = {**shared(tiles, n_slots), "terms_ptr": terms, "dq_ptr": dq}
        programs = n_slots * p.n_heads * p.batch
        launches.append(_launch(attention_dq_kernel, programs, arguments, tiles, q.device))
    passes = config.dkv_passes(width, p.dropout_p > 0) if dk is not None else ()
    for wants_dk, wants_dv in passes:
        is_crowded = (
            p.softcap > 0 or p.dropout_p > 0 or p.cu_seqlens_q is not None or p.group_size > 0
        )
        tiles = config.dkv_tiles(capability, p.dtype, width, is_crowded)
        n_slots = _slots(p.cu_seqlens_k, p.n_keys, tiles.keys)
        arguments = {
            **shared(tiles, n_slots),
            "terms": _terms_source(terms, p, tiles.queries, by_descriptor),
            "dk_ptr": dk, "dv_ptr": dv, "WANTS_DK": wants_dk, "WANTS_DV": wants_dv,
        }  # fmt: skip
        programs = n_slots * p.n_kv_heads * p.batch
        launches.append(_launch(attention_dkv_kernel, programs, arguments, tiles, q.device))
    return launches


def backward(dout, dlse, q, k, v, out, lse, p: Problem, needs_dq: bool, needs_dkv: bool):
    """dq, dk, dv, contiguous and of the shapes of q, k, v; those not needed have shape (0,)."""
    negated = p.scale < 0
    q, p = _with_positive_scale(q, p)
    dq = q.new_empty(q.shape if needs_dq else (0,))
    dk = k.new_empty(k.shape if needs_dkv else (0,))
    dv = v.new_empty(v.shape if needs_dkv else (0,))
    launches = backward_launches(
        dout, dlse, q, k, v, out, lse,
        dq if needs_dq else None, dk if needs_dkv else None, dv if needs_dkv else None,
        p, _capability(q),
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return -dq if negated else dq, dk, dv


def decode_launches(
    q, k, v, out, lse, p: Problem, capability, num_splits: int, n_processors: int
) -> list[Launch]:
    """The launches of one decode step, in order; num_splits 0 chooses."""
    page = 0 if p.page_table is None else k.shape[1]
    n_slots = k.shape[1] if p.page_table is None else p.page_table.shape[1] * page
    block_d, block_dv = config.block_width(p.head_dim), config.block_width(p.value_dim)
    n_rows = p.n_queries * p.queries_per_kv_head
    tiles = config.decode_tiles(capability, p.dtype, max(block_d, block_dv), n_rows)
    n_packs = -(-n_rows // tiles.queries)
    n_chunks = max(-(-n_slots // tiles.chunk), 1)
    n_shares = p.batch * p.n_kv_heads * n_packs
    if num_splits == 0:  # about four programs a processor hide each other's latency
        num_splits = -(-4 * n_processors // max(n_shares, 1))
    n_splits = min(num_splits, n_chunks)
    n_places = p.batch * p.n_heads * p.n_queries
    partial = torch.empty(n_places, n_chunks, p.value_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(n_places, n_chunks, dtype=torch.float32, device=q.device)
    window_left = _UNLIMITED if p.window_left < 0 else min(p.window_left, _UNLIMITED)
    shared = {
        "key_starts_ptr": p.key_starts, "key_lengths_ptr": p.key_lengths,
        "partial_ptr": partial, "partial_lse_ptr": partial_lse,
        "n_queries": p.n_queries, "n_slots": n_slots, "n_heads": p.n_heads,
        "queries_per_kv_head": p.queries_per_kv_head,
        "n_chunks": n_chunks, "window_left": window_left,
        "DV": p.value_dim, "BLOCK_DV": block_dv, "BLOCK_Q": tiles.queries, "CHUNK": tiles.chunk,
    }  # fmt: skip
    table = p.page_table
    decode = {
        "q": q, "k": k, "v": v, "page_table_ptr": table, **_strides("q", q), **_strides("k", k),
        **_strides("v", v), "table_stride_b": 0 if table is None else table.stride(0),
        "table_stride_p": 0 if table is None else table.stride(1),
        "n_splits": n_splits, "n_packs": n_packs, "scale": p.scale, "softcap": p.softcap,
        "D": p.head_dim, "BLOCK_D": block_d, "BLOCK_K": tiles.keys, "PAGE": page,
        "IS_CAUSAL": p.is_causal, "HAS_SOFTCAP": p.softcap > 0, **shared,
    }  # fmt: skip
    combine = {
        "sinks_ptr": p.sinks, "out_ptr": out, "lse_ptr": lse,
        "CHUNKS": 16, "HAS_SINKS": p.sinks is not None, **shared,
    }  # fmt: skip
    return [
        _launch(attention_decode_kernel, n_splits * n_shares, decode, tiles, q.device),
        Launch(attention_combine_kernel, n_places, combine, device=q.device),
    ]


def decode(q, k, v, p: Problem, num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Lq, H, Dv) in q.dtype and lse (B, H, Lq) in float32; num_splits 0 chooses."""
    capability = _capability(q)
    n_processors = 4
    if capability is not None:
        n_processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    out = q.new_empty(p.batch, p.n_queries, p.n_heads, p.value_dim)
    lse = q.new_empty(p.batch, p.n_heads, p.n_queries, dtype=torch.float32)
    for launch in decode_launches(q, k, v, out, lse, p, capability, num_splits, n_processors):
        launch.run()
    return out, lse
