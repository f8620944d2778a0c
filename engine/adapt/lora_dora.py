"""PEFT's DoRA over our operators: the low-rank product by one call, and its rows scaled.

    y = c (W x + s B A x) + bias,   c = m / |W + s B A|, the norm of each row, not differentiated

The norms are taken without a matrix of W's size: for a row w of W and its row b of B

    |w + s b A|^2 = |w|^2 + 2 s b.(A w) + s^2 b A A^T b

and |w|^2 is kept as long as W stays what it is.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewright.ops import (
    LinearLayer,
    PackedWeight,
    dequantize_weight,
    fused_linear,
    lora_linear,
    quantized_linear,
)

SQUARES = "_tilewright_squares"  # of a layer: its weight, that weight's version, |w|^2 of each row


def dora_linear(layer: Any, x: torch.Tensor, call: LinearLayer) -> torch.Tensor:
    """The layer's output; `call` is what it would be as LoRA."""
    assert call.down is not None and call.up is not None
    (adapter,) = layer.active_adapters
    magnitude = layer.lora_magnitude_vector[adapter].weight
    factors = magnitude / row_norms(layer, call).to(magnitude)
    trains = torch.is_grad_enabled() and (
        magnitude.requires_grad or call.down.requires_grad or call.up.requires_grad
    )
    if not trains:
        up = factors.float()[:, None] * call.up
        y = fused_linear(
            x, call.weight, out_scale=factors, down=call.down, up=up, scale=call.scale
        )  # fmt: skip
        return y if call.bias is None else y + call.bias.to(y.dtype)
    y = lora_linear(x, call.weight, call.down, call.up, scale=call.scale)
    scaled = y * factors  # float32, as PEFT has it, where the magnitude is
    if call.bias is not None:
        scaled = scaled + call.bias
    return scaled.to(y.dtype)


@torch.no_grad()
def row_norms(layer: Any, call: LinearLayer) -> torch.Tensor:
    """(O,) |W + s B A| of each row, rounded to W's dtype as PEFT's is."""
    assert call.down is not None and call.up is not None
    weight, down, up = call.weight, call.down, call.up.float()
    with torch.autocast(up.device.type, enabled=False):
        if isinstance(weight, PackedWeight):
            crossed = quantized_linear(down.to(weight.dtype), weight)
        else:
            crossed = torch.nn.functional.linear(down.to(weight.dtype), weight)
        gram = down.float() @ down.float().T
        squares = _squares(layer, weight) + 2 * call.scale * (up * crossed.float().T).sum(1)
        squares += call.scale**2 * ((up @ gram) * up).sum(1)
    return squares.clamp_(min=0).sqrt_().to(weight.dtype)


def _squares(layer: Any, weight: torch.Tensor | PackedWeight) -> torch.Tensor:
    tensor = weight.codes if isinstance(weight, PackedWeight) else weight
    keeps = not torch.compiler.is_compiling()
    kept = vars(layer).get(SQUARES) if keeps else None
    if kept is not None and kept[0] is tensor and kept[1] == tensor._version:
        return kept[2]
    dense = weight if isinstance(weight, torch.Tensor) else dequantize_weight(weight, torch.float32)
    squares = torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32).square()
    if keeps:
        vars(layer)[SQUARES] = tensor, tensor._version, squares
    return squares
