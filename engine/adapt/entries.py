"""All entries of the table, in the order in which they are applied."""

from tilewright.adapt import (
    attention,
    experts,
    experts_lora,
    experts_scaled,
    gates,
    ia3,
    lora,
    loss,
    norms,
    projections,
    rotary,
)
from tilewright.adapt.table import Replacement

TABLE: tuple[Replacement, ...] = (
    attention.REPLACEMENT,
    experts_scaled.REPLACEMENT,
    experts.REPLACEMENT,
    experts_lora.REPLACEMENT,
    lora.REPLACEMENT,
    ia3.REPLACEMENT,
    rotary.REPLACEMENT,
    projections.REPLACEMENT,  # over rotary's subclass
    norms.RMS,
    norms.LAYER,
    gates.SILU,
    gates.GELU,
    loss.REPLACEMENT,
)
