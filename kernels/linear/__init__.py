"""Linear layers over dense or packed weights, with low-rank updates and sparse deltas; see
README.md beside this."""

from tilewright.ops.linear.api import (
    fused_linear,
    lora_linear,
    multi_lora_linear,
    quantized_linear,
)
from tilewright.ops.linear.sampled import sampled_product

__all__ = [
    "fused_linear",
    "lora_linear",
    "multi_lora_linear",
    "quantized_linear",
    "sampled_product",
]
