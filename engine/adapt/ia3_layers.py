"""PEFT's (IA)^3 layers with a fused forward: imported once PEFT itself is.

    y = (W x + bias) l

is one call of `fused_linear` over a dense W or our packed one, where no gradient is due. While l
trains, its gradient needs W x by itself, and PEFT's own multiplication is as good.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import ia3
from torch import nn

from tilewright.adapt.forms import DTYPES, PLAIN, is_hooked
from tilewright.ops import fused_linear
from tilewright.quantized import QuantizedLinear


class FusedIA3(ia3.Linear):
    """The forward, for calls that `why_stock` has nothing against; others run PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or why_stock(self) is not None or not _takes(self, x):
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        weight = base.packed if type(base) is QuantizedLinear else base.weight
        (adapter,) = self.active_adapters
        return fused_linear(x, weight, base.bias, out_scale=self.ia3_l[adapter].flatten())


def is_ia3_linear(module: nn.Module) -> bool:
    return isinstance(module, ia3.IA3Layer) and "Linear" in type(module).__name__


def why_not_fused(layer: Any) -> str | None:
    """Why this layer can never be fused, or None."""
    base = layer.base_layer
    if type(layer) not in (ia3.Linear, FusedIA3) or type(base) not in (nn.Linear, QuantizedLinear):
        return f"peft.{type(layer).__name__} over {type(base).__name__} is not a layer we know"
    if layer.is_feedforward:
        return "it scales its input, and the operator its output"
    if layer.fan_in_fan_out:
        return "its base has a transposed weight (fan_in_fan_out)"
    return None


def why_stock(layer: Any) -> str | None:
    """Why the layer in its present state takes PEFT's own path, or None."""
    if layer.merged:
        return "its adapter is merged into the base"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.ia3_l:
        return f"{len(layer.active_adapters)} adapters are active, need one that it has"
    base = layer.base_layer
    if is_hooked(base):
        return "there are hooks on its base layer"
    scale = layer.ia3_l[layer.active_adapters[0]]
    if type(scale) not in PLAIN or (type(base) is nn.Linear and type(base.weight) not in PLAIN):
        return "its tensors are not plain ones"
    return None


def _takes(layer: Any, x: torch.Tensor) -> bool:
    """Whether no gradient of the vector is due, and dtypes are such that PEFT would do the same."""
    (adapter,) = layer.active_adapters
    if torch.is_grad_enabled() and layer.ia3_l[adapter].requires_grad:
        return False
    if type(x) not in PLAIN or x.dtype not in DTYPES or x.dim() == 0:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return True
    base = layer.base_layer
    return type(base) is QuantizedLinear or base.weight.dtype == x.dtype
