"""Some entries of dy^T x, and no others: what the values of a sparse delta have as gradient."""

from __future__ import annotations

import torch

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.common.sparse_delta import WeightDelta, expect_in_range, rows_of, wide_columns
from tilewright.ops.linear import reference
from tilewright.ops.linear.problem import Problem
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

library = torch.library.Library("tilewright", "FRAGMENT")
library.define(
    "sampled_product(Tensor dy, Tensor x, Tensor row_offsets, Tensor columns, str impl) -> Tensor"
)


def sampled_product(
    dy: torch.Tensor, x: torch.Tensor, delta: WeightDelta, *, impl: str = "auto"
) -> torch.Tensor:
    """The entries of a linear layer's weight gradient at the places of a sparse delta.

        products[n] = sum_t dy[t, o] x[t, i],   (o, i) the place of value n

    dy      (T, O) or (..., O)
    x       (T, I) or (..., I), in the dtype of dy; T may be 0
    delta   gives the N places; its values are not read
    impl    "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns (N,) float32 (float64 of float64), summed up in float32; nothing of size (O, I) is made.
    Bitwise the same for any number of threads. No gradient of its own.
    ValueError: a shape, dtype or place outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Ansell et al., Scaling sparse fine-tuning to large language models, arXiv 2401.16405.
    """
    _describe(dy, x, delta)
    dy2, x2 = (t.detach().reshape(-1, n) if t.numel() else t.new_empty(0, n)
               for t, n in ((dy, delta.out_features), (x, delta.in_features)))  # fmt: skip
    if not may_go_direct(dy2, x2, delta.row_offsets, delta.columns):
        return torch.ops.tilewright.sampled_product(dy2, x2, delta.row_offsets, delta.columns, impl)
    return _run(dy2, x2, delta.row_offsets, delta.columns, impl)


def _describe(dy, x, delta) -> Problem:
    name = "sampled_product"
    expect_dtype(name, DTYPES, dy=dy, x=x)
    expect_device(name, dy=dy, x=x, **{"delta's columns": delta.columns})
    for argument, t, axis, n in (
        ("dy", dy, "O", delta.out_features), ("x", x, "I", delta.in_features),
    ):  # fmt: skip
        if t.dim() == 0 or t.shape[-1] != n:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(t.shape)}, need a last axis of {axis} = {n} "
                "as in delta"
            )
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{name}: dy has shape {tuple(dy.shape)}, need {tuple(x.shape[:-1])} as in x before "
            "the last axis"
        )
    delta.expect_whole(name)
    return _problem(dy, x)


def _problem(dy, x) -> Problem:
    return Problem(
        device=x.device.type, dtype=x.dtype, tokens=x.shape[:-1].numel(),
        in_features=x.shape[-1], out_features=dy.shape[-1], has_delta=True,
    )  # fmt: skip


def _run(dy, x, row_offsets, columns, impl):
    name = choose.choose("sampled_product", impl, _problem(dy, x))
    if name == "cpp_cpu":
        from tilewright.ops.linear import cpp_cpu

        return cpp_cpu.sampled_product(dy, x, row_offsets, columns)
    if name == "triton_gpu":
        from tilewright.ops.linear import triton_gpu

        return triton_gpu.sampled_product(dy, x, row_offsets, columns)
    rows = rows_of(row_offsets, columns.shape[0])
    products = reference.sampled_product(dy, x, rows, wide_columns(columns))
    return products.to(torch.promote_types(x.dtype, torch.float32))


def _registered(dy, x, row_offsets, columns, impl):
    expect_shapes("sampled_product", dy=(dy, "TO"), x=(x, "TI"))
    if x.device.type == "cpu":  # on a GPU it would wait for the device
        expect_in_range("sampled_product", row_offsets, columns, dy.shape[1], x.shape[1])
    return _run(dy, x, row_offsets, columns, impl)


library.impl("sampled_product", _registered, "CPU")
library.impl("sampled_product", _registered, "CUDA")


@torch.library.register_fake("tilewright::sampled_product", lib=library)
def _(dy, x, row_offsets, columns, impl):
    return x.new_empty(columns.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _sample_problems() -> dict[str, object]:
    """What `doctor` asks about: a usual training shape."""
    return {
        label: Problem(
            device, dtype, tokens=512, in_features=4096, out_features=4096, has_delta=True
        )
        for label, device, dtype in choose.usual_types()
    }


choose.register(
    choose.Operator(
        "sampled_product",
        (
            choose.implementation_of("linear", "triton_gpu"),
            choose.implementation_of("linear", "cpp_cpu"),
            choose.REFERENCE,
        ),
        lambda dy, x, delta, impl="auto": _describe(dy, x, delta),
        _sample_problems,
    )
)
