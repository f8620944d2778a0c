"""The optim room's public functions: docstrings, checks, and the call into the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewright import choose
from tilewright.ops.optim import op
from tilewright.ops.optim.problem import NEAREST, PARAMETERS, ROUNDINGS, STOCHASTIC, Problem
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (*PARAMETERS, torch.float64)
Tensors = Sequence[torch.Tensor]


def adamw_update(
    parameters: Tensors,
    gradients: Tensors,
    means: Tensors,
    squares: Tensors,
    ages: Tensors,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    places: Tensors = (),
    masters: Tensors = (),
    gradient_scale: torch.Tensor | None = None,
    rounding: str = NEAREST,
    keys: Sequence[int] = (),
    impl: str = "auto",
) -> None:
    """One AdamW step of many tensors in one pass over memory; `AdamW` calls it.

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      age = age + 1
        p = p (1 - lr decay) - lr (m / (1 - b1^age)) / (sqrt(v / (1 - b2^age)) + eps)

    parameters      each (N,) or of any shape with N elements, all of one dtype; changed
    gradients       as the parameters, or float32
    means, squares  m and v: (N,) or shaped as the parameter, float32, contiguous; changed
    ages            () float32, the steps of all entries, or int32 as m, those of each; changed
    lr              a plain number, as betas (b1, b2), eps and weight_decay
    places          (N,) int32 or int64, distinct: the entries of the flattened parameter that
                    train; the rest stays as it is, and m, v and ages have N elements
    masters         float32 as m: the parameters are their roundings; changed
    gradient_scale  () float32 that gradients are multiplied by; where it is not finite, nothing
                    is changed
    rounding        of bfloat16: "nearest", or "stochastic": up or down at random, with a mean that
                    is exact; which way depends on the key, the entry and its age alone
    keys            a whole number below 2^32 for each parameter; needed by "stochastic"
    impl            "auto", "reference", "cpp_cpu" or "triton_gpu"

    Dtypes: float32, bfloat16, float16 (float64, with states of float64: reference only). Arithmetic
    is float32; the error against float64 is at most twice that of torch.optim.AdamW. Results are
    bitwise the same for any number of threads.
    ValueError: a shape, dtype or value outside the above (that places are distinct and in range is
    not looked at). RuntimeError: `impl` was named and cannot run here.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv 1711.05101.
    """
    name = "adamw_update"
    _expect_lists(
        name, parameters, gradients=gradients, means=means, squares=squares, ages=ages,
        places=places or None, masters=masters or None, keys=keys or None,
    )  # fmt: skip
    for i, p in enumerate(parameters):
        _expect_parameter(name, i, p, parameters[0], gradients[i])
        n = places[i].numel() if places else p.numel()
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        for what, t in (("means", means[i]), ("squares", squares[i])):
            _expect_state(name, f"{what}[{i}]", t, n, (wide,), p)
        if ages[i].dim() or ages[i].dtype == torch.int32:
            _expect_state(name, f"ages[{i}]", ages[i], n, (torch.int32,), p)
        if places:
            _expect_state(name, f"places[{i}]", places[i], n, (torch.int32, torch.int64), p)
            expect_dtype(name, (places[0].dtype,), **{f"places[{i}]": places[i]})
        if masters:
            _expect_state(name, f"masters[{i}]", masters[i], n, (torch.float32,), p)
    expect_adamw_options(name, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    expect_rounding(name, rounding, parameters)
    if rounding == STOCHASTIC and not keys:
        raise ValueError(f"{name}: rounding is {rounding!r}, need a key for each parameter")
    op.call_adamw(
        list(parameters), list(gradients), list(means), list(squares), list(ages), list(places),
        list(masters), [], [], gradient_scale, lr, *betas, eps, weight_decay, rounding,
        list(keys) or [0] * len(parameters), impl,
    )  # fmt: skip


def sm3_update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    *,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    row_offsets: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    gradient_scale: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One SM3 step of a matrix, or of some of its cells, in one pass over memory; `SM3` calls it.

        s = min(row[r], column[c]) + g^2
        row[r] = max of row[r] and the s of its cells      column[c] likewise
        p = p (1 - lr decay) - lr g / sqrt(s + eps), or p (1 - lr decay) where s + eps is 0

    parameter       (R, C), or of named cells alone (N,); changed
    gradient        as the parameter, or float32
    row, column     (R,) and (C,) float32; changed
    lr              a plain number, as eps and weight_decay
    row_offsets     (R + 1,) int64, from 0 to N: where the named cells of each row begin; None: all
                    cells
    columns         (N,) int32, or int16 read modulo 2^16: the named cells' columns
    gradient_scale  () float32 that gradients are multiplied by; where it is not finite, nothing
                    is changed
    impl            "auto", "reference", "cpp_cpu" or "triton_gpu"

    Dtypes: float32, bfloat16, float16 (float64: reference only). Arithmetic is float32. Results are
    bitwise the same for any number of threads.
    ValueError: a shape, dtype or value outside the above (that columns are distinct in a row and in
    range is not looked at). RuntimeError: `impl` was named and cannot run here.

    Source: Anil et al., Memory-efficient adaptive optimization, arXiv 1901.11150, SM3-II.
    """
    name = "sm3_update"
    expect_dtype(name, DTYPES, parameter=parameter)
    tensors = dict(gradient=gradient, row=row, column=column)
    named = dict(row_offsets=row_offsets, columns=columns)
    expect_device(name, parameter=parameter, **tensors, **named)
    if (row_offsets is None) != (columns is None):
        raise ValueError(f"{name}: only one of row_offsets and columns is given, need both or none")
    expect_shapes(name, row=(row, "R"), column=(column, "C"))
    if row_offsets is None or columns is None:
        expect_shapes(name, parameter=(parameter, "RC"), row=(row, "R"), column=(column, "C"))
    else:
        _expect_state(name, "row_offsets", row_offsets, row.numel() + 1, (torch.int64,), parameter)
        of_columns = (torch.int32, torch.int16)
        _expect_state(name, "columns", columns, columns.numel(), of_columns, parameter)
        if parameter.dim() == 1:
            expect_shapes(name, columns=(columns, "N"), parameter=(parameter, "N"))
        else:
            expect_shapes(name, parameter=(parameter, "RC"), row=(row, "R"), column=(column, "C"))
    if gradient.shape != parameter.shape or gradient.dtype not in (parameter.dtype, torch.float32):
        raise ValueError(
            f"{name}: gradient has shape {tuple(gradient.shape)} and is {gradient.dtype}, need "
            f"{tuple(parameter.shape)} as parameter, and {parameter.dtype} or torch.float32"
        )
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    for what, t in (("row", row), ("column", column)):
        _expect_state(name, what, t, t.numel(), (wide,), parameter)
    expect_options(name, lr=lr, eps=eps, weight_decay=weight_decay)
    op.call_sm3(
        parameter, gradient, row, column, row_offsets, columns, gradient_scale, lr, eps,
        weight_decay, impl,
    )  # fmt: skip


def gradient_norm(gradients: Tensors, *, impl: str = "auto") -> torch.Tensor:
    """The Euclidean norm of all gradients together, in one pass that writes nothing.

        norm = sqrt(sum over tensors and elements of g^2)

    gradients  each (N,) or of any shape; float32, bfloat16 or float16 (float64: reference only)
    impl       "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns () float64. Squares are added up in float32 over at most 2048 elements, those sums in
    float64 and in order: the number of threads changes no bit.
    ValueError: another dtype, or tensors on several devices. RuntimeError: `impl` was named and
    cannot run here.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, arXiv
    1211.5063.
    """
    for i, g in enumerate(gradients):
        expect_dtype("gradient_norm", DTYPES, **{f"gradients[{i}]": g})
        expect_device("gradient_norm", **{"gradients[0]": gradients[0], f"gradients[{i}]": g})
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for g in gradients:
        by_dtype.setdefault(g.dtype, []).append(g)
    sums = [op.call_sum_of_squares(same, impl) for same in by_dtype.values()]
    return torch.stack(sums).sum().sqrt() if sums else torch.zeros((), dtype=torch.float64)


def expect_adamw_options(name: str, *, betas, **others) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{name}: betas are {tuple(betas)}, need 0 <= beta < 1")
    expect_options(name, **others)


def expect_options(name: str, *, lr: float, eps: float, weight_decay: float) -> None:
    for what, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name}: {what} is {value}, need 0 or more")


def expect_rounding(name: str, rounding: str, parameters: Tensors) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"{name}: no rounding {rounding!r}. Known: {', '.join(ROUNDINGS)}")
    if rounding == STOCHASTIC:
        for i, p in enumerate(parameters):
            if p.dtype != torch.bfloat16:
                raise ValueError(
                    f"{name}: rounding is {rounding!r} and parameters[{i}] {p.dtype}, need "
                    "torch.bfloat16"
                )


def _expect_lists(name: str, parameters: Tensors, **lists) -> None:
    for what, given in lists.items():
        if given is not None and len(given) != len(parameters):
            raise ValueError(
                f"{name}: {what} has {len(given)} entries, need {len(parameters)} as parameters"
            )


def _expect_parameter(name, i, p, first, g) -> None:
    expect_dtype(name, DTYPES, **{"parameters[0]": first, f"parameters[{i}]": p})
    expect_device(name, **{"parameters[0]": first, f"parameters[{i}]": p, f"gradients[{i}]": g})
    if g.shape != p.shape:
        raise ValueError(
            f"{name}: gradients[{i}] has shape {tuple(g.shape)}, need {tuple(p.shape)} as the "
            "parameter"
        )
    if g.dtype not in (p.dtype, torch.float32):
        raise ValueError(f"{name}: gradients[{i}] is {g.dtype}, need {p.dtype} or torch.float32")


def _expect_state(name, what, t, n, dtypes, p) -> None:
    if t.dtype not in dtypes:
        expect_dtype(name, dtypes, **{what: t})
    if t.numel() != n or not t.is_contiguous():
        raise ValueError(
            f"{name}: {what} has shape {tuple(t.shape)} and strides {t.stride()}, need {n} "
            "contiguous elements: one for each entry that trains"
        )
    if t.device != p.device:
        expect_device(name, **{"its parameter": p, what: t})


_CANDIDATES = (
    choose.implementation_of("optim", "triton_gpu"),
    choose.implementation_of("optim", "cpp_cpu"),
    choose.REFERENCE,
)


def _register(name: str) -> None:
    def described(tensors, *rest, **kwargs) -> Problem:
        if isinstance(tensors, torch.Tensor):
            tensors = [tensors]
        if not tensors:
            return Problem(name, "cpu", torch.float32)
        return Problem(name, tensors[0].device.type, tensors[0].dtype)

    def samples() -> dict[str, object]:
        return {
            label: Problem(name, device, dtype) for label, device, dtype in choose.usual_types()
        }

    choose.register(choose.Operator(name, _CANDIDATES, described, samples))


for _name in ("adamw_update", "sm3_update", "gradient_norm"):
    _register(_name)
