"""The table's entries for gated layers: the activation and the product between the projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from tilewright.adapt import undo
from tilewright.adapt.forms import DTYPES, FEW, PLAIN, derived, is_like, why_not_here
from tilewright.adapt.table import Replacement, Request, Site
from tilewright.adapt.together import project
from tilewright.ops import geglu, swiglu


class SplitForm:
    """Two projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        gate, up = project(x, layer.gate_proj, layer.up_proj)
        return layer.down_proj(gated(layer.act_fn, gate, up))


class JointForm:
    """One projection, the gate first."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        both = layer.gate_up_proj(hidden_states)
        return layer.down_proj(gated(layer.activation_fn, both))


_FORMS = ((LlamaMLP, SplitForm), (Qwen2_5_VLMLP, SplitForm), (Phi3MLP, JointForm))


def gated(activation: nn.Module, gate: torch.Tensor, up: torch.Tensor | None = None):
    """activation(gate) up by our operator, or by torch where that is as good or ours cannot."""
    operator = operator_of(activation)
    is_small = gate.device.type == "cpu" and gate.numel() < (FEW if up is not None else 2 * FEW)
    if (
        is_small
        or operator is None
        or type(gate) not in PLAIN
        or gate.dtype not in DTYPES
        or (up is not None and (type(up) is not type(gate) or up.dtype != gate.dtype))
        or activation._forward_hooks
        or activation._forward_pre_hooks
    ):
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        return activation(gate) * up
    return operator(gate, up)


def operator_of(activation: nn.Module) -> Callable | None:
    """Ours for one of transformers' activations, or None."""
    cls = type(activation)
    if cls is SiLUActivation or cls is nn.SiLU:
        return swiglu
    if cls is GELUTanh and isinstance(activation.act, functools.partial):
        return _geglu_tanh
    if cls is GELUActivation and activation.act is nn.functional.gelu:
        return geglu
    return None


def _geglu_tanh(gate, up=None):
    return geglu(gate, up, approximate="tanh")


@functools.cache
def fused_class(base: type) -> type | None:
    """The subclass that takes our operator, or None."""
    for known, form in _FORMS:
        if is_like(base, known):
            return derived(base, (fused_class, (base,)), form)
    return None


def _activation(module: nn.Module) -> Any:
    return getattr(module, "act_fn", getattr(module, "activation_fn", None))


def _is_gated(module: nn.Module) -> bool:
    has = module._modules.__contains__
    return has("down_proj") and (has("gate_up_proj") or (has("gate_proj") and has("up_proj")))


def is_silu_gated(module: nn.Module) -> bool:
    return _is_gated(module) and operator_of(_activation(module)) in (swiglu, None)


def is_gelu_gated(module: nn.Module) -> bool:
    return _is_gated(module) and operator_of(_activation(module)) in (geglu, _geglu_tanh)


def why_not(site: Site, request: Request) -> str | None:
    module = site.module
    if fused_class(module.__class__) is None:
        return "its forward is not down(activation(gate) up)"
    if operator_of(_activation(module)) is None:
        return f"its activation is {type(_activation(module)).__name__}"
    return why_not_here(site)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    for site in fitting:
        undo.set_attribute(site.module, "__class__", fused_class(site.module.__class__))
    return [""] * len(fitting)


SILU = Replacement("mlp", "swiglu", is_silu_gated, why_not, install)
GELU = Replacement("mlp", "geglu", is_gelu_gated, why_not, install)
