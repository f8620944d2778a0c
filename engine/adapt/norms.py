"""The table's entries for norms: transformers' RMSNorm classes and torch's LayerNorm."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tilewright.adapt import undo
from tilewright.adapt.forms import DTYPES, FEW, PLAIN, derived, is_like, why_not_here
from tilewright.adapt.table import Replacement, Request, Site
from tilewright.ops import layer_norm, rms_norm

LLAMA, GEMMA = "llama", "gemma"  # castings of rms_norm


class RmsForm:
    """What the forms of RMSNorm share: `options` are those of rms_norm."""

    weight: torch.Tensor  # of the class that the form is mixed into
    EPS = "variance_epsilon"
    CASTING = LLAMA
    OFFSET = 0.0

    def options(self) -> dict[str, Any]:
        """Beside x and the weight."""
        eps = getattr(self, self.EPS)
        return {"eps": eps, "casting": self.CASTING, "weight_offset": self.OFFSET}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm: Any = self
        if not _takes(x, norm.weight):
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, norm.weight, **self.options())


class LlamaForm(RmsForm):
    """Rounds before the weight."""


class OlmoForm(RmsForm):
    """Rounds once."""

    CASTING = GEMMA


class GemmaForm(RmsForm):
    """Rounds once, and keeps its weight less 1."""

    EPS, CASTING, OFFSET = "eps", GEMMA, 1.0


class LayerForm:
    """LayerNorm over the last axis."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        norm: Any = self
        weight, bias = norm.weight, norm.bias
        if (
            type(input) not in PLAIN
            or (input.device.type == "cpu" and _torch_is_as_quick(input))
            or not _is_ordinary(input, weight, bias)
            or torch.is_autocast_enabled(input.device.type)
        ):
            return super().forward(input)  # type: ignore[misc]
        return layer_norm(input, weight, bias, eps=norm.eps)


_FORMS = ((LlamaRMSNorm, LlamaForm), (GemmaRMSNorm, GemmaForm), (Olmo2RMSNorm, OlmoForm))


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and x.dtype in DTYPES
        and weight.dtype in DTYPES
        and x.dim() > 0
        and x.shape[-1:] == weight.shape
        and x.device == weight.device
    )


def _torch_is_as_quick(x: torch.Tensor) -> bool:
    """torch's LayerNorm on a CPU is at its best in float32, and where a call is short."""
    return x.dtype == torch.float32 or x.numel() < 2 * FEW


def _is_ordinary(x, weight, bias) -> bool:
    """What torch would take as well; of any other call it shall word the error."""
    if x.dtype not in DTYPES:
        return False
    kept = [t for t in (weight, bias) if t is not None]
    return all(
        type(t) in PLAIN
        and t.dtype in (x.dtype, torch.float32)
        and t.dtype == kept[0].dtype
        and t.shape == x.shape[-1:]
        and t.device == x.device
        for t in kept
    )


@functools.cache
def fused_class(base: type) -> type | None:
    """The subclass that takes our operator, or None."""
    if base is nn.LayerNorm:
        return derived(base, (fused_class, (base,)), LayerForm)
    for known, form in _FORMS:
        if is_like(base, known):
            return derived(base, (fused_class, (base,)), form)
    return None


def is_rms_norm(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__name__.endswith("RMSNorm") or any(is_like(cls, known) for known, _ in _FORMS)


def is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


def why_not(site: Site, request: Request) -> str | None:
    if fused_class(site.module.__class__) is None:
        return "its forward is none of those that rms_norm and layer_norm compute"
    norm = site.module
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return f"it normalises over {len(norm.normalized_shape)} axes at once"
    return why_not_here(site)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    for site in fitting:
        undo.set_attribute(site.module, "__class__", fused_class(site.module.__class__))
    return [""] * len(fitting)


RMS = Replacement("norm", "rms_norm", is_rms_norm, why_not, install)
LAYER = Replacement("norm", "layer_norm", is_layer_norm, why_not, install)
