"""Projections of one input, as a gated layer's gate and up, by one `linear_group`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from tilewright.adapt.forms import PLAIN, is_hooked
from tilewright.ops import LinearLayer, linear_group


def project(x: torch.Tensor, *projections: nn.Module) -> tuple[torch.Tensor, ...]:
    """What each projection makes of x. Calls of those that are layers of ours anyway become one:
    each result has the bits of its own call. A projection that somebody watches is called."""
    layers = _layers(x, projections)
    if layers is None:
        return tuple(projection(x) for projection in projections)
    return linear_group(x, layers)


def _layers(x: torch.Tensor, projections: tuple[nn.Module, ...]) -> list[LinearLayer] | None:
    if torch.compiler.is_compiling() or type(x) not in PLAIN or x.device.type != "cpu":
        return None  # there it would be one call each in any case
    if _sees_every_module():
        return None
    found = []
    for projection in projections:
        layer = None if is_hooked(projection) else _layer_of(projection, x)
        if layer is None:
            return None
        found.append(layer)
    return found


def _layer_of(module: Any, x: torch.Tensor) -> LinearLayer | None:
    """What the module hands to our operator for this x, or None where it does something else."""
    if module._compiled_call_impl is not None or type(module).__call__ is not nn.Module.__call__:
        return None
    forward = type(module).forward
    ours = sys.modules.get("tilewright.quantized")
    if ours is not None and forward is ours.QuantizedLinear.forward:
        return LinearLayer(module.packed, module.bias)
    adapters = sys.modules.get("tilewright.adapt.lora_layers")
    if adapters is not None and forward is adapters.FusedLora.forward:
        return adapters.layer_of(module, x)
    return None


def _sees_every_module() -> bool:
    """Whether there are hooks on every module; private to torch, and where it is missing yes."""
    asks = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
    return asks is None or bool(asks())
