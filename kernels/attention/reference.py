"""The meaning of the attention room in float64: a mask written out pair by pair, and a softmax.

Needs memory for every (query, key) pair; differentiable by torch's own autograd.
"""

import torch


def philox_uniform(seed, head_row, query, key):
    """Uniform numbers in [0, 1): Philox4x32-10, keyed by the seed, one word for each key.

    word (key % 4) of counter (key // 4, query, head_row, 0); arguments broadcast, int64.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    low = 0xFFFFFFFF
    head_row, query, key = torch.broadcast_tensors(head_row, query, key)
    c0, c1, c2, c3 = key // 4, query.clone(), head_row.clone(), torch.zeros_like(key)
    k0, k1 = int(seed) & low, (int(seed) >> 32) & low
    for _ in range(10):
        # products of two 32-bit words may pass 2**63; the wrapped int64 has the right bits
        wide0, wide2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((wide2 >> 32) & low) ^ c1 ^ k0,
            wide2 & low,
            ((wide0 >> 32) & low) ^ c3 ^ k1,
            wide0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    word = torch.stack([c0, c1, c2, c3]).gather(0, (key % 4)[None])[0]
    return (word >> 8).double() / 2**24


def _documents(n, cu_seqlens):
    """Of each of n tokens: its document (-1 is none), its place there, that document's length."""
    token = torch.arange(n)
    if cu_seqlens is None:
        return torch.zeros_like(token), token, torch.full_like(token, n)
    # entry d is where document d starts; the last one stands for the tokens past all documents
    starts = cu_seqlens.long().cpu()
    document = torch.searchsorted(starts, token, right=True) - 1
    document = torch.where(document < len(starts) - 1, document, -1)
    lengths = torch.cat([starts.diff(), starts.new_zeros(1)])  # index -1 finds the zero
    return document, token - starts[document], lengths[document]


def visible_pairs(p):
    """Which key each query of each head sees: bool (B, H, Lq, Lk), from the problem record."""
    doc_q, pos_q, len_q = _documents(p.n_queries, p.cu_seqlens_q)
    doc_k, pos_k, _ = _documents(p.n_keys, p.cu_seqlens_k)
    if p.cu_seqlens_k is None:
        len_k = torch.full_like(pos_q, p.n_keys)
    else:
        lengths = p.cu_seqlens_k.long().cpu().diff()
        len_k = torch.cat([lengths, lengths.new_zeros(1)])[doc_q]

    j = pos_k[None, :]  # (1, Lk)
    i = (pos_q + len_k - len_q)[:, None]  # (Lq, 1): the last query stands at the last key
    visible = (doc_q[:, None] == doc_k[None, :]) & (doc_q >= 0)[:, None]
    if p.window_left >= 0:
        visible = visible & (j >= i - p.window_left)
    if p.window_right >= 0:
        visible = visible & (j <= i + p.window_right)
    visible = visible[None, None].expand(p.batch, p.n_heads, -1, -1)

    live = torch.ones(p.batch, p.n_keys, dtype=torch.bool)
    if p.key_mask is not None:
        live = p.key_mask.cpu()
    visible = visible & live[:, None, None, :]

    if not (p.group_size and p.wraparound):
        if p.is_causal:
            visible = visible & (j <= i)
    if p.group_size:
        first = torch.where(live.any(1), live.int().argmax(1), 0)[:, None, None, None]
        last = p.n_keys - torch.where(live.any(1), live.int().flip(1).argmax(1), 0)
        length = len_k[None, None, :, None] if p.key_mask is None else last[:, None, None, None]
        length = length - first
        head = torch.arange(p.n_heads)[None, :, None, None]
        shift = torch.where(head >= p.first_shifted_head, p.group_shift, 0)
        at_q, at_k = i - first, j - first
        if p.wraparound:
            inside = (at_q >= 0) & (at_q < length) & (at_k >= 0) & (at_k < length)
            rolled_q = (at_q - shift) % length.clamp(min=1)
            rolled_k = (at_k - shift) % length.clamp(min=1)
            visible = visible & inside & (rolled_q // p.group_size == rolled_k // p.group_size)
            if p.is_causal:
                visible = visible & (rolled_k <= rolled_q)
        else:
            group_q = torch.div(at_q + shift, p.group_size, rounding_mode="floor")
            group_k = torch.div(at_k + shift, p.group_size, rounding_mode="floor")
            visible = visible & (group_q == group_k)
    return visible


def dropout_factor(p):
    """0 for a dropped pair, 1 / (1 - dropout_p) for a kept one: (B, H, Lq, Lk)."""
    doc_q, pos_q, _ = _documents(p.n_queries, p.cu_seqlens_q)
    _, pos_k, _ = _documents(p.n_keys, p.cu_seqlens_k)
    row = doc_q[None, :] if p.cu_seqlens_q is not None else torch.arange(p.batch)[:, None]
    head_row = row[:, None, :, None] * p.n_heads + torch.arange(p.n_heads)[None, :, None, None]
    uniform = philox_uniform(
        p.dropout_seed.item(), head_row, pos_q[None, None, :, None], pos_k[None, None, None, :]
    )
    return (uniform >= p.dropout_p).double() / (1 - p.dropout_p)


def flash_attention(q, k, v, p):
    """out (B, Lq, H, Dv) and log-sum-exp (B, H, Lq), both float64."""
    q, k, v = (t.double() for t in (q, k, v))
    if p.key_mask is not None:  # a key that is not live may hold anything, NaN included
        k, v = (t.masked_fill(~p.key_mask[:, :, None, None], 0.0) for t in (k, v))
    k, v = (t.repeat_interleave(p.queries_per_kv_head, dim=2) for t in (k, v))
    scores = p.scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if p.softcap:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    visible = visible_pairs(p).to(scores.device)
    scores = scores.masked_fill(~visible, float("-inf"))

    terms = scores
    if p.sinks is not None:
        sinks = p.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        terms = torch.cat([scores, sinks], dim=-1)
    has_terms = (terms != float("-inf")).any(-1)  # (B, H, Lq); no key, no sink: out 0, lse -inf
    terms = torch.where(has_terms[..., None], terms, 0.0)
    lse = torch.where(has_terms, torch.logsumexp(terms, dim=-1), float("-inf"))

    weights = torch.exp(scores - lse.masked_fill(~has_terms, 0)[..., None])
    if p.dropout_p:
        weights = weights * dropout_factor(p).to(weights.device)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def flash_decode(q, k, v, p):
    """Each row's live keys are gathered, then it is `flash_attention`; results as there."""
    out = q.new_zeros(p.batch, p.n_queries, p.n_heads, v.shape[3], dtype=torch.float64)
    lse = q.new_zeros(p.batch, p.n_heads, p.n_queries, dtype=torch.float64)
    for row in range(p.batch):
        length = int(p.key_lengths[row])
        start = min(int(p.key_starts[row]), length)
        row_k, row_v = (_cache_row(t, p.page_table, row, length)[None, start:] for t in (k, v))
        # counted from their start, so that the row's queries stand at its last keys
        one = p.with_(batch=1, n_keys=length - start)
        out[row], lse[row] = (t[0] for t in flash_attention(q[row : row + 1], row_k, row_v, one))
    return out, lse


def _cache_row(cache, page_table, row, length):
    """The first `length` positions of one row: (length, Hkv, width)."""
    if page_table is None:
        return cache[row, :length]
    n_pages = -(-length // cache.shape[1])
    return cache[page_table[row, :n_pages].long()].flatten(0, 1)[:length]
