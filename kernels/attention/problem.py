"""The record of one attention call: what api.py has checked and every implementation reads.

Axes of this room: B batch rows, Lq queries, Lk keys, H query heads, Hkv key/value heads,
D width of q and k, Dv width of v, N documents, G group size of shifted segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class ShiftedSegments:
    """Shifted-sparse attention (S2-Attn): each head attends within groups of its own grid.

    A key at position j is visible to a query at position i of the same document only if
    floor((i + s_h) / G) == floor((j + s_h) / G), where s_h = 0 for the first half of the heads and
    G // 2 for the rest. Positions count from the document's first live key.

    group_size           G >= 1; need not divide the length
    wraparound           the paper's pseudo-code instead: shifted heads roll by G // 2 around the
                         document, so that its first G // 2 positions see its last ones (a leak of
                         the future). For comparison only; needs G even and dividing each length
    first_shifted_head   default (H + 1) // 2; under tensor parallelism the rank's own share of
                         the global split

    Source: Chen et al., LongLoRA, arXiv 2309.12307, section 3.2.
    """

    group_size: int
    wraparound: bool = False
    first_shifted_head: int | None = None


# not frozen: its constructor would take 5 microseconds of each call
@dataclass(slots=True, eq=False)
class Problem:
    """All of one call but q, k and v themselves. Unlimited and absent are -1, 0 and None.

    In packed form (cu_seqlens_q given) B is 1 and Lq, Lk count all documents' tokens.
    """

    device: str
    dtype: torch.dtype
    batch: int
    n_queries: int
    n_keys: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    is_causal: bool = False
    window_left: int = -1  # keys further left than this are hidden; -1 is unlimited
    window_right: int = -1
    softcap: float = 0.0  # 0 is none
    group_size: int = 0  # 0 is no segments
    first_shifted_head: int = 0
    wraparound: bool = False
    dropout_p: float = 0.0
    cu_seqlens_q: torch.Tensor | None = None  # (N + 1,) int32
    cu_seqlens_k: torch.Tensor | None = None  # (N + 1,) int32
    key_mask: torch.Tensor | None = None  # (B, Lk) bool, True is visible
    sinks: torch.Tensor | None = None  # (H,)
    dropout_seed: torch.Tensor | None = None  # (1,) int64
    page_table: torch.Tensor | None = None  # (B, pages of a row) int32, decode only
    key_starts: torch.Tensor | None = None  # (B,) int32, decode only
    key_lengths: torch.Tensor | None = None  # (B,) int32, decode only
    needs_grad: bool = False

    @property
    def group_shift(self) -> int:
        """s_h of the shifted heads."""
        return self.group_size // 2

    @property
    def queries_per_kv_head(self) -> int:
        return self.n_heads // self.n_kv_heads

    def with_(self, **changes) -> Problem:
        return replace(self, **changes)
