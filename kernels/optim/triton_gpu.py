"""Launchers of the Triton kernels of the optim room: tensors -> kernel arguments."""

from __future__ import annotations

import math

import torch

from tilewright.ops.common.triton_launch import Launch, why_not_triton
from tilewright.ops.optim.problem import (
    MEAN_EXPONENTS,
    SQUARE_EXPONENTS,
    STATE_BLOCK,
    STOCHASTIC,
    Problem,
    rows_and_columns,
)
from tilewright.ops.optim.triton_adamw import adamw_kernel, squares_kernel
from tilewright.ops.optim.triton_sm3 import sm3_cells_kernel, sm3_matrix_kernel

_ROWS = 4  # blocks of STATE_BLOCK entries of a program
_CHUNK, _BLOCK = 16384, 2048  # elements whose squares a program adds up, and of its registers
_TILE = (16, 128)  # rows and columns of an SM3 program
_CELLS = 512


def why_not(p: Problem) -> str | None:
    """None if the Triton kernels can run this problem here, else the reason."""
    return why_not_triton(p.device, p.dtype)


def _at(tensors, i: int):
    return tensors[i] if tensors else None


def adamw_update(
    parameters, gradients, means, squares, ages, places, masters, mean_scales, square_scales,
    gradient_scale, lr, beta1, beta2, eps, weight_decay, rounding, keys,
) -> None:  # fmt: skip
    steps = [age for age in ages if age.dtype != torch.int32]
    if steps:  # the count is read after this by the kernels, on the same stream
        goes_on = 1.0 if gradient_scale is None else gradient_scale.isfinite().float()
        torch._foreach_add_(steps, goes_on)
    for i, p in enumerate(parameters):
        whole = p if p.is_contiguous() else p.contiguous()
        adamw_launch(
            whole, gradients[i].contiguous(), means[i], squares[i], ages[i], _at(places, i),
            _at(masters, i), _at(mean_scales, i), _at(square_scales, i), gradient_scale, lr, beta1,
            beta2, eps, weight_decay, rounding, keys[i],
        ).run()  # fmt: skip
        if whole is not p:
            p.copy_(whole)


def adamw_launch(
    p, g, m, v, age, places, master, m_scale, v_scale, scale, lr, beta1, beta2, eps, weight_decay,
    rounding, key,
) -> Launch:  # fmt: skip
    n = m.numel()
    by_entry = age.dtype == torch.int32
    arguments = {
        "p_ptr": p, "g_ptr": g, "m_ptr": m, "v_ptr": v, "m_scale_ptr": m_scale,
        "v_scale_ptr": v_scale, "master_ptr": master, "ages_ptr": age if by_entry else None,
        "step_ptr": None if by_entry else age, "places_ptr": places, "scale_ptr": scale, "n": n,
        # as a signed number of 32 bits, so that every key is of one type
        "key": (key + 2**31) % 2**32 - 2**31, "lr": float(lr),
        "log_beta1": math.log(beta1) if beta1 else -math.inf,
        "log_beta2": math.log(beta2) if beta2 else -math.inf, "one_less_beta1": 1.0 - beta1,
        "beta2": float(beta2), "one_less_beta2": 1.0 - beta2, "eps": float(eps),
        "kept": 1.0 - lr * weight_decay, "STOCHASTIC": rounding == STOCHASTIC,
        "CODED": m_scale is not None, "MEAN_EXPONENTS": MEAN_EXPONENTS,
        "SQUARE_EXPONENTS": SQUARE_EXPONENTS, "ROWS": _ROWS, "BLOCK": STATE_BLOCK,
    }  # fmt: skip
    return Launch(adamw_kernel, -(-n // (_ROWS * STATE_BLOCK)), arguments, device=p.device)


def sum_of_squares(gradients) -> torch.Tensor:
    """() float64: sums of chunks in float32, then all of them in order."""
    sums = []
    for g in gradients:
        of_chunks = g.new_empty(-(-g.numel() // _CHUNK), dtype=torch.float32)
        squares_launch(g.contiguous(), of_chunks).run()
        sums.append(of_chunks)
    return torch.cat(sums).double().sum()


def squares_launch(x, sums) -> Launch:
    arguments = {
        "x_ptr": x, "sums_ptr": sums, "n": x.numel(), "CHUNK": _CHUNK, "BLOCK": _BLOCK,
    }  # fmt: skip
    return Launch(squares_kernel, sums.numel(), arguments, device=x.device)


def sm3_update(
    parameter, gradient, row, column, row_offsets, columns, gradient_scale, lr, eps, weight_decay
) -> None:
    p = parameter if parameter.is_contiguous() else parameter.contiguous()
    new = row.clone(), column.clone()
    sm3_launch(
        p, gradient.contiguous(), row, column, *new, row_offsets, columns, gradient_scale, lr, eps,
        weight_decay,
    ).run()  # fmt: skip
    row.copy_(new[0])
    column.copy_(new[1])
    if p is not parameter:
        parameter.copy_(p)


def sm3_launch(
    p, g, row, column, new_row, new_column, row_offsets, columns, scale, lr, eps, weight_decay
) -> Launch:
    shared = {
        "p_ptr": p, "g_ptr": g, "row_ptr": row, "column_ptr": column, "new_row_ptr": new_row,
        "new_column_ptr": new_column, "scale_ptr": scale, "n_columns": column.numel(),
        "lr": float(lr), "eps": float(eps), "kept": 1.0 - lr * weight_decay,
    }  # fmt: skip
    n_rows, n_columns = row.numel(), column.numel()
    if row_offsets is None:
        rows, width = _TILE
        programs = -(-n_rows // rows) * -(-n_columns // width)
        tile = {"n_rows": n_rows, "ROWS": rows, "COLUMNS": width}
        return Launch(sm3_matrix_kernel, programs, shared | tile, device=p.device)
    cells = {
        "rows_ptr": rows_and_columns(n_rows, n_columns, row_offsets, columns)[0].int(),
        "columns_ptr": columns, "n": columns.numel(), "COMPACT": p.dim() == 1, "BLOCK": _CELLS,
    }  # fmt: skip
    programs = -(-columns.numel() // _CELLS)
    return Launch(sm3_cells_kernel, programs, shared | cells, device=p.device)
