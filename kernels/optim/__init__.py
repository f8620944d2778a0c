"""Optimizers in one pass over memory; see README.md beside this."""

from tilewright.ops.optim.adamw import AdamW
from tilewright.ops.optim.api import adamw_update, gradient_norm, sm3_update
from tilewright.ops.optim.sm3 import SM3, Cells

__all__ = ["SM3", "AdamW", "Cells", "adamw_update", "gradient_norm", "sm3_update"]
