"""Logits that are made when something reads them: until then a hidden state and its head.

A loss needs the probabilities of its labels alone. What reaches torch's cross_entropy still
unread goes to `linear_cross_entropy`, and the logits are never in memory; anything else that is
done with them gets the tensor that the head would have given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from tilewright.ops import linear_cross_entropy


@dataclass(frozen=True)
class _Source:
    """x = outer (z or tanh(inner z)) with z = h weight^T + bias.

    h        (..., N) in the dtype of the product
    version  of the weight when the model ran
    """

    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    version: int
    inner: float = 1.0
    outer: float = 1.0
    has_tanh: bool = False

    def logits(self) -> torch.Tensor:
        storage = self.weight.untyped_storage()
        if self.weight._version != self.version or storage.size() == 0:
            raise RuntimeError(
                "tilewright: the logits of this step were not kept, and the weight of the output "
                "head has changed since, so they cannot be made any more. Read them before the "
                "optimizer's step, or call tilewright.restore(model) before the forward"
            )
        dtype, bias = self.h.dtype, self.bias
        with torch.autocast(self.h.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return F.linear(self.h, self.weight.to(dtype), bias)


class DeferredLogits:
    """(..., V): behaves like the tensor of logits, but is none before it is read."""

    def __init__(self, source: _Source, dtype: torch.dtype, make: Callable[[], torch.Tensor]):
        self._source = source
        self._make = make
        self._made: torch.Tensor | None = None
        self.dtype = dtype
        self.shape = torch.Size((*source.h.shape[:-1], source.weight.shape[0]))
        self.device = source.h.device
        self.ndim = len(self.shape)
        self.requires_grad = True
        self.is_cuda = self.device.type == "cuda"

    @classmethod
    def of(cls, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        source = _Source(h, weight, bias, weight._version)
        return cls(source, h.dtype, source.logits)

    def tensor(self) -> torch.Tensor:
        """The logits, made at the first call."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _then(self, source: _Source, f: Callable, dtype: torch.dtype | None = None):
        """What f makes of the logits; the same as a change of where they come from."""
        if self._made is not None:
            return f(self._made)
        return DeferredLogits(source, dtype or self.dtype, lambda: f(self.tensor()))

    # --- what does not read them ---

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, axis: int | None = None):
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        return self.shape[0]

    def float(self):
        return self._then(self._source, lambda t: t.float(), torch.float32)

    def contiguous(self):
        return self._then(self._source, lambda t: t.contiguous())

    def to(self, *args, **kwargs):
        if len(args) == 1 and not kwargs:
            wanted = args[0]
            if isinstance(wanted, torch.dtype) and wanted.is_floating_point:
                return self._then(self._source, lambda t: t.to(wanted), wanted)
            if isinstance(wanted, torch.device | str) and torch.device(wanted) == self.device:
                return self
        return self.tensor().to(*args, **kwargs)

    def view(self, *shape):
        return self._shaped("view", shape)

    def reshape(self, *shape):
        return self._shaped("reshape", shape)

    def _shaped(self, how: str, shape: tuple):
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
        if not sizes or sizes[-1] != self.shape[-1] or self._made is not None:
            return getattr(self.tensor(), how)(*shape)
        h = self._source.h
        source = replace(self._source, h=h.reshape(*sizes[:-1], h.shape[-1]))
        return self._then(source, lambda t: getattr(t, how)(*shape))

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [p for p in parts if not isinstance(p, torch.Tensor)]:
            place = next(i for i, p in enumerate(parts) if p is Ellipsis)
            missing = self.ndim - len(parts) + 1
            parts = (*parts[:place], *[slice(None)] * missing, *parts[place + 1 :])
        is_plain = all(isinstance(p, int | slice) and not isinstance(p, bool) for p in parts)
        keeps_classes = len(parts) < self.ndim or parts[-1] == slice(None)
        if not is_plain or len(parts) > self.ndim or not keeps_classes:
            return self.tensor()[index]
        source = replace(self._source, h=self._source.h[parts])
        return self._then(source, lambda t: t[index])

    def _times(self, factor, f: Callable):
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            return f(self.tensor())
        source = self._source
        return self._then(replace(source, outer=source.outer * factor), f)

    def __mul__(self, other):
        return self._times(other, lambda t: t * other)

    def __rmul__(self, other):
        return self._times(other, lambda t: other * t)

    def __truediv__(self, other):
        is_number = isinstance(other, int | float) and other != 0
        return self._times(1 / other if is_number else other, lambda t: t / other)

    def tanh(self):
        source = self._source
        if source.has_tanh:
            return self.tensor().tanh()
        changed = replace(source, inner=source.outer, outer=1.0, has_tanh=True)
        return self._then(changed, torch.tanh)

    def __repr__(self) -> str:
        if self._made is not None:
            return repr(self._made)
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}), not read so far"

    # --- what does ---

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __array__(self, *args, **kwargs):
        return self.tensor().__array__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return (_itself, (self.tensor(),))

    def __deepcopy__(self, memo):
        return self.tensor().__deepcopy__(memo)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy and isinstance(args[0], DeferredLogits):
            loss = args[0]._cross_entropy(*args[1:], **kwargs)
            if loss is not None:
                return loss
        if function is torch.tanh and isinstance(args[0], DeferredLogits) and not kwargs:
            return args[0].tanh()
        args, kwargs = tree_map(
            lambda t: t.tensor() if isinstance(t, DeferredLogits) else t, (args, kwargs)
        )
        return function(*args, **kwargs)

    def _cross_entropy(self, *args, **kwargs) -> torch.Tensor | None:
        """By our operator; None where that does not compute it."""
        given = _CROSS_ENTROPY.bind(self, *args, **kwargs)
        given.apply_defaults()
        o, source = given.arguments, self._source
        target = o["target"]
        if (
            self._made is not None
            or type(target) is not torch.Tensor
            or target.dtype != torch.int64
            or target.shape != self.shape[:-1]
            or self.ndim != 2
            or o["size_average"] is not None
            or o["reduce"] is not None
            or not (source.outer > 0 or not source.has_tanh)
            or target.device != self.device
        ):
            return None
        scale = source.outer * (source.inner if source.has_tanh else 1.0)
        with torch.autocast(self.device.type, enabled=False):
            loss = linear_cross_entropy(
                source.h, source.weight.to(source.h.dtype), target, bias=source.bias,
                ignore_index=o["ignore_index"], reduction=o["reduction"],
                label_smoothing=o["label_smoothing"], class_weight=o["weight"],
                logit_scale=scale, softcap=source.outer if source.has_tanh else None,
            )  # fmt: skip
        return loss.to(self.dtype)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _reads(name: str):
    def method(self, *args):
        return getattr(self.tensor(), name)(*args)

    method.__name__ = name
    return method


# Python looks operators up on the class, where __getattr__ is not asked
for _name in (
    "add radd sub rsub rtruediv floordiv mod pow rpow matmul rmatmul neg abs invert "
    "eq ne lt le gt ge and or xor iter contains bool int float index setitem"
).split():
    setattr(DeferredLogits, f"__{_name}__", _reads(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]  # as a tensor's, by identity

_CROSS_ENTROPY = inspect.signature(F.cross_entropy)
