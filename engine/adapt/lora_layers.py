"""PEFT's LoRA layers with a fused forward: imported once PEFT itself is.

    y = W x + bias + scaling B A drop(x)

(with DoRA its rows scaled afterwards) is one call of `lora_linear`, over a dense W, our packed one,
or one that bitsandbytes has packed to 4 bits. Parameters, names, files, merging and switching
adapters are PEFT's own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from tilewright.adapt.forms import is_hooked
from tilewright.adapt.lora_dora import dora_linear
from tilewright.adapt.together import take_ready
from tilewright.ops import LinearLayer, PackedWeight, lora_linear, read_bitsandbytes
from tilewright.quantized import QuantizedLinear

PACKED = "_tilewright_packed"  # of a layer over bitsandbytes: its weight and what we read from it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, nn.Parameter)  # no DTensor, whose data_ptr() is not the whole weight


class FusedLora:
    """The forward, for calls that `why_stock` has nothing against; others run PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ready = take_ready(self, x)  # type: ignore[arg-type]
        if ready is not None:
            return ready
        call = None if args or kwargs else layer_of(self, x)
        if call is not None and self.lora_variant:  # type: ignore[attr-defined]
            return dora_linear(self, x, call)
        if call is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        assert call.down is not None and call.up is not None
        return lora_linear(
            x, call.weight, call.down, call.up, scale=call.scale, bias=call.bias,
            dropout_p=call.dropout_p,
        )  # fmt: skip


class FusedLinear(FusedLora, lora.Linear):
    """Over a dense weight, or a packed one of ours."""


def fused_class(cls: type) -> type | None:
    """The subclass with the fused forward for one of PEFT's classes, or None."""
    if cls is lora.Linear:
        return FusedLinear
    # PEFT imports it when it first meets a layer of bitsandbytes
    over_bitsandbytes = sys.modules.get("peft.tuners.lora.bnb")
    if over_bitsandbytes is not None and cls is getattr(over_bitsandbytes, "Linear4bit", None):
        from tilewright.adapt.lora_bitsandbytes import FusedLinear4bit

        return FusedLinear4bit
    return None


def is_lora_linear(module: nn.Module) -> bool:
    """Any of PEFT's LoRA layers around a linear one; PEFT too tells them by their names."""
    return isinstance(module, lora.LoraLayer) and "Linear" in type(module).__name__


def why_not_fused(layer: Any) -> str | None:
    """Why this layer can never be fused, or None: what it is, not the state that it is in."""
    base = layer.base_layer
    if fused_class(type(layer)) is None:
        return f"peft.{type(layer).__name__} over {type(base).__name__} is not a layer we know"
    if type(base) is QuantizedLinear or _is_bitsandbytes(base):
        return None
    if type(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}, not exactly torch.nn.Linear"
    if layer.fan_in_fan_out:
        return "its base has a transposed weight (fan_in_fan_out)"
    return None


def why_stock(layer: Any) -> str | None:
    """Why the layer in its present state takes PEFT's own path, or None."""
    if layer.merged:
        return "its adapter is merged into the base"
    if layer.disable_adapters:
        return "its adapters are disabled"
    active = layer.active_adapters
    if len(active) != 1:
        return f"{len(active)} adapters are active at once"
    name = active[0]
    if name not in layer.lora_A:
        return f"it has no adapter {name!r}, which is the active one"
    is_dora = type(layer.lora_variant.get(name)) is DoraLinearVariant
    if name in layer.lora_variant and not is_dora:
        return f"its adapter is a variant ({type(layer.lora_variant[name]).__name__})"
    if layer.lora_bias[name]:
        return "its adapter has a bias (lora_bias)"
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for what, inner in (("base", layer.base_layer), ("A", down), ("B", up), ("dropout", dropout)):
        if is_hooked(inner):
            return f"there are hooks on its {what} layer"
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"its A and B are {type(down).__name__} and {type(up).__name__}, not nn.Linear"
    if type(dropout) is nn.Dropout:
        if dropout.p >= 1:
            return "its dropout drops everything"
        if is_dora and dropout.p:
            return "DoRA with dropout multiplies the base by another input than the layer's"
    elif type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if is_dora:
        magnitude = layer.lora_magnitude_vector[name]
        if is_hooked(magnitude) or type(magnitude.weight) not in PLAIN:
            return "its magnitude is hooked, or not a plain tensor"
    if type(down.weight) not in PLAIN or type(up.weight) not in PLAIN:
        return f"its adapter is a {type(down.weight).__name__}, not a plain tensor"
    base = layer.base_layer
    if _is_bitsandbytes(base):
        if getattr(base.weight, "quant_state", None) is None:
            return "its base is not quantized yet: move the model to its device first"
    elif type(base) is nn.Linear and type(base.weight) not in PLAIN:
        return f"its base weight is a {type(base.weight).__name__}, not a plain tensor"
    return None


def layer_of(layer: Any, x: torch.Tensor) -> LinearLayer | None:
    """The layer in its present state as our operators take it, or None where PEFT's own path
    has to run."""
    if why_stock(layer) is not None:
        return None
    weight, bias = base_weight(layer)
    if not _takes(x, weight, layer):
        return None
    (adapter,) = layer.active_adapters
    dropout = layer.lora_dropout[adapter]
    return LinearLayer(
        weight, bias, down=layer.lora_A[adapter].weight, up=layer.lora_B[adapter].weight,
        scale=layer.scaling[adapter],
        dropout_p=dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
    )  # fmt: skip


def note(layer: Any) -> str:
    """What the report says beside the layer."""
    base, notes = layer.base_layer, []
    if layer.lora_variant:
        notes.append("DoRA")
    if type(base) is QuantizedLinear:
        notes.append(f"over {base.format}")
    elif _is_bitsandbytes(base):
        notes.append(f"over bitsandbytes {base.weight.quant_state.quant_type}, copied into ours")
    (name,) = layer.active_adapters
    of_base, of_adapter = base.weight.dtype, layer.lora_A[name].weight.dtype
    if of_base.is_floating_point and of_adapter.itemsize > of_base.itemsize:
        names = [str(d).removeprefix("torch.") for d in (of_adapter, of_base)]
        notes.append(f"{names[0]} adapter read in {names[1]}, as under autocast")
    return ", ".join(notes)


def base_weight(layer: Any) -> tuple[torch.Tensor | PackedWeight, torch.Tensor | None]:
    """The base's weight and bias as our operators take them."""
    base = layer.base_layer
    if type(base) is QuantizedLinear:
        return base.packed, base.bias
    if type(base) is nn.Linear:
        return base.weight, base.bias
    cached = vars(layer).get(PACKED)
    if cached is None or cached[0] is not base.weight or cached[1].device != base.weight.device:
        # its state dict, because at inference bitsandbytes orders the codes for the CPU in place
        cached = base.weight, read_bitsandbytes(base.state_dict())
        setattr(layer, PACKED, cached)
    return cached[1], base.bias


def _takes(x: torch.Tensor, weight: torch.Tensor | PackedWeight, layer: Any) -> bool:
    """Whether dtypes are such that the fused operator computes what PEFT would."""
    if type(x) not in PLAIN or x.dtype not in DTYPES or x.dim() == 0:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return True
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype:
        return False  # an error of torch's, which torch shall word
    (adapter,) = layer.active_adapters
    return layer.cast_input_dtype_enabled or layer.lora_A[adapter].weight.dtype == x.dtype


def _is_bitsandbytes(base: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and type(base) is bitsandbytes.nn.Linear4bit
