"""Sparse changes of weights: where they go, how they move, merging, files; see README.md."""

from tilewright.ops.sparse.api import (
    largest_gradients,
    merge_delta,
    regrow_by_extremes,
    regrow_by_gradient,
    share_to_regrow,
    unmerge_delta,
)
from tilewright.ops.sparse.regrow import Regrowth
from tilewright.ops.sparse.saved import SavedDeltas, load_deltas, save_deltas

__all__ = [
    "Regrowth",
    "SavedDeltas",
    "largest_gradients",
    "load_deltas",
    "merge_delta",
    "regrow_by_extremes",
    "regrow_by_gradient",
    "save_deltas",
    "share_to_regrow",
    "unmerge_delta",
]
