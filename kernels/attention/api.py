"""The attention room's public functions: docstrings, checks, and the call into the operators."""

from __future__ import annotations

import math

import torch

from tilewright import choose
from tilewright.ops.attention import op
from tilewright.ops.attention.problem import Problem, ShiftedSegments
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    segments: ShiftedSegments | None = None,
    sinks: torch.Tensor | None = None,
    extra_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention that never holds the (Lq, Lk) matrix, forward and backward.

        out[i] = sum_j exp(s_ij - lse_i) v[j]
        s_ij = scale q[i] . k[j],   lse_i = log sum_j exp(s_ij)

    with j over the keys that query i sees. Query head h reads key/value head h // (H / Hkv).

    q             (B, Lq, H, D)    or packed documents (Tq, H, D); any strides
    k             (B, Lk, Hkv, D)  or (Tk, Hkv, D); Hkv divides H
    v             (B, Lk, Hkv, Dv) or (Tk, Hkv, Dv); 1 <= D, Dv <= 256
    is_causal     query i sees keys j <= i + Lk - Lq: the last query stands at the last key
    window        (left, right) sizes around i + Lk - Lq; None is unlimited
    scale         default 1 / sqrt(D)
    softcap       t > 0 replaces s_ij by t tanh(s_ij / t), before masking
    cu_seqlens    (N + 1,) int32, packed form: document n holds queries [cu[n], cu[n + 1]);
                  documents may be empty; a token in no document sees nothing
    cu_seqlens_k  (N + 1,) int32, the same for keys; default cu_seqlens
    key_mask      (B, Lk) bool, True where a key is live; batch form only. What stands in k and v
                  elsewhere does not matter
    segments      `ShiftedSegments`: shifted-sparse attention, no copies of q, k or v
    sinks         (H,) one logit a head that takes part in the softmax and has no value
    extra_kv      (ek, ev), (B, P, Hkv, D) and (B, P, Hkv, Dv), or without B (shared by all rows or
                  documents; B counts documents in packed form): keys that every query sees
    dropout_p     probability, 0 <= p < 1, that a softmax weight is dropped; the backward draws the
                  same numbers again instead of storing them
    dropout_seed  (1,) int64; default drawn from torch's default CPU generator
    return_lse    also return the log-sum-exp (natural logarithm, sinks included), differentiable
    impl          "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns out (B, Lq, H, Dv) or (Tq, H, Dv) in q.dtype, contiguous, and if asked for lse
    (B, H, Lq) or (H, Tq) in float32. A query that sees no key and no sink gets out 0, lse -inf and
    zero gradients. q, k, v share a device and a dtype: float32, bfloat16, float16 (float64:
    reference only). Sums are float32; the error against float64 is at most twice that of torch's
    scaled_dot_product_attention. Results are bitwise reproducible, and do not depend on the number
    of threads or on the other rows and documents of the batch. Under autocast q, k, v are cast.
    ValueError: a shape, dtype or value outside the above (values of cu_seqlens: on a CPU; on a GPU
    they are not read back). RuntimeError: `impl` was named and cannot run here.

    Source: Dao, FlashAttention-2, arXiv 2307.08691; the equations are in README.md.
    """
    p, q4, k4, v4 = _describe(
        q, k, v, is_causal, window, scale, softcap, cu_seqlens, cu_seqlens_k, key_mask, segments,
        sinks, dropout_p, dropout_seed,
    )  # fmt: skip
    out, lse = op.call_flash_attention(q4, k4, v4, p, impl)
    if extra_kv is not None:
        out, lse = _with_extra_keys(out, lse, q4, extra_kv, p, cu_seqlens, impl)
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _describe(
    q, k, v, is_causal=False, window=None, scale=None, softcap=0.0, cu_seqlens=None,
    cu_seqlens_k=None, key_mask=None, segments=None, sinks=None, dropout_p=0.0, dropout_seed=None,
):  # fmt: skip
    """Check everything, and return the problem record with q, k, v in batch form."""
    name = "flash_attention"
    packed = cu_seqlens is not None
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    expect_dtype(name, DTYPES, q=q, k=k, v=v)
    expect_device(
        name, q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, key_mask=key_mask,
        sinks=sinks,
    )  # fmt: skip
    _expect_finite(name, scale, softcap)
    if packed:
        expect_shapes(name, q=(q, ["Tq", "H", "D"]), k=(k, ["Tk", "Hkv", "D"]),
                      v=(v, ["Tk", "Hkv", "Dv"]))  # fmt: skip
        q, k, v = q[None], k[None], v[None]
    else:
        expect_shapes(name, q=(q, ["B", "Lq", "H", "D"]), k=(k, ["B", "Lk", "Hkv", "D"]),
                      v=(v, ["B", "Lk", "Hkv", "Dv"]))  # fmt: skip
    batch, n_queries, n_heads, head_dim = q.shape
    _, n_keys, n_kv_heads, value_dim = v.shape
    for axis, n in (("D", head_dim), ("Dv", value_dim)):
        if not 1 <= n <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: {axis} is {n}, need 1 <= {axis} <= {MAX_HEAD_DIM}")
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError(f"{name}: q has {n_heads} heads, need a multiple of k's {n_kv_heads}")

    if packed:
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        for argument, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
            if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 1:
                raise ValueError(
                    f"{name}: {argument} is {cu.dtype} of shape {tuple(cu.shape)}, "
                    "need int32 of shape (N + 1,)"
                )
        expect_shapes(name, cu_seqlens=(cu_seqlens, ["N + 1"]),
                      cu_seqlens_k=(cu_seqlens_k, ["N + 1"]))  # fmt: skip
        if key_mask is not None:
            raise ValueError(f"{name}: key_mask goes with the batch form, cu_seqlens with packed")
    elif cu_seqlens_k is not None:
        raise ValueError(f"{name}: cu_seqlens_k was given without cu_seqlens")
    if key_mask is not None:
        if key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, n_keys):
            raise ValueError(
                f"{name}: key_mask is {key_mask.dtype} of shape {tuple(key_mask.shape)}, "
                f"need bool of shape (B, Lk) = ({batch}, {n_keys})"
            )

    window_left, window_right = _window(window)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, need 0 <= dropout_p < 1")
    if sinks is not None:
        expect_shapes(name, q=(q, ["B", "Lq", "H", "D"]), sinks=(sinks, ["H"]))
    group_size, first_shifted_head, wraparound = _segments(
        segments, n_heads, packed, n_queries, n_keys, window_left, window_right
    )
    if dropout_p and dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    if dropout_seed is not None and (
        dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1
    ):
        raise ValueError(
            f"{name}: dropout_seed is {dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}, "
            "need int64 of shape (1,)"
        )

    problem = Problem(
        device=q.device.type, dtype=q.dtype, batch=batch, n_queries=n_queries, n_keys=n_keys,
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, value_dim=value_dim,
        scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        is_causal=bool(is_causal), window_left=window_left, window_right=window_right,
        softcap=float(softcap), group_size=group_size, first_shifted_head=first_shifted_head,
        wraparound=wraparound, dropout_p=float(dropout_p), cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k if packed else None, key_mask=key_mask, sinks=sinks,
        dropout_seed=dropout_seed if dropout_p else None,
    )  # fmt: skip
    return problem, q, k, v


def _expect_finite(name: str, scale: float | None, softcap: float) -> None:
    # comparisons, not math.isfinite: these may be symbolic floats of a graph being traced
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"{name}: scale is {scale}, need a finite number")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}, need 0 (none) or a positive number")


def _window(window) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"flash_attention: window is {window!r}, need (left, right)")
    for side in window:
        if side is not None and side < 0:
            raise ValueError(f"flash_attention: window is {tuple(window)}, need sizes >= 0 or None")
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _segments(segments, n_heads, packed, n_queries, n_keys, window_left, window_right):
    if segments is None:
        return 0, 0, False
    if not isinstance(segments, ShiftedSegments):
        raise ValueError(f"flash_attention: segments is {segments!r}, need a ShiftedSegments")
    group = segments.group_size
    if group < 1:
        raise ValueError(f"flash_attention: segments.group_size is {group}, need at least 1")
    first = segments.first_shifted_head
    first = (n_heads + 1) // 2 if first is None else first
    if not 0 <= first <= n_heads:
        raise ValueError(
            f"flash_attention: segments.first_shifted_head is {first}, need 0 to H = {n_heads}"
        )
    if segments.wraparound:
        if group % 2 or (not packed and n_keys % group):
            raise ValueError(
                f"flash_attention: wraparound needs an even group_size that divides every length, "
                f"got group_size {group} and length {n_keys}"
            )
        if n_queries != n_keys or window_left >= 0 or window_right >= 0:
            raise ValueError("flash_attention: wraparound needs Lq = Lk and no window")
    return group, first, segments.wraparound


def _with_extra_keys(out, lse, q, extra_kv, p, cu_seqlens, impl):
    """Merge attention over the extra keys, which every query sees, into (out, lse).

    Two attentions over disjoint keys merge exactly by their log-sum-exps (the prefix identity of
    He et al., arXiv 2110.04366, section 3.1); lse carries the gradient.
    """
    n_rows = p.batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if not isinstance(extra_kv, (tuple, list)) or len(extra_kv) != 2:
        raise ValueError("flash_attention: extra_kv needs to be a pair of tensors (keys, values)")
    expect_device("flash_attention", q=q, extra_k=extra_kv[0], extra_v=extra_kv[1])
    extra = []
    for argument, t, width in zip(("k", "v"), extra_kv, (p.head_dim, p.value_dim), strict=True):
        if t.dim() == 3:
            t = t[None].expand(n_rows, -1, -1, -1)
        if t.dim() != 4 or t.shape[0] != n_rows or tuple(t.shape[2:]) != (p.n_kv_heads, width):
            raise ValueError(
                f"flash_attention: extra_kv's {argument} has shape {tuple(t.shape)}, "
                f"need ({n_rows}, P, {p.n_kv_heads}, {width})"
            )
        extra.append(t.to(q.dtype))
    n_extra = extra[0].shape[1]
    if extra[1].shape[1] != n_extra:
        raise ValueError(
            f"flash_attention: extra_kv has {n_extra} keys and {extra[1].shape[1]} values"
        )
    if n_extra == 0:
        return out, lse
    cu_extra = None
    if cu_seqlens is not None:
        cu_extra = torch.arange(n_rows + 1, dtype=torch.int32, device=q.device) * n_extra
        extra = [t.reshape(1, n_rows * n_extra, *t.shape[2:]) for t in extra]
    plain = Problem(
        device=p.device, dtype=p.dtype, batch=p.batch, n_queries=p.n_queries,
        n_keys=extra[0].shape[1], n_heads=p.n_heads, n_kv_heads=p.n_kv_heads,
        head_dim=p.head_dim, value_dim=p.value_dim, scale=p.scale, softcap=p.softcap,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_extra,
        dropout_p=p.dropout_p,
        dropout_seed=None if p.dropout_seed is None else p.dropout_seed ^ 1,
    )  # fmt: skip
    out_extra, lse_extra = op.call_flash_attention(q, extra[0], extra[1], plain, impl)
    return _merge(out, lse, out_extra, lse_extra)


def _merge(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint sets of keys."""
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == float("-inf")
    pivot = lse.masked_fill(empty, 0.0)
    weight_a, weight_b = (
        torch.exp(t.masked_fill(empty, float("-inf")) - pivot).transpose(1, 2)[..., None]
        for t in (lse_a, lse_b)
    )
    out = out_a.to(lse.dtype) * weight_a + out_b.to(lse.dtype) * weight_b
    return out.to(out_a.dtype), lse


def flash_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    key_lengths: torch.Tensor,
    key_starts: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    is_causal: bool = True,
    window_left: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few new tokens over a key/value cache that already holds them.

    Row b's keys are cache positions [key_starts[b], key_lengths[b]); its Lq queries stand at the
    last Lq of them, so that with is_causal query i sees positions up to key_lengths[b] - Lq + i.

    q            (B, Lq, H, D)
    k_cache      (B, S, Hkv, D), S slots a row; or pages (N, page size, Hkv, D) with page_table
    v_cache      (B, S, Hkv, Dv) or (N, page size, Hkv, Dv)
    key_lengths  (B,) int32, 0 <= length <= slots of a row
    key_starts   (B,) int32, first live position, >= 0; default 0 (left padding)
    page_table   (B, pages of a row) int32: row b's position p is slot p % page size of page
                 page_table[b, p // page size]; pages of any size, in any order. Entries past the
                 row's length are not read, and neither is any other slot
    window_left  a query sees itself and this many positions before it; None is unlimited
    num_splits   into how many pieces the keys are dealt out to the processors; None chooses. The
                 result is bitwise the same for every value
    scale, softcap, sinks, return_lse, impl   as in `flash_attention`

    Returns out (B, Lq, H, Dv) in q.dtype, and if asked for lse (B, H, Lq) in float32. q and the
    cache share a dtype: float32, bfloat16 or float16. No gradient. ValueError: a shape, dtype or
    value outside the above, a page index out of range included (CPU; on a GPU it is not read back).

    Source: Dao et al., Flash-Decoding, 2023; pages as in Kwon et al., arXiv 2309.06180.
    """
    p = _describe_decode(
        q, k_cache, v_cache, key_lengths, key_starts, page_table, is_causal, window_left, scale,
        softcap, sinks,
    )  # fmt: skip
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"flash_decode: num_splits is {num_splits}, need >= 1, or None to choose")
    out, lse = op.call_flash_decode(q, k_cache, v_cache, p, num_splits or 0, impl)
    return (out, lse) if return_lse else out


def _describe_decode(
    q, k_cache, v_cache, key_lengths, key_starts=None, page_table=None, is_causal=True,
    window_left=None, scale=None, softcap=0.0, sinks=None,
) -> Problem:  # fmt: skip
    """Check everything, and return the problem record."""
    name = "flash_decode"
    expect_dtype(name, DTYPES, q=q, k_cache=k_cache, v_cache=v_cache)
    expect_device(
        name, q=q, k_cache=k_cache, v_cache=v_cache, key_lengths=key_lengths,
        key_starts=key_starts, page_table=page_table, sinks=sinks,
    )  # fmt: skip
    _expect_finite(name, scale, softcap)
    rows = "N" if page_table is not None else "B"
    size = expect_shapes(
        name, q=(q, ["B", "Lq", "H", "D"]), k_cache=(k_cache, [rows, "S", "Hkv", "D"]),
        v_cache=(v_cache, [rows, "S", "Hkv", "Dv"]), key_lengths=(key_lengths, ["B"]),
    )  # fmt: skip
    if key_starts is None:
        key_starts = torch.zeros_like(key_lengths)
    expect_shapes(name, q=(q, ["B", "Lq", "H", "D"]), key_starts=(key_starts, ["B"]))
    if page_table is not None:
        expect_shapes(name, q=(q, ["B", "Lq", "H", "D"]), page_table=(page_table, ["B", "pages"]))
        if size["S"] == 0:
            raise ValueError(f"{name}: k_cache has pages of 0 slots, need at least 1")
    if sinks is not None:
        expect_shapes(name, q=(q, ["B", "Lq", "H", "D"]), sinks=(sinks, ["H"]))
    for argument, t in (("key_lengths", key_lengths), ("key_starts", key_starts),
                        ("page_table", page_table)):  # fmt: skip
        if t is not None and t.dtype != torch.int32:
            raise ValueError(f"{name}: {argument} is {t.dtype}, need int32")
    for axis in ("D", "Dv"):
        if not 1 <= size[axis] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: {axis} is {size[axis]}, need 1 <= {axis} <= {MAX_HEAD_DIM}")
    if size["Hkv"] == 0 or size["H"] % size["Hkv"]:
        raise ValueError(
            f"{name}: q has {size['H']} heads, need a multiple of k_cache's {size['Hkv']}"
        )
    if window_left is not None and window_left < 0:
        raise ValueError(f"{name}: window_left is {window_left}, need >= 0, or None for unlimited")
    return Problem(
        device=q.device.type, dtype=q.dtype, batch=size["B"], n_queries=size["Lq"],
        n_keys=size["S"], n_heads=size["H"], n_kv_heads=size["Hkv"], head_dim=size["D"],
        value_dim=size["Dv"], scale=1.0 / math.sqrt(size["D"]) if scale is None else float(scale),
        is_causal=bool(is_causal), window_left=-1 if window_left is None else window_left,
        softcap=float(softcap), sinks=sinks, page_table=page_table, key_starts=key_starts,
        key_lengths=key_lengths,
    )  # fmt: skip


_CANDIDATES = (
    choose.implementation_of("attention", "triton_gpu"),
    choose.implementation_of("attention", "cpp_cpu"),
    choose.REFERENCE,
)


def _sample_problems() -> dict[str, object]:
    """What `doctor` asks about: a usual training shape."""
    samples: dict[str, object] = {}
    for label, device, dtype in choose.usual_types():
        q = torch.empty(1, 16, 2, 64, device=device, dtype=dtype)
        samples[label] = _describe(q, q, q, is_causal=True)[0]
    return samples


choose.register(
    choose.Operator(
        "flash_attention",
        _CANDIDATES,
        lambda *a, impl="auto", extra_kv=None, return_lse=False, **k: _describe(*a, **k)[0],
        _sample_problems,
    )
)
choose.register(
    choose.Operator(
        "flash_decode",
        _CANDIDATES,
        lambda *a, impl="auto", num_splits=None, return_lse=False, **k: _describe_decode(*a, **k),
        _sample_problems,
    )
)
