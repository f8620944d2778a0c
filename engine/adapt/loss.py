"""The table's entry for models with an output head: in training their logits wait to be read."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tilewright.adapt import undo
from tilewright.adapt.deferred import DeferredLogits
from tilewright.adapt.forms import DTYPES, FEW, PLAIN, derived, is_hooked, why_not_here
from tilewright.adapt.table import Replacement, Request, Site

NOTE = "in training, with labels"


class HeadForm:
    """A linear layer that hands on what logits are made of, while its model asks for that."""

    _tilewright_defers = False

    def forward(self, input: torch.Tensor):
        head: Any = self
        if not head._tilewright_defers or not _takes(head, input):
            return super().forward(input)  # type: ignore[misc]
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return DeferredLogits.of(input, head.weight, head.bias)


def _takes(head: Any, x: torch.Tensor) -> bool:
    parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
    fits = all(
        type(t) in PLAIN and t.device == x.device and t.dtype in DTYPES for t in (x, *parameters)
    )
    alike = all(t.dtype == x.dtype for t in parameters)
    return (
        fits
        and (alike or torch.is_autocast_enabled(x.device.type))
        and x.shape[-1:] == head.weight.shape[1:]
        and x.numel() // x.shape[-1] * head.weight.shape[0] >= FEW
        and not is_hooked(head)
    )


@contextlib.contextmanager
def _deferring(head: Any):
    before = head._tilewright_defers
    head._tilewright_defers = True
    try:
        yield
    finally:
        head._tilewright_defers = before


@functools.cache
def fused_head(base: type) -> type:
    return derived(base, (fused_head, (base,)), HeadForm)


@functools.cache
def fused_model(base: type) -> type:
    """The subclass whose forward, given labels, has its head's logits wait."""
    stock = base.forward  # type: ignore[attr-defined]
    place = list(inspect.signature(stock).parameters).index("labels") - 1

    @functools.wraps(stock)  # the Trainer reads which arguments there are
    def forward(self, *args, **kwargs):
        labels = kwargs.get("labels", args[place] if len(args) > place else None)
        may_wait = self.training and torch.is_grad_enabled() and labels is not None
        if torch.compiler.is_compiling() or not may_wait or hasattr(self, "_is_replica"):
            return stock(self, *args, **kwargs)
        head = self.get_output_embeddings()
        if not isinstance(head, HeadForm):  # somebody gave the model another one
            return stock(self, *args, **kwargs)
        with _deferring(head):
            return stock(self, *args, **kwargs)

    return derived(base, (fused_model, (base,)), forward=forward)


def _head(module: nn.Module) -> Any:
    if not isinstance(module, PreTrainedModel):
        return None
    try:
        return module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _is_plain(head: nn.Module) -> bool:
    return head.__class__ in (nn.Linear, fused_head(nn.Linear))


def is_candidate(module: nn.Module) -> bool:
    if not isinstance(_head(module), nn.Module):
        return False
    return "labels" in inspect.signature(type(module).forward).parameters


def why_not(site: Site, request: Request) -> str | None:
    head = _head(site.module)
    if not _is_plain(head):
        return f"its output head is a {type(head).__name__}, not a plain linear layer"
    if is_hooked(head):
        return "its output head has hooks, or a forward of its own"
    if "forward" in vars(site.module):
        return "its forward was wrapped before"
    for t in head.parameters():
        if t.dtype not in DTYPES:
            return f"its output head is {t.dtype}"
    return why_not_here(site)


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    for site in fitting:
        head = _head(site.module)
        if not isinstance(head, HeadForm):  # which another model of the same head has changed
            undo.set_attribute(head, "__class__", fused_head(head.__class__))
        undo.set_attribute(site.module, "__class__", fused_model(site.module.__class__))
    return [NOTE] * len(fitting)


REPLACEMENT = Replacement("loss", "linear_cross_entropy", is_candidate, why_not, install)
