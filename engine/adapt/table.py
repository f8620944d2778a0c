"""What can be replaced in a transformers model: one entry for each kind of module.

A room that can take over another kind of module adds an entry; nothing here names a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What the user asked `accelerate` for, already checked.

    group_size   of shifted-sparse attention in training; 0 is dense
    """

    group_size: int = 0


@dataclass(frozen=True)
class Site:
    """A module and where it stands.

    name    its path in the model
    owner   the innermost PreTrainedModel around it, or None
    """

    name: str
    module: Any
    owner: PreTrainedModel | None

    @property
    def class_name(self) -> str:
        return type(self.module).__name__


@dataclass(frozen=True)
class Replacement:
    """One kind of module that an operator of ours can serve.

    kind           how the report calls it
    operator       the public function that takes over
    is_candidate   whether a module is of this kind at all
    why_not        why this one cannot be replaced, or None
    install        replaces the sites that fit, through `undo` so that it can be taken back; gets
                   those that do not fit as well, each with its reason, and returns for each that
                   fits a note for the report
    """

    kind: str
    operator: str
    is_candidate: Callable[[nn.Module], bool]
    why_not: Callable[[Site, Request], str | None]
    install: Callable[[list[Site], list[tuple[Site, str]], Request], list[str]]


def sites(model: nn.Module) -> list[Site]:
    """Every module once, in the order of named_modules()."""
    found: list[Site] = []
    owners: dict[str, PreTrainedModel | None] = {}
    for name, module in model.named_modules():
        owner = owners.get(name.rpartition(".")[0]) if name else None
        if isinstance(module, PreTrainedModel):
            owner = module
        owners[name] = owner
        found.append(Site(name, module, owner))
    return found
