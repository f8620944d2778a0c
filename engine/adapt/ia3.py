"""The table's entry for (IA)^3: PEFT's layers that scale their output, which the operator can."""

from __future__ import annotations

import sys

from torch import nn

from tilewright.adapt import undo
from tilewright.adapt.table import Replacement, Request, Site


def is_candidate(module: nn.Module) -> bool:
    if "peft" not in sys.modules:  # then no module can be one of its
        return False
    from tilewright.adapt import ia3_layers

    return ia3_layers.is_ia3_linear(module)


def why_not(site: Site, request: Request) -> str | None:
    from tilewright.adapt import ia3_layers

    return ia3_layers.why_not_fused(site.module) or ia3_layers.why_stock(site.module)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    from tilewright.adapt import ia3_layers

    for site in fitting:
        undo.set_attribute(site.module, "__class__", ia3_layers.FusedIA3)
    return ["while its vector does not train"] * len(fitting)


REPLACEMENT = Replacement("ia3", "fused_linear", is_candidate, why_not, install)
