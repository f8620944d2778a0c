"""What was changed on a model's modules, kept on those modules, and put back exactly.

Each changed module holds its own list, so that a model may be copied, wrapped or taken apart
between the change and the restoration.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn
from transformers import PreTrainedConfig

_LOG = "_tilewright_changes"  # attribute of a changed module: list[Change], oldest first


class _Missing(Enum):
    """A member of an Enum stays itself under deepcopy and pickle, unlike a plain object()."""

    MISSING = 0


@dataclass
class ConfigSwap:
    """A model's own copy of a configuration that other models may share.

    agreed   the copy's entries as they were when the model was handed back to the user
    """

    original: PreTrainedConfig
    own: PreTrainedConfig
    agreed: dict = field(default_factory=dict)

    def seal(self) -> None:
        self.agreed = {
            name: copy.deepcopy(value)
            for name, value in vars(self.own).items()
            if not isinstance(value, PreTrainedConfig)
        }

    def carry_over(self) -> None:
        """Repeat on the original what the user changed on the copy, as by resizing embeddings."""
        for name, value in vars(self.own).items():
            if name == "_attn_implementation_internal" or isinstance(value, PreTrainedConfig):
                continue
            if name not in self.agreed or self.agreed[name] != value:
                vars(self.original)[name] = value


@dataclass
class Change:
    """An attribute, or the requires_grad flag of a parameter, and what it was before."""

    name: str
    before: object
    is_requires_grad: bool = False


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """module.name = value, remembering what was there. `value` may be a method or a buffer."""
    own = any(name in getattr(module, kind) for kind in ("_buffers", "_parameters", "_modules"))
    is_instance_attribute = own or name in vars(module) or name == "__class__"
    before = getattr(module, name) if is_instance_attribute else _Missing.MISSING
    _log(module).append(Change(name, before))
    setattr(module, name, value)


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """The flag of module's own parameter `name`, remembering what it was."""
    parameter = module.get_parameter(name)
    if parameter.requires_grad != flag:
        _log(module).append(Change(name, parameter.requires_grad, is_requires_grad=True))
        parameter.requires_grad_(flag)


def own_configs(model: nn.Module) -> list[ConfigSwap]:
    """Give the modules their own copies of all configurations they hold; nested ones as well."""
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]
    copies: dict = {}
    swaps: dict[int, ConfigSwap] = {}
    for module, name, config in held:
        own = copy.deepcopy(config, copies)
        swap = swaps.setdefault(id(config), ConfigSwap(config, own))
        _log(module).append(Change(name, swap))
        setattr(module, name, own)
    return list(swaps.values())


def is_changed(model: nn.Module) -> bool:
    return any(_LOG in vars(module) for module in model.modules())


def undo(model: nn.Module) -> None:
    """Put back everything, on all modules inside model."""
    swaps: dict[int, ConfigSwap] = {}  # by the id of the copy
    for module in model.modules():
        for change in reversed(vars(module).pop(_LOG, [])):
            if isinstance(change.before, ConfigSwap):
                swap = change.before
                swaps[id(swap.own)] = swap
                setattr(module, change.name, swap.original)
            else:
                _put_back(module, change)
    for swap in swaps.values():
        swap.carry_over()
    # wrappers that were built in the meantime hold the copies as well
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in swaps and value is swaps[id(value)].own:
                setattr(module, name, swaps[id(value)].original)


def _log(module: nn.Module) -> list[Change]:
    return vars(module).setdefault(_LOG, [])


def _put_back(module: nn.Module, change: Change) -> None:
    if change.is_requires_grad:
        parameter = module._parameters.get(change.name)
        if parameter is not None:
            parameter.requires_grad_(bool(change.before))
    elif change.before is _Missing.MISSING:
        delattr(module, change.name)
    else:
        before, now = change.before, getattr(module, change.name, None)
        if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
            before = before.to(now.device, now.dtype)  # the model may have moved since
        setattr(module, change.name, before)
