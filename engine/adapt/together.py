"""Projections of one input, as an attention layer's q, k and v, by one `linear_group`.

Only calls that would be one of our operator each, with nobody to see them, become one. The results
have the bits of separate calls; the gradient of the input is summed in float32.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import torch
from torch import nn

from tilewright.adapt.forms import PLAIN, is_hooked
from tilewright.ops import LinearLayer, linear_group


def project(x: torch.Tensor, *projections: nn.Module) -> tuple[torch.Tensor, ...]:
    """What each projection makes of x."""
    layers = _layers(x, projections)
    if layers is None:
        return tuple(projection(x) for projection in projections)
    return linear_group(x, layers)


_ready = threading.local()  # .results: id of a projection -> (its input, its result)


@contextlib.contextmanager
def made_ahead(x: torch.Tensor, *projections: nn.Module):
    """Within, each projection that is called with x itself finds its result ready, once."""
    layers = _layers(x, projections)
    if layers is None:
        yield
        return
    results = vars(_ready).setdefault("results", {})
    results |= {
        id(projection): (x, y)
        for projection, y in zip(projections, linear_group(x, layers), strict=True)
    }
    try:
        yield
    finally:
        for projection in projections:
            results.pop(id(projection), None)


def take_ready(projection: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The result that was made ahead for this call, or None."""
    if torch.compiler.is_compiling():
        return None
    results = vars(_ready).get("results")
    if not results or id(projection) not in results:
        return None
    of, y = results.pop(id(projection))
    return y if of is x else None


def is_ours(module: nn.Module | None) -> bool:
    """Whether the module's forward is one of those that call our operator."""
    return module is not None and _kind_of(module) is not None


def _kind_of(module: Any) -> str | None:
    forward: Any = type(module).forward
    quantized = sys.modules.get("tilewright.quantized")
    if quantized is not None and forward is quantized.QuantizedLinear.forward:
        return "packed"
    adapters = sys.modules.get("tilewright.adapt.lora_layers")
    if adapters is not None and forward is adapters.FusedLora.forward:
        return None if module.lora_variant else "adapted"  # DoRA scales the rows afterwards
    return None


def _layers(x: torch.Tensor, projections: tuple[nn.Module, ...]) -> list[LinearLayer] | None:
    if torch.compiler.is_compiling() or type(x) not in PLAIN or x.device.type != "cpu":
        return None  # there it would be one call each in any case
    if sees_every_module():
        return None
    found = []
    for projection in projections:
        layer = None if is_hooked(projection) else layer_of(projection, x)
        if layer is None:
            return None
        found.append(layer)
    return found


def layer_of(module: Any, x: torch.Tensor) -> LinearLayer | None:
    """What the module hands to our operator for this x, or None where it does something else."""
    if module._compiled_call_impl is not None or type(module).__call__ is not nn.Module.__call__:
        return None
    kind = _kind_of(module)
    if kind == "packed":
        return LinearLayer(module.packed, module.bias)
    if kind == "adapted":
        return sys.modules["tilewright.adapt.lora_layers"].layer_of(module, x)
    return None


def sees_every_module() -> bool:
    """Whether there are hooks on every module; private to torch, and where it is missing yes."""
    asks = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
    return asks is None or bool(asks())
