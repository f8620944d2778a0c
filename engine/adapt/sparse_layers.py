"""Linear layers with a sparse delta beside their weight, and what they see of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewright.ops import (
    Regrowth,
    WeightDelta,
    fused_linear,
    largest_gradients,
    merge_delta,
    sampled_product,
    unmerge_delta,
)
from tilewright.quantized import QuantizedLinear

PARTS = ("delta_offsets", "delta_columns", "delta_values")


class SparseForward:
    """y = (W + D) x + bias. Mixed in before the class whose W it is.

    delta_values    (N,) the parameter that trains
    delta_offsets   (O + 1,) int64 and
    delta_columns   the bytes of (N,) columns: buffers, where the values are. Neither gloo nor NCCL
                    knows int16, and DistributedDataParallel sends buffers from rank to rank
    watch           what sees the gradients of a window of steps, or None
    kept            what `merge_delta` overwrote in W while D is merged into it, else None
    """

    watch: Watch | None
    kept: torch.Tensor | None

    @property
    def delta(self) -> WeightDelta:
        """D as the operators take it."""
        layer: Any = self
        tensors = tuple(getattr(layer, name) for name in PARTS)
        cached = vars(layer).get("_delta")
        if cached is None or any(a is not b for a, b in zip(cached[0], tensors, strict=True)):
            offsets, columns, values = tensors
            columns = columns.view(WeightDelta.columns_dtype(layer.in_features))
            cached = (
                tensors,
                WeightDelta(layer.out_features, layer.in_features, offsets, columns, values),
            )
            vars(layer)["_delta"] = cached
        return cached[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        if layer.kept is not None:
            return super().forward(x)  # type: ignore[misc]
        y = fused_linear(x, _weight(layer), layer.bias, delta=layer.delta)
        if layer.watch is not None and torch.is_grad_enabled() and y.requires_grad:
            y = _Watched.apply(y, x, layer.watch)
        return y


class SparseLinear(SparseForward, nn.Linear):
    """Over a dense weight."""


class SparseQuantizedLinear(SparseForward, QuantizedLinear):
    """Over a packed weight, which stays as it is."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_delta"}


SPARSE = {nn.Linear: SparseLinear, QuantizedLinear: SparseQuantizedLinear}
STOCK = {sparse: stock for stock, sparse in SPARSE.items()}


class _Watched(torch.autograd.Function):
    """Changes nothing; on the way back the watch sees dy and x."""

    @staticmethod
    def forward(ctx, y, x, watch):
        ctx.save_for_backward(x)
        ctx.watch = watch
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.watch.see(dy, x)
        return dy, None, None


class Watch:
    """Statistics of the gradient at the places where it was largest in the first micro-batch.

    candidates   (C,) int64 flat places, ascending; None before the first micro-batch
    sums         (C,) float32 of the gradients of the steps so far
    squares      (C,) float32 of their squares
    steps        optimizer steps that these are of
    """

    def __init__(self, n_out: int, n_in: int, n_candidates: int):
        self.shape, self.n_candidates = (n_out, n_in), n_candidates
        self.candidates: torch.Tensor | None = None
        self.sums = self.squares = self._step = torch.zeros(0)
        self._places: WeightDelta | None = None
        self.steps = 0

    def see(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """A micro-batch: its gradient adds to that of the step. As in autocast, x is as dy is."""
        x = x.detach().to(dy.dtype)
        if self._places is None:
            self.candidates = largest_gradients(dy, x, self.n_candidates)
            self.sums, self.squares, self._step = (
                torch.zeros(self.n_candidates, device=dy.device) for _ in range(3)
            )
            self._places = WeightDelta.from_flat(self.candidates, self.sums, *self.shape)
        self._step += sampled_product(dy, x, self._places)

    def end_step(self) -> None:
        """The optimizer has made a step."""
        self.sums += self._step
        self.squares += self._step.square()
        self._step.zero_()
        self.steps += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """What resuming in the middle of a window needs."""
        if self.candidates is None:
            return {}
        return {"candidates": self.candidates, "sums": self.sums, "squares": self.squares}

    def restore(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Go on after `steps` steps, from what `tensors` gave then."""
        self.steps = steps
        if "candidates" not in tensors:
            return
        self.candidates = tensors["candidates"]
        self.sums, self.squares = tensors["sums"].clone(), tensors["squares"].clone()
        self._step = torch.zeros_like(self.sums)
        self._places = WeightDelta.from_flat(self.candidates, self.sums, *self.shape)


def attach(layer: nn.Linear, delta: WeightDelta) -> None:
    """Make a layer one of ours, in place."""
    layer.__class__ = SPARSE[type(layer)]
    layer.register_buffer("delta_offsets", delta.row_offsets)
    layer.register_buffer("delta_columns", delta.short().columns.view(torch.uint8))
    layer.register_parameter("delta_values", nn.Parameter(delta.values))
    layer.watch = layer.kept = None  # type: ignore[assignment]


def detach(layer: nn.Linear) -> WeightDelta:
    """Make it what it was, and return its delta."""
    unmerge(layer)
    delta = layer.delta.map(torch.Tensor.detach)  # type: ignore[operator, union-attr]
    for name in (*PARTS, "watch", "kept"):
        delattr(layer, name)
    vars(layer).pop("_delta", None)
    layer.__class__ = STOCK[type(layer)]
    return delta


def merge(layer: Any) -> None:
    if layer.kept is None:
        layer.kept = merge_delta(_weight(layer), layer.delta)


def _weight(layer: Any):
    """The weight itself: that of a packed layer reads as a copy of it."""
    return layer.packed if isinstance(layer, QuantizedLinear) else layer.weight


def unmerge(layer: Any) -> None:
    if layer.kept is not None:
        unmerge_delta(layer.weight, layer.delta, layer.kept)
        layer.kept = None


@torch.no_grad()
def set_delta(layer: Any, regrown: Regrowth) -> None:
    """Move the values in place: optimizers hold the parameter."""
    new = regrown.delta
    layer.delta_offsets.copy_(new.row_offsets)
    layer.delta_columns.copy_(new.short().columns.view(torch.uint8))
    layer.delta_values.copy_(new.values)
    layer.delta_values.grad = None
