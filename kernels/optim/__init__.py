"""Optimizers in one pass over memory; see README.md beside this."""

from tilewright.ops.optim.adamw import AdamW
from tilewright.ops.optim.api import adamw_update, gradient_norm

__all__ = ["AdamW", "adamw_update", "gradient_norm"]
