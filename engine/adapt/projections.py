"""The table's entry for q, k and v of an attention layer that are all layers of ours already.

The layer gets a subclass whose forward makes the three results by one `linear_group` and then runs
the stock forward, in which each projection, called as ever, hands over the one that is ready.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from tilewright.adapt import undo
from tilewright.adapt.forms import derived, form_of, why_not_here
from tilewright.adapt.table import Replacement, Request, Site
from tilewright.adapt.together import is_ours, made_ahead

NAMES = ("q_proj", "k_proj", "v_proj")


class AheadForm:
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        layer: Any = self
        stock = super().forward  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return stock(hidden_states, *args, **kwargs)
        with made_ahead(hidden_states, layer.q_proj, layer.k_proj, layer.v_proj):
            return stock(hidden_states, *args, **kwargs)


def _beginning(cls: Any) -> list[str] | None:
    """The statements up to v, where the projections are one after the other and nowhere else."""
    form = form_of(cls.forward)
    if form is None or any(form.count(f"self.{name}(hidden_states)") != 1 for name in NAMES):
        return None
    if any(form.count(name) != 1 for name in NAMES) or not form.startswith("self, hidden_states"):
        return None
    lines = form.split("\n")[1:]
    last = next(n for n, line in enumerate(lines) if NAMES[-1] in line)
    return lines[: last + 1]


@functools.cache
def _known() -> tuple[list[str] | None, ...]:
    return _beginning(LlamaAttention), _beginning(Qwen3Attention)


@functools.cache
def fused_class(base: type) -> type | None:
    """The subclass that has its projections made ahead, or None."""
    beginning = _beginning(base)
    if beginning is None or beginning not in _known():
        return None
    return derived(base, (fused_class, (base,)), AheadForm)


def is_candidate(module: nn.Module) -> bool:
    return all(is_ours(module._modules.get(name)) for name in NAMES)


def why_not(site: Site, request: Request) -> str | None:
    if fused_class(site.module.__class__) is None:
        return "its forward does not begin with q_proj, k_proj and v_proj of one input"
    tensors = itertools.chain(site.module.parameters(), site.module.buffers())
    if next(tensors).device.type != "cpu":
        return "on a GPU each projection is one call anyway"
    return why_not_here(site)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    for site in fitting:
        undo.set_attribute(site.module, "__class__", fused_class(site.module.__class__))
    return [""] * len(fitting)


REPLACEMENT = Replacement("q, k, v", "linear_group", is_candidate, why_not, install)
