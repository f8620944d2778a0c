"""The table's entry for rotary positions: attention layers that call `apply_rotary_pos_emb`.

The layer gets a subclass whose forward is the stock one with that one name bound to ours; its file,
and other models that were built from it, keep their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from tilewright.adapt import undo
from tilewright.adapt.forms import DTYPES, PLAIN, derived, form_of, why_not_here
from tilewright.adapt.table import Replacement, Request, Site
from tilewright.ops import rope

NAME = "apply_rotary_pos_emb"
_KNOWN = (modeling_llama, modeling_gpt_neox, modeling_phi3)  # whole heads, and parts of heads
_TWICE = "torch.cat((freqs, freqs), dim=-1)"  # how the tables come to hold each angle twice


def turning(stock: Callable) -> Callable:
    """What transformers' function computes, one pass over each of q and k."""

    def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
        if not _takes(q, k, cos, sin, unsqueeze_dim):
            return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        n = cos.shape[-1] // 2
        cos, sin = cos[..., :n], sin[..., :n]
        first = unsqueeze_dim == 1
        return rope(q, cos, sin, heads_first=first), rope(k, cos, sin, heads_first=first)

    return apply_rotary


def _takes(q, k, cos, sin, unsqueeze_dim) -> bool:
    return (
        type(q) in PLAIN
        and type(k) in PLAIN
        and q.dtype in DTYPES
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and (cos.dtype == q.dtype or _is_rounded_next(q, cos))
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and unsqueeze_dim in (1, 2)
        and not (cos.requires_grad or sin.requires_grad)
        and q.device == cos.device
    )


def _is_rounded_next(q: torch.Tensor, cos: torch.Tensor) -> bool:
    """Under autocast float32 tables make q and k float32, until the products of attention round
    them to q's dtype: rounding at once is the same."""
    device = q.device.type
    return (
        cos.dtype == torch.float32
        and torch.is_autocast_enabled(device)
        and q.dtype == torch.get_autocast_dtype(device)
    )


def is_candidate(module: nn.Module) -> bool:
    forward: Any = getattr(type(module), "forward", None)
    return NAME in getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())


def why_not(site: Site, request: Request) -> str | None:
    return why_not_class(site.module.__class__) or why_not_here(site)


@functools.cache
def why_not_class(cls: Any) -> str | None:
    forward: Any = cls.forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return "its forward is wrapped"
    others = [n for n in forward.__code__.co_names if n.startswith(NAME) and n != NAME]
    if others:
        return f"it may call {others[0]} instead"
    names = forward.__globals__
    function, half = names.get(NAME), names.get("rotate_half")
    known = [m for m in _KNOWN if form_of(m.apply_rotary_pos_emb) is not None]
    fits = any(
        form_of(function) == form_of(m.apply_rotary_pos_emb)
        and form_of(half) == form_of(m.rotate_half)
        for m in known
    )
    if not fits:
        return f"its {NAME} is none of those that rope computes"
    for value in list(names.values()):
        if isinstance(value, type) and value.__name__.endswith("RotaryEmbedding"):
            try:
                source = inspect.getsource(value)
            except (OSError, TypeError):
                source = ""
            if _TWICE not in source:
                return f"{value.__name__} may have tables whose halves differ"
    return None


@functools.cache
def fused_class(base: Any) -> type:
    """The subclass whose forward calls ours."""
    stock: Any = base.forward
    names = dict(stock.__globals__)
    names[NAME] = turning(names[NAME])
    forward = FunctionType(
        stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__
    )
    functools.update_wrapper(forward, stock)
    del vars(forward)["__wrapped__"]
    forward.__kwdefaults__ = stock.__kwdefaults__
    return derived(base, (fused_class, (base,)), forward=forward)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    for site in fitting:
        undo.set_attribute(site.module, "__class__", fused_class(site.module.__class__))
    return [""] * len(fitting)


REPLACEMENT = Replacement("rope", "rope", is_candidate, why_not, install)
