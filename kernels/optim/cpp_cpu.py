"""torch tensors -> pointers of the C++ kernels (csrc/optim)."""

from __future__ import annotations

import math

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NUMBERS, why_not_on_cpu
from tilewright.ops.optim.problem import STOCHASTIC, Problem


def why_not(p: Problem) -> str | None:
    return why_not_on_cpu(p.device, p.dtype)


def _plain(t: torch.Tensor) -> torch.Tensor:
    if t.is_contiguous() and not t.is_neg():
        return t
    return t.contiguous().resolve_neg()


def _address(tensors, i: int) -> int:
    return tensors[i].data_ptr() if tensors else 0


def adamw_update(
    parameters, gradients, means, squares, ages, places, masters, mean_scales, square_scales,
    gradient_scale, lr, beta1, beta2, eps, weight_decay, rounding, keys,
) -> None:  # fmt: skip
    scale = 1.0 if gradient_scale is None else float(gradient_scale)
    if not math.isfinite(scale) or not parameters:
        return
    first = parameters[0]
    of_gradient = first.dtype
    if any(g.dtype != of_gradient for g in gradients):
        of_gradient = torch.float32
    held, copies = [], []
    fields: list[int] = []
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if not p.is_contiguous():
            copies.append((p, _plain(p)))
            p = copies[-1][1]
        g = _plain(g if g.dtype == of_gradient else g.to(of_gradient))
        held.append(g)
        m, v, age = means[i].data_ptr(), squares[i].data_ptr(), ages[i].data_ptr()
        state = (0, 0, m, v) if mean_scales else (m, v, 0, 0)
        fields += (
            means[i].numel(), p.data_ptr(), g.data_ptr(), *state, _address(mean_scales, i),
            _address(square_scales, i), _address(masters, i), *(
                (age, 0) if ages[i].dtype == torch.int32 else (0, age)
            ), _address(places, i), keys[i],
        )  # fmt: skip
    native().adamw(
        NUMBERS[first.dtype], of_gradient != first.dtype,
        bool(places) and places[0].dtype == torch.int64, rounding == STOCHASTIC, lr, beta1, beta2,
        eps, weight_decay, scale, fields, torch.get_num_threads(),
    )  # fmt: skip
    for p, changed in copies:
        p.copy_(changed)


def sum_of_squares(gradients) -> torch.Tensor:
    """() float64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    held = [_plain(g) for g in gradients]
    fields = [part for g in held for part in (g.numel(), g.data_ptr())]
    total = native().sum_of_squares(NUMBERS[held[0].dtype], fields, torch.get_num_threads())
    return torch.tensor(total, dtype=torch.float64)


def sm3_update(
    parameter, gradient, row, column, row_offsets, columns, gradient_scale, lr, eps, weight_decay
) -> None:
    scale = 1.0 if gradient_scale is None else float(gradient_scale)
    if not math.isfinite(scale) or (columns is not None and columns.numel() == 0):
        return
    p = parameter if parameter.is_contiguous() else _plain(parameter)
    wide = gradient.dtype != p.dtype
    g = _plain(gradient.float() if wide else gradient)
    native().sm3(
        NUMBERS[p.dtype], wide, row.numel(), column.numel(), p.data_ptr(), g.data_ptr(),
        row.data_ptr(), column.data_ptr(), 0 if row_offsets is None else row_offsets.data_ptr(),
        0 if columns is None else columns.data_ptr(),
        columns is not None and columns.dtype == torch.int16, p.dim() == 1, lr, eps, weight_decay,
        scale, torch.get_num_threads(),
    )  # fmt: skip
    if p is not parameter:
        parameter.copy_(p)
