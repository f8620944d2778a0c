"""New keys and values into a cache, where `flash_decode` reads them."""

from __future__ import annotations

import torch

from tilewright.direct import may_go_direct
from tilewright.native import why_not_native
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAME = "append_to_cache"


def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    key_lengths: torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> None:
    """Write new tokens to the last positions of each row of a key/value cache, in place.

    k, v              (B, n, Hkv, D) and (B, n, Hkv, Dv)
    k_cache, v_cache  (B, S, Hkv, D) and (B, S, Hkv, Dv), S slots a row; or pages (N, page size,
                      Hkv, D) and (N, page size, Hkv, Dv) with page_table
    key_lengths       (B,) int32, of each row with the new tokens counted in: they go to positions
                      key_lengths[b] - n up to key_lengths[b], n <= length <= slots of a row
    page_table        (B, pages of a row) int32, as in `flash_decode`; a page that two rows write to
                      keeps either's token

    All share a dtype: float32, bfloat16, float16 or float64. No gradient. ValueError: a shape,
    dtype or value outside the above, a page index out of range included (CPU; on a GPU values are
    not read back).

    Source: the cache of Dao et al., Flash-Decoding, 2023; pages as in Kwon et al., arXiv
    2309.06180.
    """
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    expect_dtype(NAME, DTYPES, **tensors)
    expect_device(NAME, **tensors, key_lengths=key_lengths, page_table=page_table)
    rows = "B" if page_table is None else "N"
    size = expect_shapes(
        NAME, k=(k, ["B", "n", "Hkv", "D"]), v=(v, ["B", "n", "Hkv", "Dv"]),
        k_cache=(k_cache, [rows, "S", "Hkv", "D"]), v_cache=(v_cache, [rows, "S", "Hkv", "Dv"]),
        key_lengths=(key_lengths, ["B"]),
    )  # fmt: skip
    if page_table is not None:
        expect_shapes(NAME, k=(k, ["B", "n", "Hkv", "D"]), page_table=(page_table, ["B", "pages"]))
        if size["S"] == 0:
            raise ValueError(f"{NAME}: k_cache has pages of 0 slots, need at least 1")
    for argument, t in (("key_lengths", key_lengths), ("page_table", page_table)):
        if t is not None and t.dtype != torch.int32:
            raise ValueError(f"{NAME}: {argument} is {t.dtype}, need int32")
    if any(t.requires_grad for t in tensors.values()) and torch.is_grad_enabled():
        raise ValueError(f"{NAME}: it has no gradient; call it under torch.no_grad()")
    if k.is_cpu and may_go_direct(*tensors.values()) and why_not_native() is None:
        from tilewright.ops.attention import cpp_cpu

        cpp_cpu.append(k, v, k_cache, v_cache, key_lengths, page_table)
    else:
        _by_index(k, v, k_cache, v_cache, key_lengths, page_table)


def _by_index(k, v, k_cache, v_cache, key_lengths, page_table) -> None:
    n, slots = k.shape[1], k_cache.shape[1]
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    positions = key_lengths[:, None].long() - n + torch.arange(n, device=k.device)
    if k.is_cpu:
        most = slots if page_table is None else slots * page_table.shape[1]
        for b, length in enumerate(key_lengths.tolist()):
            if not n <= length <= most:
                raise ValueError(
                    f"{NAME}: key_lengths[{b}] is {length}, need {n} to {most}, the slots of a row"
                )
    if page_table is not None:
        rows, positions = page_table[rows, positions // slots].long(), positions % slots
    k_cache[rows, positions] = k
    v_cache[rows, positions] = v
