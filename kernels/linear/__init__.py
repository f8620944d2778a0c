"""Linear layers over dense or packed weights, with low-rank updates and sparse deltas; see
README.md beside this."""

from tilewright.ops.linear.api import (
    fused_linear,
    lora_linear,
    multi_lora_linear,
    quantized_linear,
)
from tilewright.ops.linear.group import LinearLayer, linear_group
from tilewright.ops.linear.sampled import sampled_product

__all__ = [
    "LinearLayer",
    "fused_linear",
    "linear_group",
    "lora_linear",
    "multi_lora_linear",
    "quantized_linear",
    "sampled_product",
]
