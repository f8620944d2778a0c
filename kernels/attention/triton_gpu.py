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


def _strides(name: str, t: torch.Tensor, by_descriptor: bool = False) -> dict[str, int]:
    """A descriptor holds its own strides; zeros in their place keep one compiled kernel for all."""
    b, n, h, d = (0, 0, 0, 0) if by_descriptor else t.stride()
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
    """Whether to move tiles by descriptor: 16-bit types on Hopper (and datacentre Blackwell).

    Compute capability 12 has the copy engine too, but neither wgmma nor the shared memory for
    tiles that are worth it.
    """
    if capability is not None and not (9, 0) <= capability < (12, 0):
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


def _target(t: torch.Tensor | None, rows: int, rule: dict, by_descriptor: bool):
    """What a kernel stores its result to: a descriptor, or the tensor for packed documents, whose
    tiles may reach into the next document."""
    if t is None or not by_descriptor or rule["IS_PACKED"]:
        return t
    return _source(t, rows, config.block_width(t.shape[3]), True)


def _terms_source(terms: torch.Tensor, p: Problem, queries: int, by_descriptor: bool):
    """What a kernel reads `queries` row terms from: a descriptor, or the tensor (2, B H, pitch)."""
    if not by_descriptor:
        return terms
    # in batch form, queries past the end read as zeros; packed documents are checked in the kernel
    last = p.n_queries if p.cu_seqlens_q is None else terms.shape[2]
    shape = [2, terms.shape[1], last]
    return TensorDescriptor(terms, shape, list(terms.stride()), [1, 1, queries])


def _slots(cu_seqlens: torch.Tensor | None, n_tokens: int, block: int) -> int:
    """How many tiles of `block` tokens the documents need at most, without reading cu_seqlens."""
    if cu_seqlens is None:
        return -(-n_tokens // block)
    # one more tile a document, and for the tokens before all and past all (find_document)
    return n_tokens // block + cu_seqlens.numel() + 1 if n_tokens else 0


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """The small tensors of a call, whose strides the kernels do not take."""
    return None if t is None else t.contiguous()


def _seed(p: Problem, device: torch.device) -> torch.Tensor | None:
    """The dropout seed on the device. A copy from the CPU would wait for all that is queued there,
    and could not be captured in a graph; filling in the number does neither."""
    seed = p.dropout_seed
    if seed is None or not p.dropout_p:
        return None
    if seed.device.type == "cpu" and device.type != "cpu":
        return torch.full((1,), int(seed.item()), dtype=torch.int64, device=device)
    return seed.to(device)


def _rule(p: Problem, device: torch.device) -> tuple[list[Launch], dict]:
    """(what has to run first, the arguments that all kernels of forward and backward share)."""
    left, right = (
        _UNLIMITED if w < 0 else min(w, _UNLIMITED) for w in (p.window_left, p.window_right)
    )
    segments = (_WRAPPED if p.wraparound else _CUT) if p.group_size else _WHOLE
    if p.is_causal and segments != _WRAPPED:
        right = 0
    n_documents = 0 if p.cu_seqlens_q is None else p.cu_seqlens_q.numel() - 1
    group = min(p.group_size, _UNLIMITED)
    launches, mask, live = [], None, None
    if p.key_mask is not None:
        mask = p.key_mask.contiguous().view(torch.uint8)
        live = torch.empty(p.batch, 3, dtype=torch.int32, device=device)
        arguments = {"key_mask_ptr": mask, "live_ptr": live, "n_keys": p.n_keys, "BLOCK": 1024}
        launches.append(Launch(live_range_kernel, p.batch, arguments, device=device))
    return launches, {
        "cu_q_ptr": _contiguous(p.cu_seqlens_q), "cu_k_ptr": _contiguous(p.cu_seqlens_k),
        "live_ptr": live, "key_mask_ptr": mask, "seed_ptr": _seed(p, device),
        "n_queries": p.n_queries, "n_keys": p.n_keys, "n_heads": p.n_heads,
        "queries_per_kv_head": p.queries_per_kv_head,
        "n_documents": n_documents, "n_steps": (n_documents + 1).bit_length(),
        "scale": p.scale, "softcap": p.softcap, "left": left, "right": right,
        "group": group, "group_shift": group // 2, "first_shifted_head": p.first_shifted_head,
        # uniform >= p, in units of 2**-24
        "threshold": math.ceil(p.dropout_p * 2**24), "keep_scale": 1.0 / (1.0 - p.dropout_p),
        "D": p.head_dim, "DV": p.value_dim,
        "BLOCK_D": config.block_width(p.head_dim), "BLOCK_DV": config.block_width(p.value_dim),
        # elsewhere right = 0 says it, and a kernel of its own is not needed
        "IS_CAUSAL": p.is_causal and segments == _WRAPPED,
        "SEGMENTS": segments, "IS_PACKED": p.cu_seqlens_q is not None,
        "HAS_KEY_MASK": mask is not None, "HAS_SOFTCAP": p.softcap > 0,
        "HAS_DROPOUT": p.dropout_p > 0, "IS_WIDE": p.dtype == torch.float32,
    }  # fmt: skip


def forward_launches(q, k, v, out, lse, p: Problem, capability) -> list[Launch]:
    """The launches of one forward pass, in order."""
    launches, rule = _rule(p, q.device)
    by_descriptor = _by_descriptor(capability, q, k, v, out)
    tiles = config.forward_tiles(capability, p, by_descriptor)
    n_slots = _slots(p.cu_seqlens_q, p.n_queries, tiles.queries)
    arguments = {
        "q": _source(q, tiles.queries, rule["BLOCK_D"], by_descriptor),
        "k": _source(k, tiles.keys, rule["BLOCK_D"], by_descriptor),
        "v": _source(v, tiles.keys, rule["BLOCK_DV"], by_descriptor),
        "out": _target(out, tiles.queries, rule, by_descriptor),
        "lse_ptr": lse, "sinks_ptr": _contiguous(p.sinks),
        **_strides("q", q, by_descriptor), **_strides("k", k, by_descriptor),
        **_strides("v", v, by_descriptor), **rule,
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
    launches, rule = _rule(p, q.device)
    by_descriptor = _by_descriptor(capability, q, k, v, *(t for t in (dq, dk, dv) if t is not None))
    if by_descriptor and not _fits_descriptor(dout):
        # .sum() hands down strides of 0: a copy costs less than to read all tiles by pointers
        dout = dout.contiguous()
        by_descriptor = _fits_descriptor(dout)
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
        "cu_q_ptr": rule["cu_q_ptr"], **_strides("dout", dout),
        "dlse_stride_b": dlse_b, "dlse_stride_h": dlse_h, "dlse_stride_t": dlse_t,
        "n_queries": p.n_queries, "n_heads": p.n_heads, "n_documents": rule["n_documents"],
        "n_steps": rule["n_steps"], "n_rows": n_rows, "terms_pitch": pitch, "n_slots": n_slots,
        "IS_PACKED": rule["IS_PACKED"], "HAS_DLSE": dlse is not None,
        "DV": p.value_dim, "BLOCK_DV": rule["BLOCK_DV"], "BLOCK_Q": rows,
    }  # fmt: skip
    programs = n_slots * p.n_heads * p.batch
    launches.append(Launch(attention_row_terms_kernel, programs, arguments, device=q.device))

    strides: dict[str, int] = {}
    for name, t in (("q", q), ("k", k), ("v", v), ("dout", dout)):
        strides |= _strides(name, t, by_descriptor)

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
        tiles = config.dq_tiles(capability, p, by_descriptor)
        n_slots = _slots(p.cu_seqlens_q, p.n_queries, tiles.queries)
        arguments = {
            **shared(tiles, n_slots), "terms_ptr": terms,
            "dq": _target(dq, tiles.queries, rule, by_descriptor),
        }  # fmt: skip
        programs = n_slots * p.n_heads * p.batch
        launches.append(_launch(attention_dq_kernel, programs, arguments, tiles, q.device))
    for wants_dk, wants_dv in config.dkv_passes(p) if dk is not None else ():
        tiles = config.dkv_tiles(capability, p, by_descriptor, wants_dk)
        n_slots = _slots(p.cu_seqlens_k, p.n_keys, tiles.keys)
        arguments = {
            **shared(tiles, n_slots),
            "terms": _terms_source(terms, p, tiles.queries, by_descriptor),
            "dk_target": _target(dk if wants_dk else None, tiles.keys, rule, by_descriptor),
            "dv_target": _target(dv if wants_dv else None, tiles.keys, rule, by_descriptor),
            "WANTS_DK": wants_dk, "WANTS_DV": wants_dv,
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
    tiles = config.decode_tiles(capability, p)
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
        "key_starts_ptr": _contiguous(p.key_starts), "key_lengths_ptr": _contiguous(p.key_lengths),
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
        "sinks_ptr": _contiguous(p.sinks), "out_ptr": out, "lse_ptr": lse,
        "CHUNKS": tiles.combined, "HAS_SINKS": p.sinks is not None, **shared,
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
