"""The table's entry for LoRA: PEFT's layers, whose base product and update become one operator."""

from __future__ import annotations

import sys

from torch import nn

from tilewright.adapt import undo
from tilewright.adapt.table import Replacement, Request, Site


def is_candidate(module: nn.Module) -> bool:
    """One of PEFT's LoRA layers around a linear layer, whatever its weight is stored as."""
    if "peft" not in sys.modules:  # then no module can be one of its
        return False
    from tilewright.adapt import lora_layers

    return lora_layers.is_lora_linear(module)


def why_not(site: Site, request: Request) -> str | None:
    from tilewright.adapt import lora_layers

    layer = site.module
    reason = lora_layers.why_not_fused(layer) or lora_layers.why_stock(layer)
    if reason is None:
        try:
            lora_layers.base_weight(layer)
        except ValueError as error:
            reason = f"its base cannot be read: {error}"
    return reason


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    """Swap the classes of PEFT's layers for subclasses that add nothing but a forward."""
    from tilewright.adapt import lora_dora, lora_layers

    notes = []
    for site in fitting:
        note = lora_layers.note(site.module)
        read = vars(site.module).pop(lora_layers.PACKED, None)
        undo.set_attribute(site.module, lora_layers.PACKED, read)
        if site.module.lora_variant:
            undo.set_attribute(site.module, lora_dora.SQUARES, None)
        undo.set_attribute(site.module, "__class__", lora_layers.fused_class(type(site.module)))
        notes.append(note)
    return notes


REPLACEMENT = Replacement("lora", "lora_linear", is_candidate, why_not, install)
