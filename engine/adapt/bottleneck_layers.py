"""Layers with an adapter of two narrow matrices beside or behind them.

    parallel:    y = layer(x) + scale up f(down x)
    sequential:  y = h + scale up f(down h),   h = layer(x)

Both matrices are parameters of the layer itself, whose other names stay as they are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.adapt.forms import derived
from tilewright.ops import fused_linear
from tilewright.quantized import QuantizedLinear

DOWN, UP = "adapter_down", "adapter_up"


@dataclass(frozen=True)
class Adapter:
    """How the layer's own two matrices are used."""

    scale: float
    activation: str


class ParallelForward:
    """Mixed in before a linear layer: one call of the operator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        if layer.kept is not None:
            return super().forward(x)  # type: ignore[misc]
        weight = layer.packed if isinstance(layer, QuantizedLinear) else layer.weight
        return fused_linear(
            x, weight, layer.bias, down=layer.adapter_down, up=layer.adapter_up,
            scale=layer.adapter.scale, activation=layer.adapter.activation,
        )  # fmt: skip


class SequentialForward:
    """Mixed in before a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        y = super().forward(x)  # type: ignore[misc]
        return y if layer.kept is not None else y + update(layer, y)


class ParallelLinear(ParallelForward, nn.Linear):
    """Over a dense weight."""


class SequentialLinear(SequentialForward, nn.Linear):
    """Over a dense weight."""


class ParallelQuantizedLinear(ParallelForward, QuantizedLinear):
    """Over a packed weight, which stays as it is."""


class SequentialQuantizedLinear(SequentialForward, QuantizedLinear):
    """Over a packed weight, which stays as it is."""


LINEAR: dict[tuple[str, type], type] = {
    ("parallel", nn.Linear): ParallelLinear,
    ("sequential", nn.Linear): SequentialLinear,
    ("parallel", QuantizedLinear): ParallelQuantizedLinear,
    ("sequential", QuantizedLinear): SequentialQuantizedLinear,
}
STOCK = {made: stock for (_, stock), made in LINEAR.items()}


class ParallelBlock:
    """Mixed in before a whole MLP or attention."""

    def forward(self, *args: Any, **kwargs: Any):
        x = args[0] if args else kwargs["hidden_states"]
        return _added(super().forward(*args, **kwargs), update(self, x))  # type: ignore[misc]


class SequentialBlock:
    """Mixed in before a whole MLP or attention."""

    def forward(self, *args: Any, **kwargs: Any):
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        h = out[0] if isinstance(out, tuple) else out
        return _added(out, update(self, h))


@functools.cache
def block_class(name: str, base: type) -> type:
    """The subclass of an MLP's or an attention's class that adds the adapter's forward."""
    form = ParallelBlock if name == "parallel" else SequentialBlock
    return derived(base, (block_class, (name, base)), form)


def _added(out, more: torch.Tensor):
    """The layer's result, of which the hidden states may be the first part alone."""
    return (out[0] + more, *out[1:]) if isinstance(out, tuple) else out + more


def update(layer: Any, u: torch.Tensor) -> torch.Tensor:
    """scale up f(down u)"""
    adapter, linear = layer.adapter, nn.functional.linear
    hidden = linear(u, layer.adapter_down.to(u.dtype))
    if adapter.activation == "relu":
        hidden = hidden.relu()
    return adapter.scale * linear(hidden, layer.adapter_up.to(hidden.dtype)).to(u.dtype)


def attach(
    layer: Any, name: str, adapter: Adapter, rank: int, n_in: int, n_out: int, generator
) -> None:
    """Make a layer one of ours, in place. down is drawn as PEFT draws LoRA's A."""
    is_linear = (name, type(layer)) in LINEAR
    device = next(t for t in (*layer.parameters(), *layer.buffers())).device
    bound = 1 / math.sqrt(n_in)
    down = torch.rand(rank, n_in, generator=generator) * 2 * bound - bound
    base: Any = type(layer)
    layer.__class__ = LINEAR[name, base] if is_linear else block_class(name, base)
    layer.register_parameter(DOWN, nn.Parameter(down.to(device)))
    layer.register_parameter(UP, nn.Parameter(torch.zeros(n_out, rank, device=device)))
    layer.adapter, layer.kept = adapter, None


def detach(layer: Any) -> None:
    """Make it what it was."""
    unmerge(layer)
    for name in (DOWN, UP, "adapter", "kept"):
        delattr(layer, name)
    layer.__class__ = STOCK.get(type(layer)) or type(layer).__mro__[_base_at(type(layer))]


def _base_at(made: type) -> int:
    """Where in its order of bases the class stands that `block_class` was given."""
    (_, (_, base)) = made._tilewright_recipe  # type: ignore[attr-defined]
    return made.__mro__.index(base)


@torch.no_grad()
def merge(layer: Any, name: str) -> None:
    """Into a dense weight, without an activation; the weight's old bits are kept."""
    if layer.kept is not None:
        return
    bias = layer.bias
    layer.kept = layer.weight.clone(), None if bias is None else bias.clone()
    low_rank = layer.adapter.scale * layer.adapter_up.double() @ layer.adapter_down.double()
    weight = layer.weight.double()
    if name == "parallel":
        layer.weight.copy_(weight + low_rank)
        return
    layer.weight.copy_(weight + low_rank @ weight)
    if bias is not None:
        bias.copy_(bias.double() + low_rank @ bias.double())


@torch.no_grad()
def unmerge(layer: Any) -> None:
    if layer.kept is None:
        return
    weight, bias = layer.kept
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    layer.kept = None
