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
    """For each of n tokens: its document, its position there, and that document's length."""
    token = torch.arange(n)
    if cu_seqlens is None:
        return torch.zeros_like(token), token, torch.full_like(token, n)
    ends = cu_seqlens.long().cpu()
    document = torch.searchsorted(ends[1:].contiguous(), token, right=True)
    document_or_last = document.clamp(max=len(ends) - 2)
    start = ends[document_or_last]
    return document, token - start, ends[document_or_last + 1] - start


def visible_pairs(p):
    """Which key each query of each head sees: bool (B, H, Lq, Lk), from the problem record."""
    doc_q, pos_q, len_q = _documents(p.n_queries, p.cu_seqlens_q)
    doc_k, pos_k, _ = _documents(p.n_keys, p.cu_seqlens_k)
    if p.cu_seqlens_k is None:
        len_k = torch.full_like(pos_q, p.n_keys)
    else:
        lengths = p.cu_seqlens_k.long().cpu().diff()
        len_k = lengths[doc_q.clamp(max=len(lengths) - 1)]

    j = pos_k[None, :]  # (1, Lk)
    i = (pos_q + len_k - len_q)[:, None]  # (Lq, 1): the last query stands at the last key
    visible = doc_q[:, None] == doc_k[None, :]
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
    has_terms = torch.isfinite(terms).any(-1)  # (B, H, Lq); no key and no sink: out 0, lse -inf
    terms = torch.where(has_terms[..., None], terms, 0.0)
    lse = torch.where(has_terms, torch.logsumexp(terms, dim=-1), float("-inf"))

    weights = torch.exp(torch.where(visible, scores, 0.0) - lse.masked_fill(~has_terms, 0)[..., None])
    weights = torch.where(visible, weights, 0.0)
    if p.dropout_p:
        weights = weights * dropout_factor(p).to(weights.device)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def flash_decode(q, k, v, p):
    """The cache rows are gathered and masked, then it is `flash_attention`; float64 inside."""
    if p.page_table is not None:
        k, v = (t[p.page_table.long()].flatten(1, 2) for t in (k, v))  # (B, slots of a row, Hkv, .)
    slots = k.shape[1]
    position = torch.arange(slots, device=k.device)[None, :]
    lengths, starts = p.key_lengths.long()[:, None], p.key_starts.long()[:, None]
    live = (position < lengths) & (position >= starts)
    outs, lses = [], []
    for row in range(p.batch):  # each row's queries stand at its own last keys
        n = int(lengths[row])
        one = p.with_(batch=1, n_keys=n, key_mask=live[row : row + 1, :n], key_lengths=None)
        out, lse = flash_attention(q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n], one)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return q.new_empty(0, p.n_queries, p.n_heads, v.shape[3]), q.new_empty(0, p.n_heads, p.n_queries)
    return torch.cat(outs).to(q.dtype), torch.cat(lses).to(torch.float32)
