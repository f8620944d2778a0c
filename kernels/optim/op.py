"""torch.library schemas and fakes of the optim room.

The operators change their arguments; the choice among implementations is made inside them. Neither
triton nor _C is imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib

import torch

from tilewright import choose, settings
from tilewright.direct import may_go_direct
from tilewright.ops.optim import reference
from tilewright.ops.optim.problem import STATE_BLOCK, STOCHASTIC, Problem, rows_and_columns

library = torch.library.Library("tilewright", "FRAGMENT")

# lists are as long as `parameters`, or empty: places, masters, both scales
library.define(
    "adamw_update(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, "
    "Tensor(c!)[] squares, Tensor(d!)[] ages, Tensor[] places, Tensor(e!)[] masters, "
    "Tensor(f!)[] mean_scales, Tensor(g!)[] square_scales, Tensor? gradient_scale, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, str rounding, int[] keys, str impl) "
    "-> ()"
)
library.define(
    "sm3_update(Tensor(a!) parameter, Tensor gradient, Tensor(b!) row, Tensor(c!) column, "
    "Tensor? row_offsets, Tensor? columns, Tensor? gradient_scale, float lr, float eps, "
    "float weight_decay, str impl) -> ()"
)
library.define("sum_of_squares(Tensor[] gradients, str impl) -> Tensor")


class _ReferenceImplementation:
    """The reference in the operators' dtypes; it rounds to nearest."""

    @staticmethod
    def adamw_update(
        parameters, gradients, means, squares, ages, places, masters, mean_scales, square_scales,
        gradient_scale, lr, beta1, beta2, eps, weight_decay, rounding, keys,
    ) -> None:  # fmt: skip
        if rounding == STOCHASTIC or mean_scales:
            raise ValueError(
                "adamw_update: the reference neither rounds at random nor keeps states in 8 bits"
            )
        scale = 1.0 if gradient_scale is None else gradient_scale.double()
        if gradient_scale is not None and not gradient_scale.isfinite():
            return
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            ages[i] += 1
            m, v = means[i].reshape(-1), squares[i].reshape(-1)
            at = places[i].long() if places else slice(None)
            old = masters[i].reshape(-1) if masters else p.reshape(-1)[at]
            new, mean, square = reference.adamw(
                old, g.reshape(-1)[at].double() * scale, m, v, ages[i].reshape(-1), lr, beta1,
                beta2, eps, weight_decay,
            )  # fmt: skip
            means[i].copy_(mean.view(means[i].shape))
            squares[i].copy_(square.view(squares[i].shape))
            if masters:
                masters[i].copy_(new.view(masters[i].shape))
            whole = p.reshape(-1).double()
            whole[at] = new
            p.copy_(whole.view(p.shape))

    @staticmethod
    def sm3_update(
        parameter, gradient, row, column, row_offsets, columns, gradient_scale, lr, eps,
        weight_decay,
    ) -> None:  # fmt: skip
        if gradient_scale is not None and not gradient_scale.isfinite():
            return
        rows, cells = rows_and_columns(row.numel(), column.numel(), row_offsets, columns)
        whole = parameter.reshape(-1).double()
        at = slice(None)
        if row_offsets is not None and parameter.dim() == 2:
            at = rows * column.numel() + cells
        g = gradient.reshape(-1)[at].double()
        g = g if gradient_scale is None else g * gradient_scale
        new, new_row, new_column = reference.sm3(
            whole[at], g, row, column, rows, cells, lr, eps, weight_decay
        )
        whole[at] = new
        parameter.copy_(whole.view(parameter.shape))
        row.copy_(new_row)
        column.copy_(new_column)

    @staticmethod
    def sum_of_squares(gradients):
        return reference.gradient_norm(gradients).square()


@functools.cache
def _found(name: str, impl: str, device: str, dtype: torch.dtype, forced: str | None):
    # `forced` is not read: with another value of the variable the choice is made again
    chosen = choose.choose(name, impl, Problem(name, device, dtype))
    if chosen == "reference":
        return _ReferenceImplementation
    return importlib.import_module(f"tilewright.ops.optim.{chosen}")


def _chosen(name: str, impl: str, t: torch.Tensor):
    return _found(name, impl, t.device.type, t.dtype, settings.forced_impl())


def _expect_fitting(
    parameters, gradients, means, squares, ages, places, masters, mean_scales, square_scales, *rest
) -> None:
    """What kernels trust: a state from a file may be of anything."""
    for i, p in enumerate(parameters):
        n = places[i].numel() if places else p.numel()
        state = torch.float64 if p.dtype == torch.float64 else torch.float32
        codes = torch.uint8 if mean_scales else state
        m, v, age = means[i], squares[i], ages[i]
        count, of_age = (n, torch.int32) if age.dtype == torch.int32 else (1, torch.float32)
        is_usual = (
            m.numel() == v.numel() == n and age.numel() == count and m.dtype == v.dtype == codes
            and gradients[i].numel() == p.numel() and age.dtype == of_age
            and p.device == m.device == v.device == age.device == gradients[i].device
        )  # fmt: skip
        if is_usual and not masters and not mean_scales:
            continue
        expected = [
            ("gradient", gradients[i], p.numel(), gradients[i].dtype), ("mean", m, n, codes),
            ("square", v, n, codes), ("age" if count == n else "step", age, count, of_age),
        ]  # fmt: skip
        if masters:
            expected.append(("master", masters[i], n, torch.float32))
        if mean_scales:
            n_blocks = -(-n // STATE_BLOCK)
            expected.append(("mean scale", mean_scales[i], n_blocks, torch.float32))
            expected.append(("square scale", square_scales[i], n_blocks, torch.float32))
        for what, t, count, dtype in expected:
            if t.numel() != count or t.dtype != dtype or t.device != p.device:
                raise ValueError(
                    f"adamw_update: the {what} of tensor {i} has {t.numel()} elements of {t.dtype} "
                    f"on {t.device}, need {count} of {dtype} on {p.device}"
                )


def _adamw(parameters, *rest) -> None:
    if parameters:
        _expect_fitting(parameters, *rest)
        _chosen("adamw_update", rest[-1], parameters[0]).adamw_update(parameters, *rest[:-1])


def _sum_of_squares(gradients, impl):
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return _chosen("gradient_norm", impl, gradients[0]).sum_of_squares(gradients)


def call_adamw(parameters, *rest) -> None:
    """The registered operator, or in plain eager mode what it would end up calling."""
    if may_go_direct(*parameters):
        _adamw(parameters, *rest)
        for t in parameters:
            torch.autograd.graph.increment_version(t)
    else:
        torch.ops.tilewright.adamw_update(parameters, *rest)


def _sm3(parameter, *rest) -> None:
    gradient, row, column, row_offsets = rest[:4]
    n = parameter.numel()
    if (row_offsets is None and n != row.numel() * column.numel()) or n != gradient.numel():
        raise ValueError(
            f"sm3_update: {n} parameters, {gradient.numel()} gradients, {row.numel()} rows and "
            f"{column.numel()} columns do not fit each other"
        )
    _chosen("sm3_update", rest[-1], parameter).sm3_update(parameter, *rest[:-1])


def call_sm3(parameter, *rest) -> None:
    if may_go_direct(parameter):
        _sm3(parameter, *rest)
        torch.autograd.graph.increment_version(parameter)
    else:
        torch.ops.tilewright.sm3_update(parameter, *rest)


def call_sum_of_squares(gradients, impl) -> torch.Tensor:
    if may_go_direct(*gradients):
        return _sum_of_squares(gradients, impl)
    return torch.ops.tilewright.sum_of_squares(gradients, impl)


for _operator, _function in (
    ("adamw_update", _adamw),
    ("sm3_update", _sm3),
    ("sum_of_squares", _sum_of_squares),
):
    library.impl(_operator, _function, "CPU")
    library.impl(_operator, _function, "CUDA")


@torch.library.register_fake("tilewright::adamw_update", lib=library)
@torch.library.register_fake("tilewright::sm3_update", lib=library)
def _(*arguments):
    return None


@torch.library.register_fake("tilewright::sum_of_squares", lib=library)
def _(gradients, impl):
    device = gradients[0].device if gradients else None
    return torch.empty((), dtype=torch.float64, device=device)
