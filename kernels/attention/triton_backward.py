"""The backward kernels: row terms, then dQ by queries, and dK with dV by keys.

Each output element is summed by one program in a fixed order, so the gradients are bitwise the same
in every run; the price is that the scores are computed twice.

    P_ij = exp(s_ij - lse_i)      dP_ij = dO_i . v_j       dV_j = sum_i P_ij dO_i
    dS_ij = P_ij (dP_ij - delta_i + dlse_i)                delta_i = dO_i . O_i
    dQ_i = scale sum_j dS_ij k_j                           dK_j = scale sum_i dS_ij q_i
"""

import triton
import triton.language as tl

from tilewright.ops.attention.triton_forward import (
    key_intervals,
    key_tiles,
    live_keys,
    masked_tile,
    query_tile,
    visible_in_tile,
)
from tilewright.ops.attention.triton_tiles import (
    SIZES,
    WRAPPED,
    cut_tiles,
    document_bounds,
    exp_of_unit,
    find_document,
    load_rows,
    queries_of_key,
    rolled_interval,
    store_rows,
    tanh,
    to_unit,
    uncounted_one,
    union,
)
from tilewright.ops.common.triton_dropout import is_kept, is_kept_by_column


@triton.jit
def terms_origin(document, q_origin, IS_PACKED: tl.constexpr):
    """Where a document's row terms begin: a multiple of 4, as the copy engine wants.

    Rounding q_origin down loses up to 3 places and the next document gains 4, so none overlap.
    """
    origin = 0
    if IS_PACKED:
        origin = q_origin // 4 * 4 + 4 * (document + 1)
    return origin


@triton.jit(do_not_specialize=SIZES)
def attention_row_terms_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, terms_ptr, cu_q_ptr,
    dout_stride_b, dout_stride_t, dout_stride_h, dout_stride_d,
    dlse_stride_b, dlse_stride_h, dlse_stride_t,
    n_queries, n_heads, n_documents, n_steps, n_rows, terms_pitch, n_slots,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, IS_PACKED: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """terms[0] = lse in the unit of scores, +inf for -inf, so that P is 0; terms[1] = dO . O - dlse

    out (B, Lq, H, Dv) contiguous   dout, dlse any strides   terms (2, B H, pitch) float32
    """
    pid = tl.program_id(0)
    slot = pid % n_slots
    head = pid // n_slots % n_heads
    batch = pid // n_slots // n_heads
    if IS_PACKED:
        document, tile = find_document(slot, cu_q_ptr, n_documents, n_steps, BLOCK_Q)
        q_origin, q_length = document_bounds(document, cu_q_ptr, n_documents, n_queries)
    else:
        document, tile, q_origin, q_length = batch, slot, 0, n_queries
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_DV)
    inside = queries < q_length
    whole = inside[:, None] & (columns < DV)[None, :]
    tokens = (q_origin + queries).to(tl.int64)
    row = batch.to(tl.int64) * n_heads + head

    out_offsets = ((batch.to(tl.int64) * n_queries + tokens) * n_heads + head)[:, None] * DV
    dout_base = batch.to(tl.int64) * dout_stride_b + head.to(tl.int64) * dout_stride_h
    dout_offsets = (
        dout_base + tokens[:, None] * dout_stride_t + columns.to(tl.int64)[None, :] * dout_stride_d
    )
    out = tl.load(out_ptr + out_offsets + columns[None, :], mask=whole, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + dout_offsets, mask=whole, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row * n_queries + tokens, mask=inside, other=0.0)

    wide: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        dlse_base = batch.to(tl.int64) * dlse_stride_b + head.to(tl.int64) * dlse_stride_h
        dlse = tl.load(dlse_ptr + dlse_base + tokens * dlse_stride_t, mask=inside, other=0.0)
        delta -= dlse.to(tl.float32)
    lse = tl.where(lse == float("-inf"), float("inf"), to_unit(lse, wide))

    terms = terms_ptr + row * terms_pitch + terms_origin(document, q_origin, IS_PACKED) + queries
    tl.store(terms, lse, mask=inside)
    tl.store(terms + n_rows * terms_pitch, delta, mask=inside)


@triton.jit
def load_terms(
    source, which, row, origin, query, limit, n_rows, pitch,
    ROWS: tl.constexpr, BY_DESCRIPTOR: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """terms[which, row, origin + [query, query + ROWS)], from a pointer or a descriptor.

    With CHECK, queries from `limit` on read as 0: they may belong to another document.
    """
    queries = query + tl.arange(0, ROWS)
    if BY_DESCRIPTOR:
        terms = source.load([which, row, origin + query]).reshape(ROWS)
        if CHECK:
            terms = tl.where(queries < limit, terms, 0.0)
    else:
        pointers = source + (which * n_rows + row.to(tl.int64)) * pitch + origin + queries
        if CHECK:
            terms = tl.load(pointers, mask=queries < limit, other=0.0)
        else:
            terms = tl.load(pointers)
    return terms


@triton.jit(do_not_specialize=SIZES)
def attention_dq_kernel(
    q, k, v, dout, terms_ptr, dq, cu_q_ptr, cu_k_ptr, live_ptr, key_mask_ptr, seed_ptr,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d,
    k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    dout_stride_b, dout_stride_t, dout_stride_h, dout_stride_d,
    n_queries, n_keys, n_heads, queries_per_kv_head, n_documents, n_steps, n_rows, terms_pitch,
    n_slots,
    scale, softcap, left, right, group, group_shift, first_shifted_head, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_WIDE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """dq[i] = scale sum_j dS_ij k[j]: one program owns a tile of queries, as in the forward.

    q (B, Lq, H, D)   k (B, Lk, Hkv, D)   v (B, Lk, Hkv, Dv)   dout (B, Lq, H, Dv)   any strides
    dq (B, Lq, H, D) contiguous   terms (2, B H, pitch)
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
    check: tl.constexpr = by_pointer or IS_PACKED or HAS_KEY_MASK
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
    dout_tile = load_rows(
        dout, batch, head, q_origin, start, queries < q_length,
        dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
        BLOCK_Q, DV, BLOCK_DV, BY_DESCRIPTOR, by_pointer,
    )  # fmt: skip
    row = batch * n_heads + head
    origin = terms_origin(document, q_origin, IS_PACKED)
    lse = load_terms(terms_ptr, 0, row, origin, start, q_length, n_rows, terms_pitch,
                     BLOCK_Q, False, True)  # fmt: skip
    delta = load_terms(terms_ptr, 1, row, origin, start, q_length, n_rows, terms_pitch,
                       BLOCK_Q, False, True)  # fmt: skip
    acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)

    for _ in range(0, uncounted_one(n_heads)):
        # the core: every query of the tile sees every key
        core_begin = low_min + n_before * BLOCK_K
        for key in tl.range(core_begin, core_begin + n_core * BLOCK_K, BLOCK_K):
            k_tile = load_rows(
                k, batch, kv_head, k_origin, key, None,
                k_stride_b, k_stride_h, k_stride_t, k_stride_d,
                BLOCK_K, D, BLOCK_D, BY_DESCRIPTOR, False,
            )  # fmt: skip
            v_tile = load_rows(
                v, batch, kv_head, k_origin, key, None,
                v_stride_b, v_stride_h, v_stride_t, v_stride_d,
                BLOCK_K, DV, BLOCK_DV, BY_DESCRIPTOR, False,
            )  # fmt: skip
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            if HAS_SOFTCAP:
                capped = tanh(s * (scale / softcap))
                p = exp_of_unit(unit_softcap * capped - lse[:, None], IS_WIDE)
            else:
                p = exp_of_unit(s * unit_scale - lse[:, None], IS_WIDE)
            if HAS_DROPOUT:
                kept = is_kept(seed, head_row, queries, key, threshold, BLOCK_K)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if HAS_SOFTCAP:
                ds = ds * (1.0 - capped * capped)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

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
            k_tile = load_rows(
                k, batch, kv_head, k_origin, key, is_live,
                k_stride_b, k_stride_h, k_stride_t, k_stride_d,
                BLOCK_K, D, BLOCK_D, BY_DESCRIPTOR, check,
            )  # fmt: skip
            v_tile = load_rows(
                v, batch, kv_head, k_origin, key, keys < k_length,
                v_stride_b, v_stride_h, v_stride_t, v_stride_d,
                BLOCK_K, DV, BLOCK_DV, BY_DESCRIPTOR, by_pointer,
            )  # fmt: skip
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            visible = visible_in_tile(keys, low, high, far_low, far_high, is_far, SEGMENTS)
            if HAS_KEY_MASK:
                visible = visible & is_live[None, :]
            if HAS_SOFTCAP:
                capped = tanh(s * (scale / softcap))
                s = unit_softcap * capped
            else:
                s = s * unit_scale
            p = exp_of_unit(tl.where(visible, s - lse[:, None], float("-inf")), IS_WIDE)
            if HAS_DROPOUT:
                kept = is_kept(seed, head_row, queries, key, threshold, BLOCK_K)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if HAS_SOFTCAP:
                ds = ds * (1.0 - capped * capped)
            if IS_PACKED or HAS_KEY_MASK:  # a hidden key's value may have been in it
                ds = tl.where(visible, ds, 0.0)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    token = batch.to(tl.int64) * n_queries + q_origin + start
    store_rows(
        dq, acc * scale, batch, head, start, q_length, token, n_heads,
        BLOCK_Q, D, BLOCK_D, BY_DESCRIPTOR and not IS_PACKED,
    )  # fmt: skip


@triton.jit
def key_tile(
    cu_q_ptr, cu_k_ptr, live_ptr, n_queries, n_keys, n_kv_heads, n_documents, n_steps, n_slots,
    BLOCK_K: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """What the program's number says: the batch row, head, tile and document of its keys.

    The first tiles, which the most queries see when causal, go first.
    """
    pid = tl.program_id(0)
    slot = pid % n_slots
    kv_head = pid // n_slots % n_kv_heads
    batch = pid // n_slots // n_kv_heads
    if IS_PACKED:
        document, tile = find_document(slot, cu_k_ptr, n_documents, n_steps, BLOCK_K)
        q_origin, q_length = document_bounds(document, cu_q_ptr, n_documents, n_queries)
        k_origin, k_length = document_bounds(document, cu_k_ptr, n_documents, n_keys)
        q_length = tl.where((document >= 0) & (document < n_documents), q_length, 0)
    else:
        document, tile = batch, slot
        q_origin, q_length = 0, n_queries
        k_origin, k_length = 0, n_keys
    first, last = 0, k_length
    if HAS_KEY_MASK:
        first = tl.load(live_ptr + batch * 3)
        last = tl.load(live_ptr + batch * 3 + 1)
    return (
        batch, kv_head, document, tile * BLOCK_K, q_origin, q_length, k_origin, k_length,
        first, last,
    )  # fmt: skip


@triton.jit
def query_tiles(
    start, q_length, k_length, first, last, left, right, group, shift,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The tiles of queries that the keys [start, start + BLOCK_K) of a document are seen by.

    Returns the same as `key_tiles`, with the roles exchanged. Keys outside the live range take the
    place of the nearest live key: their own sums are thrown away in the end.
    """
    offset = k_length - q_length
    keys = tl.minimum(tl.maximum(start + tl.arange(0, BLOCK_K), first), last - 1)
    far_low, far_high = keys, keys
    far_begin, n_far = 0, 0
    if SEGMENTS == WRAPPED:
        low, high, far_low, far_high = rolled_interval(
            keys - first, last - first, group, shift, IS_CAUSAL, False
        )
        # to query numbers; wraparound has as many queries as keys
        low, high, far_low, far_high = low + first, high + first, far_low + first, far_high + first
        low_min, high_max = union(low, high)
        low_max, high_min = tl.max(low, 0), tl.min(high, 0)
        far_begin, far_end = union(far_low, far_high)
        far_begin = far_begin // 4 * 4
        n_far = (far_end - far_begin + BLOCK_Q - 1) // BLOCK_Q
    else:
        low, high = queries_of_key(
            keys, first, offset, q_length, left, right, group, shift, SEGMENTS
        )
        begin = tl.maximum(start, first)
        end = tl.minimum(start + BLOCK_K, last) - 1
        low_min, high_min = queries_of_key(
            begin, first, offset, q_length, left, right, group, shift, SEGMENTS
        )
        low_max, high_max = queries_of_key(
            end, first, offset, q_length, left, right, group, shift, SEGMENTS
        )
        high_max = tl.where(begin <= end, high_max, 0)
        low_min = tl.where(begin <= end, low_min, 0)
    low_min = low_min // 4 * 4  # as terms_origin
    n_near, n_before, n_core = cut_tiles(low_min, low_max, high_min, high_max, BLOCK_Q)
    return low, high, far_low, far_high, low_min, n_near, n_before, n_core, far_begin, n_far


@triton.jit(do_not_specialize=SIZES)
def attention_dkv_kernel(
    q, k, v, dout, terms, dk_target, dv_target,
    cu_q_ptr, cu_k_ptr, live_ptr, key_mask_ptr, seed_ptr,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d,
    k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    dout_stride_b, dout_stride_t, dout_stride_h, dout_stride_d,
    n_queries, n_keys, n_heads, queries_per_kv_head, n_documents, n_steps, n_rows, terms_pitch,
    n_slots,
    scale, softcap, left, right, group, group_shift, first_shifted_head, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_WIDE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr,
):  # fmt: skip
    """dk[j] = scale sum_i dS_ij q[i], dv[j] = sum_i P_ij dout[i], over a kv head's query heads.

    q (B, Lq, H, D)   k (B, Lk, Hkv, D)   v (B, Lk, Hkv, Dv)   dout (B, Lq, H, Dv)   any strides
    dk (B, Lk, Hkv, D), dv (B, Lk, Hkv, Dv) contiguous   terms (2, B H, pitch)

    One program owns a tile of keys. Scores are held transposed, (keys, queries), so that P and dS
    are the left operands of both sums as they stand. Rows too wide for two accumulators take two
    launches, WANTS_DK and WANTS_DV.
    """
    n_kv_heads = n_heads // queries_per_kv_head
    (
        batch, kv_head, document, start, q_origin, q_length, k_origin, k_length, first, last
    ) = key_tile(
        cu_q_ptr, cu_k_ptr, live_ptr, n_queries, n_keys, n_kv_heads, n_documents, n_steps, n_slots,
        BLOCK_K, IS_PACKED, HAS_KEY_MASK,
    )  # fmt: skip
    if start >= k_length:
        return
    by_pointer: tl.constexpr = not BY_DESCRIPTOR
    unit_scale = to_unit(scale, IS_WIDE)
    unit_softcap = to_unit(softcap, IS_WIDE)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    inside = start + tl.arange(0, BLOCK_K) < k_length
    k_tile = load_rows(
        k, batch, kv_head, k_origin, start, inside,
        k_stride_b, k_stride_h, k_stride_t, k_stride_d,
        BLOCK_K, D, BLOCK_D, BY_DESCRIPTOR, by_pointer,
    )  # fmt: skip
    if WANTS_DK:
        v_tile = load_rows(
            v, batch, kv_head, k_origin, start, inside,
            v_stride_b, v_stride_h, v_stride_t, v_stride_d,
            BLOCK_K, DV, BLOCK_DV, BY_DESCRIPTOR, by_pointer,
        )  # fmt: skip
    origin = terms_origin(document, q_origin, IS_PACKED)
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_DV), dtype=tl.float32)

    for head_of_group in range(0, queries_per_kv_head):
        head = kv_head * queries_per_kv_head + head_of_group
        shift = tl.where(head >= first_shifted_head, group_shift, 0)
        (
            low, high, far_low, far_high, low_min, n_near, n_before, n_core, far_begin, n_far
        ) = query_tiles(
            start, q_length, k_length, first, last, left, right, group, shift,
            BLOCK_Q, BLOCK_K, SEGMENTS, IS_CAUSAL,
        )  # fmt: skip
        row = batch * n_heads + head
        head_row = document * n_heads + head

        # the core: every query sees every key of the tile
        core_begin = low_min + n_before * BLOCK_Q
        for query in tl.range(core_begin, core_begin + n_core * BLOCK_Q, BLOCK_Q):
            queries = query + tl.arange(0, BLOCK_Q)
            q_tile = load_rows(
                q, batch, head, q_origin, query, None,
                q_stride_b, q_stride_h, q_stride_t, q_stride_d,
                BLOCK_Q, D, BLOCK_D, BY_DESCRIPTOR, False,
            )  # fmt: skip
            dout_tile = load_rows(
                dout, batch, head, q_origin, query, None,
                dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
                BLOCK_Q, DV, BLOCK_DV, BY_DESCRIPTOR, False,
            )  # fmt: skip
            lse = load_terms(terms, 0, row, origin, query, q_length, n_rows, terms_pitch,
                             BLOCK_Q, BY_DESCRIPTOR, False)  # fmt: skip
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            if HAS_SOFTCAP:
                capped = tanh(s * (scale / softcap))
                p = exp_of_unit(unit_softcap * capped - lse[None, :], IS_WIDE)
            else:
                p = exp_of_unit(s * unit_scale - lse[None, :], IS_WIDE)
            if HAS_DROPOUT:
                kept = is_kept_by_column(seed, head_row, start, queries, threshold, BLOCK_K)
            if WANTS_DV:
                p_kept = tl.where(kept, p * keep_scale, 0.0) if HAS_DROPOUT else p
                dv = tl.dot(p_kept.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            if WANTS_DK:
                dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                if HAS_DROPOUT:
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                delta = load_terms(terms, 1, row, origin, query, q_length, n_rows, terms_pitch,
                                   BLOCK_Q, BY_DESCRIPTOR, False)  # fmt: skip
                ds = p * (dp - delta[None, :])
                if HAS_SOFTCAP:
                    ds = ds * (1.0 - capped * capped)
                dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")

        # the tiles that cross an end, and those of the far interval
        for index in tl.range(0, n_near - n_core + n_far):
            query, is_far = masked_tile(
                index, low_min, n_near, n_before, n_core, far_begin, BLOCK_Q, SEGMENTS
            )
            queries = query + tl.arange(0, BLOCK_Q)
            q_tile = load_rows(
                q, batch, head, q_origin, query, queries < q_length,
                q_stride_b, q_stride_h, q_stride_t, q_stride_d,
                BLOCK_Q, D, BLOCK_D, BY_DESCRIPTOR, by_pointer or (IS_PACKED and WANTS_DK),
            )  # fmt: skip
            dout_tile = load_rows(
                dout, batch, head, q_origin, query, queries < q_length,
                dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
                BLOCK_Q, DV, BLOCK_DV, BY_DESCRIPTOR, by_pointer or (IS_PACKED and WANTS_DV),
            )  # fmt: skip
            lse = load_terms(terms, 0, row, origin, query, q_length, n_rows, terms_pitch,
                             BLOCK_Q, BY_DESCRIPTOR, by_pointer)  # fmt: skip
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            if HAS_SOFTCAP:
                capped = tanh(s * (scale / softcap))
                s = unit_softcap * capped
            else:
                s = s * unit_scale
            if SEGMENTS == WRAPPED:
                low_here = tl.where(is_far, far_low, low)
                high_here = tl.where(is_far, far_high, high)
            else:
                low_here, high_here = low, high
            visible = (queries[None, :] >= low_here[:, None]) & (
                queries[None, :] < high_here[:, None]
            )
            p = exp_of_unit(tl.where(visible, s - lse[None, :], float("-inf")), IS_WIDE)
            if HAS_DROPOUT:
                kept = is_kept_by_column(seed, head_row, start, queries, threshold, BLOCK_K)
            if WANTS_DV:
                p_kept = tl.where(kept, p * keep_scale, 0.0) if HAS_DROPOUT else p
                dv = tl.dot(p_kept.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            if WANTS_DK:
                dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                if HAS_DROPOUT:
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                delta = load_terms(terms, 1, row, origin, query, q_length, n_rows, terms_pitch,
                                   BLOCK_Q, BY_DESCRIPTOR, by_pointer)  # fmt: skip
                ds = p * (dp - delta[None, :])
                if HAS_SOFTCAP:
                    ds = ds * (1.0 - capped * capped)
                if IS_PACKED:  # another document's dout or delta may have been in it
                    ds = tl.where(visible, ds, 0.0)
                dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")

    dk = dk * scale
    if HAS_KEY_MASK:
        mask_row_ptr = key_mask_ptr + batch.to(tl.int64) * n_keys
        is_live = live_keys(start + tl.arange(0, BLOCK_K), mask_row_ptr, last)
        dk = tl.where(is_live[:, None], dk, 0.0)
        dv = tl.where(is_live[:, None], dv, 0.0)
    token = batch.to(tl.int64) * n_keys + k_origin + start
    if WANTS_DK:
        store_rows(
            dk_target, dk, batch, kv_head, start, k_length, token, n_kv_heads,
            BLOCK_K, D, BLOCK_D, BY_DESCRIPTOR and not IS_PACKED,
        )  # fmt: skip
    if WANTS_DV:
        store_rows(
            dv_target, dv, batch, kv_head, start, k_length, token, n_kv_heads,
            BLOCK_K, DV, BLOCK_DV, BY_DESCRIPTOR and not IS_PACKED,
        )  # fmt: skip
