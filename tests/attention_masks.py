"""Masks written out pair by pair, apart from the reference's, and a way to read a kernel's own."""

from functools import lru_cache

import torch
from attention_inputs import attend, int32, move


def window_sees(i, j, is_causal, window):
    """Whether a query standing at key position i sees position j, segments aside."""
    left, right = window or (None, None)
    return (
        not (is_causal and j > i)
        and not (left is not None and j < i - left)
        and not (right is not None and j > i + right)
    )


def group_of(position, shift, group_size):
    return (position + shift) // group_size


def document_sees(i, j, length, head, n_heads, is_causal, window, segments):
    """Whether query i sees key j in a document of `length` keys; positions from its first key."""
    if segments is None:
        return window_sees(i, j, is_causal, window)
    first = segments.first_shifted_head
    first = (n_heads + 1) // 2 if first is None else first
    group, shift = segments.group_size, segments.group_size // 2 if head >= first else 0
    if not segments.wraparound:
        same = group_of(i, shift, group) == group_of(j, shift, group)
        return same and window_sees(i, j, is_causal, window)
    # the paper's pseudo-code: roll by -shift, cut into groups, attend there, roll back
    rolled_i, rolled_j = (i - shift) % length, (j - shift) % length
    same = rolled_i // group == rolled_j // group
    return same and not (is_causal and rolled_j > rolled_i)


def pair_mask(
    n_heads, documents, is_causal=False, window=None, segments=None, padding=(0, 0), n_keys=None
):
    """bool (H, Tq, Tk) of packed documents, each (queries, keys).

    padding   dead keys before and after the one document of a batch row of n_keys keys; there a
              query's place is counted from the row's end, padding included
    """
    documents = tuple(map(tuple, documents))
    return _pair_mask(n_heads, documents, is_causal, window, segments, padding, n_keys).clone()


@lru_cache(maxsize=64)
def _pair_mask(n_heads, documents, is_causal, window, segments, padding, n_keys):
    n_queries = sum(lq for lq, _ in documents)
    mask = torch.zeros(n_heads, n_queries, n_keys or sum(lk for _, lk in documents)).bool()
    start_q, start_k = 0, padding[0]
    for lq, lk in documents:
        for h in range(n_heads):
            for a in range(lq):
                i = a + lk + padding[1] - lq
                for j in range(lk):
                    mask[h, start_q + a, start_k + j] = document_sees(
                        i, j, lk, h, n_heads, is_causal, window, segments
                    )
        start_q, start_k = start_q + lq, start_k + lk
    return mask


def read_mask(target, dtype, n_queries, n_keys, heads=2, kv_heads=1, batch=None, **options):
    """The mask that an implementation applies, forward: bool (B, H, Lq, Lk) or (H, Tq, Tk).

    Equal scores and unit vectors as values: out[i, j] is 1 / (keys that i sees), or 0. n_keys and
    n_queries are at most 256, the largest width of v.
    """
    lead = () if batch is None else (batch,)
    q = torch.zeros(*lead, n_queries, heads, 8, dtype=dtype)
    k = torch.zeros(*lead, n_keys, kv_heads, 8, dtype=dtype)
    v = torch.eye(n_keys, dtype=dtype)[:, None].expand(*lead, -1, kv_heads, -1)
    q, k, v = (t.to(target.device) for t in (q, k, v))
    out, lse = attend(target, q, k, v, return_lse=True, **move(options, target.device))
    out, lse = out.cpu().transpose(-3, -2), lse.cpu()
    visible = out > 0
    counts = visible.sum(-1)
    assert torch.allclose(lse.exp(), counts.float(), rtol=1e-5, atol=0), "lse counts other keys"
    shares = visible / counts.clamp(min=1)[..., None]
    assert torch.allclose(out.float(), shares, rtol=torch.finfo(dtype).eps, atol=0), (
        "unequal weights"
    )
    return visible


def read_backward_mask(target, dtype, n_queries, n_keys, heads=2, batch=None, **options):
    """The mask that the backward applies: bool (B, H, Lq, Lk) or (H, Tq, Tk), with Hkv = H.

    dout[i] is unit vector i, so that dv[j, i] is query i's weight for key j.
    """
    lead = () if batch is None else (batch,)
    q = torch.zeros(*lead, n_queries, heads, 8, dtype=dtype, device=target.device)
    k = torch.zeros(*lead, n_keys, heads, 8, dtype=dtype, device=target.device)
    v = torch.zeros(*lead, n_keys, heads, n_queries, dtype=dtype, device=target.device)
    v.requires_grad_()
    out = attend(target, q, k, v, **move(options, target.device))
    dout = torch.eye(n_queries, dtype=dtype, device=target.device)[:, None].expand_as(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert dv.isfinite().all()
    return dv.cpu().permute(*range(len(lead)), -2, -1, -3) > 0


def packed_ends(documents):
    """cu_seqlens and cu_seqlens_k of documents, each (queries, keys)."""
    ends_q, ends_k = [0], [0]
    for lq, lk in documents:
        ends_q.append(ends_q[-1] + lq)
        ends_k.append(ends_k[-1] + lk)
    return {"cu_seqlens": int32(ends_q), "cu_seqlens_k": int32(ends_k)}


def shifted_tables(length, group_size):
    """The two segment tables of a document: where plain and where shifted heads cut it."""
    plain = sorted({*range(0, length, group_size), length})
    shifted = sorted({0, *range(group_size - group_size // 2, length, group_size), length})
    return plain, shifted
