"""Decode: a few new queries against a long cache, with the keys cut into chunks of a fixed size.

A chunk's partial result (log-sum-exp and normalised output) is computed the same way whichever
program takes it, and the chunks of a row are combined in their own order: how many programs share
a row changes nothing, not even the last bit.
"""

import triton
import triton.language as tl

from tilewright.ops.attention.triton_tiles import (
    SIZES,
    exp_of_unit,
    from_unit,
    log_in_unit,
    tanh,
    to_unit,
)


@triton.jit
def row_of_cache(
    key_starts_ptr, key_lengths_ptr, batch, first_query, window_left, n_queries, n_slots
):  # fmt: skip
    """(first position that a query at or after first_query may see, the row's length)."""
    length = tl.minimum(tl.load(key_lengths_ptr + batch), n_slots)
    first = tl.maximum(tl.load(key_starts_ptr + batch), 0)
    # query i stands at position length - n_queries + i
    first = tl.maximum(first, length - n_queries + first_query - window_left)
    return first, length


@triton.jit(do_not_specialize=SIZES)
def attention_decode_kernel(
    q, k, v, page_table_ptr, key_starts_ptr, key_lengths_ptr, partial_ptr, partial_lse_ptr,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d,
    k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    table_stride_b, table_stride_p,
    n_queries, n_slots, n_heads, queries_per_kv_head, n_chunks, n_splits, n_packs,
    scale, softcap, window_left,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Partial softmax of every CHUNK cache positions: programs (split, pack of rows, kv head, b).

    q (B, Lq, H, D)   k, v (B, slots, Hkv, .) or with PAGE > 0 pages (N, PAGE, Hkv, .)
    partial (B, H, Lq, n_chunks, Dv) float32, normalised   partial_lse (B, H, Lq, n_chunks)

    The query heads of one kv head share its keys: row r of a pack is query r // (H / Hkv) of head
    r % (H / Hkv). Split s takes the chunks s, s + n_splits, ... of the row's own.
    """
    pid = tl.program_id(0)
    split = pid % n_splits
    pack = pid // n_splits % n_packs
    n_kv_heads = n_heads // queries_per_kv_head
    kv_head = pid // n_splits // n_packs % n_kv_heads
    batch = pid // n_splits // n_packs // n_kv_heads

    rows = pack * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = rows // queries_per_kv_head
    heads = kv_head * queries_per_kv_head + rows % queries_per_kv_head
    is_row = queries < n_queries
    first_query = pack * BLOCK_Q // queries_per_kv_head
    first, length = row_of_cache(
        key_starts_ptr, key_lengths_ptr, batch, first_query, window_left, n_queries, n_slots
    )  # fmt: skip
    position = length - n_queries + queries
    low = tl.maximum(position - window_left, tl.load(key_starts_ptr + batch))
    high = length + tl.zeros_like(queries)
    if IS_CAUSAL:
        high = position + 1

    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    q_offsets = (
        batch.to(tl.int64) * q_stride_b
        + (queries.to(tl.int64) * q_stride_t + heads.to(tl.int64) * q_stride_h)[:, None]
        + columns.to(tl.int64)[None, :] * q_stride_d
    )
    q_tile = tl.load(q + q_offsets, mask=is_row[:, None] & (columns < D)[None, :], other=0.0)
    wide: tl.constexpr = q.dtype.element_ty == tl.float32
    unit_scale = to_unit(scale, wide)
    unit_softcap = to_unit(softcap, wide)
    k_base = k + kv_head.to(tl.int64) * k_stride_h
    v_base = v + kv_head.to(tl.int64) * v_stride_h
    if PAGE == 0:
        k_base += batch.to(tl.int64) * k_stride_b
        v_base += batch.to(tl.int64) * v_stride_b
    out_row = (batch.to(tl.int64) * n_heads + heads) * n_queries + queries  # of (B, H, Lq)

    for chunk in range(first // CHUNK + split, (length + CHUNK - 1) // CHUNK, n_splits):
        m = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        l = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, BLOCK_DV), dtype=tl.float32)
        end = tl.minimum((chunk + 1) * CHUNK, length)
        for start in tl.range(chunk * CHUNK, end, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            inside = (keys < end) & (keys >= first)
            if PAGE > 0:
                pages = tl.load(
                    page_table_ptr
                    + batch.to(tl.int64) * table_stride_b
                    + (keys // PAGE).to(tl.int64) * table_stride_p,
                    mask=inside, other=0,
                ).to(tl.int64)  # fmt: skip
                slots = (keys % PAGE).to(tl.int64)
                k_rows = pages * k_stride_b + slots * k_stride_t
                v_rows = pages * v_stride_b + slots * v_stride_t
            else:
                k_rows = keys.to(tl.int64) * k_stride_t
                v_rows = keys.to(tl.int64) * v_stride_t
            k_tile = tl.load(
                k_base + k_rows[:, None] + columns.to(tl.int64)[None, :] * k_stride_d,
                mask=inside[:, None] & (columns < D)[None, :], other=0.0,
            )  # fmt: skip
            v_tile = tl.load(
                v_base + v_rows[:, None] + value_columns.to(tl.int64)[None, :] * v_stride_d,
                mask=inside[:, None] & (value_columns < DV)[None, :], other=0.0,
            )  # fmt: skip

            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if HAS_SOFTCAP:
                s = unit_softcap * tanh(s * (scale / softcap))
            else:
                s = s * unit_scale
            visible = (
                inside[None, :] & (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
            )
            s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # a row that has seen no key yet keeps m = -inf; -inf - -inf would be NaN
            pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = exp_of_unit(s - pivot[:, None], wide)
            alpha = exp_of_unit(m - pivot, wide)
            l = l * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            m = m_new

        is_empty = l == 0.0
        l = tl.where(is_empty, 1.0, l)
        lse = tl.where(is_empty, float("-inf"), m + log_in_unit(l, wide))
        place = out_row * n_chunks + chunk
        tl.store(partial_lse_ptr + place, lse, mask=is_row)
        tl.store(
            partial_ptr + place[:, None] * DV + value_columns[None, :],
            acc / l[:, None],
            mask=is_row[:, None] & (value_columns < DV)[None, :],
        )


@triton.jit(do_not_specialize=SIZES)
def attention_combine_kernel(
    partial_ptr, partial_lse_ptr, key_starts_ptr, key_lengths_ptr, sinks_ptr, out_ptr, lse_ptr,
    n_queries, n_slots, n_heads, queries_per_kv_head, n_chunks, window_left,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """out = sum_c exp(lse_c - lse) partial_c over a row's chunks in order: one program a row.

    partial (B, H, Lq, n_chunks, Dv)   out (B, Lq, H, Dv)   lse (B, H, Lq), natural logarithm
    """
    row = tl.program_id(0).to(tl.int64)
    query = (row % n_queries).to(tl.int32)
    head = (row // n_queries % n_heads).to(tl.int32)
    batch = row // n_queries // n_heads
    # the chunks that the decode kernel wrote: those of the pack that this row was in
    row_of_pack = query * queries_per_kv_head + head % queries_per_kv_head
    first_query = row_of_pack // BLOCK_Q * BLOCK_Q // queries_per_kv_head
    first, length = row_of_cache(
        key_starts_ptr, key_lengths_ptr, batch, first_query, window_left, n_queries, n_slots
    )  # fmt: skip
    begin = first // CHUNK
    end = (length + CHUNK - 1) // CHUNK
    columns = tl.arange(0, BLOCK_DV)

    wide: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    m = float("-inf")
    if HAS_SINKS:
        m = to_unit(tl.load(sinks_ptr + head).to(tl.float32), wide)
    sink = m
    for start in range(begin, end, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        lse = tl.load(
            partial_lse_ptr + row * n_chunks + chunks, mask=chunks < end, other=float("-inf")
        )
        m = tl.maximum(m, tl.max(lse, 0))
    pivot = tl.where(m == float("-inf"), 0.0, m)
    l = 0.0
    if HAS_SINKS:
        l = exp_of_unit(sink - pivot, wide)
    acc = tl.zeros((BLOCK_DV,), dtype=tl.float32)
    for start in range(begin, end, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        place = row * n_chunks + chunks
        inside = chunks < end
        lse = tl.load(partial_lse_ptr + place, mask=inside, other=float("-inf"))
        partial = tl.load(
            partial_ptr + place[:, None] * DV + columns[None, :],
            mask=inside[:, None] & (columns < DV)[None, :], other=0.0,
        )  # fmt: skip
        weight = exp_of_unit(lse - pivot, wide)
        l += tl.sum(weight, 0)
        acc += tl.sum(partial * weight[:, None], 0)

    is_empty = l == 0.0
    l = tl.where(is_empty, 1.0, l)
    out = acc / l
    target = out_ptr + ((batch * n_queries + query) * n_heads + head) * DV + columns
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(
        lse_ptr + row,
        tl.where(is_empty, float("-inf"), from_unit(pivot + log_in_unit(l, wide), wide)),
    )
