"""The table's entry for PEFT's LoRA on experts (`target_parameters`), which is never folded in."""

from __future__ import annotations

import sys

from torch import nn

from tilewright.adapt import experts, undo
from tilewright.adapt.experts_scaled import ScaledExperts
from tilewright.adapt.table import Replacement, Request, Site

WEIGHTS = ("gate_up_proj", "down_proj")


def is_candidate(module: nn.Module) -> bool:
    """PEFT's wrapper of a weight of all experts."""
    if "peft" not in sys.modules:  # then no module can be one of its
        return False
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(module, ParamWrapper):
        return False
    base = module.get_base_layer()
    return isinstance(base, ScaledExperts) or experts.is_candidate(base)


def why_not(site: Site, request: Request) -> str | None:
    from peft.tuners.lora.layer import ParamWrapper

    wrapper = site.module
    if type(wrapper) is not ParamWrapper:
        return f"peft.{type(wrapper).__name__} is not a layer we know"
    if wrapper.parameter_name not in WEIGHTS:
        return f"{wrapper.parameter_name} is no weight of moe_mlp"
    base = wrapper.get_base_layer()
    return None if isinstance(base, ScaledExperts) else experts.why_not_experts(base)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    """Swap PEFT's class for a subclass that hands the factors over instead of folding them."""
    from tilewright.adapt.experts_lora_layers import UnfoldedExperts

    for site in fitting:
        undo.set_attribute(site.module, "__class__", UnfoldedExperts)
    return ["" for _ in fitting]


REPLACEMENT = Replacement("lora", "moe_mlp", is_candidate, why_not, install)
