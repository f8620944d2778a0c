"""The forward kernel: one program owns a tile of queries of one head and walks their keys."""

import triton
import triton.language as tl

from tilewright.ops.attention.triton_tiles import (
    SIZES,
    WRAPPED,
    cut_tiles,
    document_bounds,
    exp_of_unit,
    find_document,
    from_unit,
    keys_of_query,
    load_rows,
    log_in_unit,
    rolled_interval,
    store_rows,
    tanh,
    to_unit,
    uncounted_one,
    union,
)
from tilewright.ops.common.triton_dropout import is_kept


@triton.jit(do_not_specialize=SIZES)
def live_range_kernel(key_mask_ptr, live_ptr, n_keys, BLOCK: tl.constexpr):
    """live[b] = (first live key, last + 1, number of live keys); (0, 0, 0) if there is none.

    key_mask (B, Lk) bytes, contiguous   live (B, 3) int32
    """
    row = tl.program_id(0)
    first = n_keys
    last = 0
    count = 0
    for start in range(0, n_keys, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        is_live = live_keys(keys, key_mask_ptr + row.to(tl.int64) * n_keys, n_keys)
        first = tl.minimum(first, tl.min(tl.where(is_live, keys, n_keys), 0))
        last = tl.maximum(last, tl.max(tl.where(is_live, keys + 1, 0), 0))
        count += tl.sum(is_live.to(tl.int32), 0)
    tl.store(live_ptr + row * 3, tl.minimum(first, last))
    tl.store(live_ptr + row * 3 + 1, last)
    tl.store(live_ptr + row * 3 + 2, count)


@triton.jit
def query_tile(
    cu_q_ptr, cu_k_ptr, live_ptr, n_queries, n_keys, n_heads, n_documents, n_steps, n_slots,
    BLOCK_Q: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """What the program's number says: the batch row, head, tile and document of its queries.

    The last tiles, the longest when causal, go first, so that the short ones fill the end.
    """
    pid = tl.program_id(0)
    slot = n_slots - 1 - pid % n_slots
    head = pid // n_slots % n_heads
    batch = pid // n_slots // n_heads
    if IS_PACKED:
        document, tile = find_document(slot, cu_q_ptr, n_documents, n_steps, BLOCK_Q)
        q_origin, q_length = document_bounds(document, cu_q_ptr, n_documents, n_queries)
        k_origin, k_length = document_bounds(document, cu_k_ptr, n_documents, n_keys)
        k_length = tl.where((document >= 0) & (document < n_documents), k_length, 0)
    else:
        document, tile = batch, slot
        q_origin, q_length = 0, n_queries
        k_origin, k_length = 0, n_keys
    first, last, has_holes = 0, k_length, False
    if HAS_KEY_MASK:
        first = tl.load(live_ptr + batch * 3)
        last = tl.load(live_ptr + batch * 3 + 1)
        has_holes = tl.load(live_ptr + batch * 3 + 2) != last - first
    return (
        batch, head, document, tile * BLOCK_Q, q_origin, q_length, k_origin, k_length,
        first, last, has_holes,
    )  # fmt: skip


@triton.jit
def key_intervals(
    start, q_length, k_length, first, last, left, right, group, shift,
    BLOCK_Q: tl.constexpr, SEGMENTS: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The keys that each of the queries [start, start + BLOCK_Q) of a document sees: its interval
    (low, high) and its far interval (wraparound only)."""
    # rows past the document's end repeat its last one, so that they widen nothing
    queries = tl.minimum(start + tl.arange(0, BLOCK_Q), q_length - 1) + k_length - q_length
    if SEGMENTS == WRAPPED:
        low, high, far_low, far_high = rolled_interval(
            queries - first, last - first, group, shift, IS_CAUSAL, True
        )
        low, high, far_low, far_high = low + first, high + first, far_low + first, far_high + first
    else:
        low, high = keys_of_query(queries, first, last, left, right, group, shift, SEGMENTS)
        far_low, far_high = low, high
    return low, high, far_low, far_high


@triton.jit
def key_tiles(
    start, q_length, k_length, first, last, has_holes, left, right, group, shift,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, KEY_STEP: tl.constexpr,
):  # fmt: skip
    """The tiles of keys that the queries [start, start + BLOCK_Q) of a document visit.

    Returns where the tiles begin, a multiple of KEY_STEP, how many there are (n_near), how many lie
    before the unmasked core and in it, and the begin and number of the far tiles.
    """
    far_begin, n_far = 0, 0
    if SEGMENTS == WRAPPED:
        low, high, far_low, far_high = key_intervals(
            start, q_length, k_length, first, last, left, right, group, shift,
            BLOCK_Q, SEGMENTS, IS_CAUSAL,
        )  # fmt: skip
        low_min, high_max = union(low, high)
        low_max, high_min = tl.max(low, 0), tl.min(high, 0)
        far_begin, far_end = union(far_low, far_high)
        far_begin = far_begin // KEY_STEP * KEY_STEP
        n_far = (far_end - far_begin + BLOCK_K - 1) // BLOCK_K
    else:
        # both ends rise with the query: the first and the last one bound the tile
        offset = k_length - q_length
        low_min, high_min = keys_of_query(
            start + offset, first, last, left, right, group, shift, SEGMENTS
        )
        end = tl.minimum(start + BLOCK_Q, q_length) - 1 + offset
        low_max, high_max = keys_of_query(end, first, last, left, right, group, shift, SEGMENTS)
    low_min = low_min // KEY_STEP * KEY_STEP
    n_near, n_before, n_core = cut_tiles(low_min, low_max, high_min, high_max, BLOCK_K)
    n_core = tl.where(has_holes, 0, n_core)
    return low_min, n_near, n_before, n_core, far_begin, n_far


@triton.jit
def masked_tile(
    index, low_min, n_near, n_before, n_core, far_begin, BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """(first key, is it a far tile) of the index-th tile outside the core."""
    number = index + tl.where(index >= n_before, n_core, 0)
    key = low_min + number * BLOCK_K
    is_far = number >= n_near
    if SEGMENTS == WRAPPED:
        key = tl.where(is_far, far_begin + (number - n_near) * BLOCK_K, key)
    return key, is_far


@triton.jit
def live_keys(keys, mask_row_ptr, last):
    """Which keys key_mask shows. The others may hold NaN, which a zero weight lets through."""
    return tl.load(mask_row_ptr + keys, mask=keys < last, other=0) != 0


@triton.jit
def visible_in_tile(keys, low, high, far_low, far_high, is_far, SEGMENTS: tl.constexpr):
    """Which (query, key) pairs of a masked tile lie in the queries' intervals."""
    if SEGMENTS == WRAPPED:
        low = tl.where(is_far, far_low, low)
        high = tl.where(is_far, far_high, high)
    return (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q, k, v, out, lse_ptr, cu_q_ptr, cu_k_ptr, live_ptr, key_mask_ptr, sinks_ptr, seed_ptr,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d,
    k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    n_queries, n_keys, n_heads, queries_per_kv_head, n_documents, n_steps, n_slots,
    scale, softcap, left, right, group, group_shift, first_shifted_head, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    IS_WIDE: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """out[i] = sum_j softmax(scale q[i] . k[j]) v[j], lse[i] = log sum_j exp(scale q[i] . k[j])

    q (B, Lq, H, D)   k (B, Lk, Hkv, D)   v (B, Lk, Hkv, Dv)   any strides
    out (B, Lq, H, Dv) contiguous   lse (B, H, Lq) float32

    Online softmax: m is the running maximum of the scaled scores, l the sum of exp(score - m), acc
    the same sum over v. The unit of scores and of m is that of `to_unit`.
    """
    (
        batch, head, document, start, q_origin, q_length, k_origin, k_length, first, last, has_holes
    ) = query_tile(
        cu_q_ptr, cu_k_ptr, live_ptr, n_queries, n_keys, n_heads, n_documents, n_steps, n_slots,
        BLOCK_Q, IS_PACKED, HAS_KEY_MASK,
    )  # fmt: skip
    if start >= q_length:
        return
    kv_head = head // queries_per_kv_head
    shift = tl.where(head >= first_shifted_head, group_shift, 0)
    low_min, n_near, n_before, n_core, far_begin, n_far = key_tiles(
        start, q_length, k_length, first, last, has_holes, left, right, group, shift,
        BLOCK_Q, BLOCK_K, SEGMENTS, IS_CAUSAL, 4 if HAS_DROPOUT else 1,
    )  # fmt: skip
    by_pointer: tl.constexpr = not BY_DESCRIPTOR
    unit_scale = to_unit(scale, IS_WIDE)
    unit_softcap = to_unit(softcap, IS_WIDE)
    queries = start + tl.arange(0, BLOCK_Q)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    head_row = document * n_heads + head
    mask_row_ptr = key_mask_ptr
    if HAS_KEY_MASK:
        mask_row_ptr = key_mask_ptr + batch.to(tl.int64) * n_keys

    q_tile = load_rows(
        q, batch, head, q_origin, start, queries < q_length,
        q_stride_b, q_stride_h, q_stride_t, q_stride_d,
        BLOCK_Q, D, BLOCK_D, BY_DESCRIPTOR, by_pointer,
    )  # fmt: skip
    m = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), dtype=tl.float32)

    for _ in range(0, uncounted_one(n_heads)):
        # the core: every query of the tile sees every key
        core_begin = low_min + n_before * BLOCK_K
        for key in tl.range(core_begin, core_begin + n_core * BLOCK_K, BLOCK_K):
            k_tile = load_rows(
                k, batch, kv_head, k_origin, key, None,
                k_stride_b, k_stride_h, k_stride_t, k_stride_d,
                BLOCK_K, D, BLOCK_D, BY_DESCRIPTOR, False,
            )  # fmt: skip
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if HAS_SOFTCAP:
                s = unit_softcap * tanh(s * (scale / softcap))
                m_new = tl.maximum(m, tl.max(s, 1))
                p = exp_of_unit(s - m_new[:, None], IS_WIDE)
            else:
                # one multiply-add per score: unit_scale >= 0, so the maximum commutes with it
                m_new = tl.maximum(m, tl.max(s, 1) * unit_scale)
                p = exp_of_unit(s * unit_scale - m_new[:, None], IS_WIDE)
            alpha = exp_of_unit(m - m_new, IS_WIDE)
            l = l * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            if HAS_DROPOUT:
                kept = is_kept(seed, head_row, queries, key, threshold, BLOCK_K)
                p = tl.where(kept, p, 0.0)
            v_tile = load_rows(
                v, batch, kv_head, k_origin, key, None,
                v_stride_b, v_stride_h, v_stride_t, v_stride_d,
                BLOCK_K, DV, BLOCK_DV, BY_DESCRIPTOR, False,
            )  # fmt: skip
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            m = m_new

        # the tiles that cross an end, and those of the far interval
        low, high, far_low, far_high = key_intervals(
            start, q_length, k_length, first, last, left, right, group, shift,
            BLOCK_Q, SEGMENTS, IS_CAUSAL,
        )  # fmt: skip
        for index in tl.range(0, n_near - n_core + n_far):
            key, is_far = masked_tile(
                index, low_min, n_near, n_before, n_core, far_begin, BLOCK_K, SEGMENTS
            )
            keys = key + tl.arange(0, BLOCK_K)
            is_live = keys < k_length
            if HAS_KEY_MASK:
                is_live = live_keys(keys, mask_row_ptr, last)
            # whatever a hidden key holds, its scores are replaced
            k_tile = load_rows(
                k, batch, kv_head, k_origin, key, keys < k_length,
                k_stride_b, k_stride_h, k_stride_t, k_stride_d,
                BLOCK_K, D, BLOCK_D, BY_DESCRIPTOR, by_pointer,
            )  # fmt: skip
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if HAS_SOFTCAP:
                s = unit_softcap * tanh(s * (scale / softcap))
            else:
                s = s * unit_scale
            visible = visible_in_tile(keys, low, high, far_low, far_high, is_far, SEGMENTS)
            if HAS_KEY_MASK:
                visible = visible & is_live[None, :]
            s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # a row that has seen no key yet keeps m = -inf; -inf - -inf would be NaN
            pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = exp_of_unit(s - pivot[:, None], IS_WIDE)
            alpha = exp_of_unit(m - pivot, IS_WIDE)
            l = l * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            if HAS_DROPOUT:
                kept = is_kept(seed, head_row, queries, key, threshold, BLOCK_K)
                p = tl.where(kept, p, 0.0)
            v_tile = load_rows(
                v, batch, kv_head, k_origin, key, is_live,
                v_stride_b, v_stride_h, v_stride_t, v_stride_d,
                BLOCK_K, DV, BLOCK_DV, BY_DESCRIPTOR, by_pointer or IS_PACKED or HAS_KEY_MASK,
            )  # fmt: skip
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            m = m_new

    if HAS_SINKS:
        sink = to_unit(tl.load(sinks_ptr + head).to(tl.float32), IS_WIDE)
        m_new = tl.maximum(m, sink)
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = exp_of_unit(m - pivot, IS_WIDE)
        l = l * alpha + exp_of_unit(sink - pivot, IS_WIDE)
        acc = acc * alpha[:, None]
        m = m_new
    is_empty = l == 0.0
    l = tl.where(is_empty, 1.0, l)
    acc = acc * (keep_scale / l)[:, None]
    lse = tl.where(is_empty, float("-inf"), from_unit(m + log_in_unit(l, IS_WIDE), IS_WIDE))
    token = batch.to(tl.int64) * n_queries + q_origin + start
    store_rows(
        out, acc, batch, head, start, q_length, token, n_heads,
        BLOCK_Q, DV, BLOCK_DV, BY_DESCRIPTOR and not IS_PACKED,
    )  # fmt: skip
    lse_offset = (batch.to(tl.int64) * n_heads + head) * n_queries + q_origin
    tl.store(lse_ptr + lse_offset + queries, lse, mask=queries < q_length)
