"""Which stock class or function a module computes, told by its source: nothing is told by a name.

A model's own file repeats the norm, the gated layer and the rotary function of Llama, Gemma, Olmo
or Phi, under names of its own. What has the source of one of these computes the same.
"""

from __future__ import annotations

import ast
import copyreg
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType

import torch
from torch import nn

from tilewright.native import why_not_native

PLAIN = (torch.Tensor, nn.Parameter)  # no DTensor, whose data_ptr() is not the whole tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 1 << 16  # elements: below, torch's short chains of operators take less than one call of ours


@functools.cache
def form_of(function: Callable) -> str | None:
    """The source without name, annotations, docstring and comments; None if it cannot be read."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    try:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError, ValueError):  # defined at a prompt, or not alone
        return None
    if not isinstance(found, ast.FunctionDef):
        return None
    body = found.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    arguments = [a.arg for a in (*found.args.posonlyargs, *found.args.args)]
    return "\n".join([", ".join(arguments), *map(ast.unparse, body)])


def methods_of(cls: type) -> dict[str, str | None]:
    """The forms of `forward` and of the methods that a norm's calls."""
    return {
        name: form_of(getattr(cls, name)) for name in ("forward", "_norm") if hasattr(cls, name)
    }


def is_like(cls: type, known: type) -> bool:
    """Whether both compute the same, by their source."""
    forms = methods_of(known)
    return None not in forms.values() and methods_of(cls) == forms


def why_not_here(site) -> str | None:
    """What speaks against any replacement of this module."""
    if site.owner is None:
        return "there is no PreTrainedModel around it"
    for t in site.module.parameters(recurse=False):
        if t.dtype not in DTYPES:
            return f"its parameters are {t.dtype}"
    first = next(site.owner.parameters(), None)
    if first is not None and first.device.type == "cpu":
        return why_not_native()
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether anything would see, or change, a call of this module that we leave out."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)


# --- classes that add nothing but a forward ---


class Made(type):
    """The type of classes that were made here, which are pickled by how they are made again."""

    _tilewright_recipe: tuple[Callable, tuple]


class Renewed:
    """A module whose class was made here: copied and pickled by how the class is made again."""

    _tilewright_recipe: tuple[Callable, tuple]

    def __reduce_ex__(self, protocol):
        made: tuple = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return (_renew, self._tilewright_recipe, *made[2:])


def _make(factory: Callable, arguments: tuple) -> Made:
    return factory(*arguments)


copyreg.pickle(Made, lambda cls: (_make, cls._tilewright_recipe))


def _renew(factory: Callable, arguments: tuple):
    cls = factory(*arguments)
    return cls.__new__(cls)


def derived(base: type, recipe: tuple[Callable, tuple], *mixins: type, **attributes) -> type:
    """A subclass of `base` with its name, which some code of transformers goes by."""
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    kind = Made if type(base) is type else type(base)
    return kind(
        base.__name__,
        (*mixins, base) if issubclass(base, Renewed) else (Renewed, *mixins, base),
        {"_tilewright_recipe": recipe, **named} | attributes,
    )
