"""Inference over a packed weight on a CPU, with everything but x, bias and y worked out once:
when a first call has passed all checks.

The checks and records of a call can take Python as long as the kernel takes to read a small layer,
above all where weights have just pushed the interpreter out of the caches. What this cannot serve
goes the way of all other calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from tilewright import choose, settings
from tilewright.direct import may_go_direct
from tilewright.native import native
from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.packed_cpu import native_packed
from tilewright.ops.linear import cpp_cpu
from tilewright.ops.linear.problem import Problem
from tilewright.recording import keep


class _Prepared:
    """A weight's own part of the calls in one dtype."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, int8_activations: bool):
        tensors = weight.tensors().values()
        self.tensors = tuple(tensors)
        self.addresses = [t.data_ptr() for t in tensors]
        self.native = native().PreparedLinear(
            cpp_cpu.NAMES[dtype], weight.in_features, weight.out_features,
            native_packed(weight, int8_activations), int8_activations,
        )  # fmt: skip

    def is_current(self) -> bool:
        """Whether the tensors still lie where they lay; their values are free to change."""
        for t, address in zip(self.tensors, self.addresses, strict=True):
            if t.data_ptr() != address:
                return False
        return True


def _prepare(weight: PackedWeight, dtype: torch.dtype, int8_activations: bool) -> _Prepared | None:
    problem = Problem(
        device="cpu", dtype=dtype, tokens=1, in_features=weight.in_features,
        out_features=weight.out_features, format=weight.format, group_size=weight.group_size,
        int8_activations=int8_activations,
    )  # fmt: skip
    fits = (
        choose.choose("fused_linear", "auto", problem) == "cpp_cpu"
        and weight.input_order is None
        and (weight.offsets is None or weight.offsets.dtype == weight.scales.dtype)
        and all(t.is_contiguous() and t.is_cpu for t in weight.tensors().values())
    )
    return _Prepared(weight, dtype, int8_activations) if fits else None


_known: dict[int, tuple] = {}  # id(weight) -> (weak reference, {(dtype, int8_activations): ...})


def _calls_of(weight: PackedWeight) -> dict:
    found = _known.get(id(weight))
    if found is None or found[0]() is not weight:
        key = id(weight)
        found = weakref.ref(weight, lambda _: _known.pop(key, None)), {}
        _known[key] = found
    return found[1]


def remember(weight: PackedWeight, dtype: torch.dtype, int8_activations: bool) -> None:
    """Prepare for calls like one that has just been answered."""
    calls, key = _calls_of(weight), (dtype, int8_activations)
    known = calls.get(key)
    if key not in calls or (known is not None and not known.is_current()):
        calls[key] = _prepare(weight, *key)


def call(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, int8_activations: bool
) -> torch.Tensor | None:
    """y (..., O), or None where the call is not a plain one or nothing is prepared for it."""
    if not _serves(x):
        return None
    prepared = _ready(x, weight, bias, int8_activations)
    if prepared is None:
        return None
    y = x.new_empty(*x.shape[:-1], weight.out_features)
    bias = keep(cpp_cpu.floats(bias))
    prepared.native(
        x.data_ptr(), x.numel() // weight.in_features, y.data_ptr(),
        0 if bias is None else bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def call_together(
    x: torch.Tensor, layers: Sequence[tuple[PackedWeight, torch.Tensor | None]]
) -> tuple[torch.Tensor, ...] | None:
    """The same for several weights, each with its bias, over one x."""
    if len(layers) > cpp_cpu.MOST_LAYERS or not _serves(x):
        return None
    natives, biases = [], []
    for weight, bias in layers:
        prepared = _ready(x, weight, bias, False)
        if prepared is None:
            return None
        natives.append(prepared.native)
        biases.append(keep(cpp_cpu.floats(bias)))
    ys = [x.new_empty(*x.shape[:-1], weight.out_features) for weight, _ in layers]
    native().linear_prepared(
        natives, x.data_ptr(), x.numel() // x.shape[-1], [y.data_ptr() for y in ys],
        [0 if b is None else b.data_ptr() for b in biases], torch.get_num_threads(),
    )  # fmt: skip
    return tuple(ys)


def _serves(x: torch.Tensor) -> bool:
    return (
        may_go_direct(x) and x.is_cpu and bool(x.numel()) and x.dim() > 0
        and x.is_contiguous() and not x.is_neg()
        and settings.forced_impl() is None and not torch.is_autocast_enabled("cpu")
        and not (x.requires_grad and torch.is_grad_enabled())
    )  # fmt: skip


def _ready(x, weight: PackedWeight, bias, int8_activations: bool) -> _Prepared | None:
    """What is prepared for this weight, if the call with it is a plain one."""
    if x.shape[-1] != weight.in_features:
        return None
    if bias is not None and not (
        type(bias) in (torch.Tensor, torch.nn.Parameter) and bias.is_cpu
        and bias.dtype in cpp_cpu.NAMES and bias.shape == (weight.out_features,)
        and not (bias.requires_grad and torch.is_grad_enabled())
    ):  # fmt: skip
        return None
    prepared = _calls_of(weight).get((x.dtype, int8_activations))
    return prepared if prepared is not None and prepared.is_current() else None
