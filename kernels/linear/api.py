"""The linear room's public functions: docstrings, checks, and the call into the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.packed_check import expect_whole
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.linear import op, prepared
from tilewright.ops.linear.problem import DENSE, Operands, Problem
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("none", "relu")
MAX_RANK = 4096


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: str = "none",
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    int8_activations: bool = False,
    delta: WeightDelta | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """A linear layer over a dense or packed weight plus a low-rank update, as one operator.

        y[t] = ((W + D) x[t] + bias) out_scale  +  scale up f(down drop(x[t]))

    x                 (T, I) or (..., I) activations; T may be 0
    weight            (O, I) in x.dtype, or a PackedWeight of that shape, which gets no gradient
    bias              (O,)
    out_scale         (O,) factors, such as those of (IA)^3
    down, up          (R, I) and (O, R): LoRA's A and B, of any floating dtype; they are rounded to
                      x.dtype where they meet x, which itself is not converted
    scale             of the update, such as LoRA's alpha / R
    activation        f: "none", or "relu" for a parallel adapter
    dropout_p         probability, 0 <= p < 1, that the update does not see an element of x; the
                      backward draws the same numbers again instead of storing them
    dropout_seed      (1,) int64; default drawn from torch's default CPU generator
    int8_activations  round x to 8 bits, one scale a row, and multiply whole numbers: quicker with
                      many tokens, adds an error of about 1 % of a row; packed weights but fp8. The
                      gradient is that of the product without rounding
    delta             D, sparse (O, I); its product is summed up by itself in float32, of x as it
                      is, so that values far below the last place of W count. Its values may
                      require grad: no gradient of W's size is made
    impl              "auto", "reference", "cpp_cpu", "triton_gpu" or "cuda_hopper"; the last has no
                      backward: with "auto" triton_gpu takes it, and if named the backward raises

    Returns (..., O) in x.dtype: float32, bfloat16 or float16 (float64: reference only). Sums are
    float32; packed weights are decoded tile by tile, forward and backward, and never as a whole.
    The error against float64 over the decoded weight is at most twice that of torch's linear in the
    same dtype. Results are bitwise reproducible and do not depend on the number of threads; a row
    does not depend on the other rows' values, though its last bits may differ where their number
    changes the kernel (README.md beside this). Under autocast x, weight and bias are cast.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Hu et al., LoRA, arXiv 2106.09685; Dettmers et al., QLoRA, arXiv 2305.14314; He et al.,
    Towards a unified view of parameter-efficient transfer learning, arXiv 2110.04366; for delta
    Ansell et al., Scaling sparse fine-tuning to large language models, arXiv 2401.16405.
    """
    has_extras = down is not None or out_scale is not None or delta is not None
    plain = None  # the weight, where there is nothing beside it but a bias
    # to be checked; `scale` is nobody's without an update, but has to be a number all the same
    has_options = activation != "none" or bool(dropout_p) or not abs(scale) < math.inf
    if impl == "auto" and type(weight) is PackedWeight and not has_extras and not has_options:
        plain = weight
        ready = prepared.call(x, plain, bias, int8_activations)
        if ready is not None:
            return ready
    p, x2, o = describe(
        x, weight, bias, out_scale=out_scale, down=down, up=up, scale=scale,
        activation=activation, dropout_p=dropout_p, dropout_seed=dropout_seed,
        int8_activations=int8_activations, delta=delta,
    )  # fmt: skip
    y = call_described(x2, o, p, impl)
    if plain is not None and p.device == "cpu" and may_go_direct(x, plain.codes):
        prepared.remember(plain, p.dtype, int8_activations)
    return y.view(*x.shape[:-1], p.out_features)


def scale_is_trained(o: Operands) -> bool:
    return o.out_scale is not None and o.out_scale.requires_grad and torch.is_grad_enabled()


def call_described(x: torch.Tensor, o: Operands, p: Problem, impl: str) -> torch.Tensor:
    """y (T, O) of a call that has passed all checks."""
    if not scale_is_trained(o):
        return op.call_fused_linear(x, o, p, impl)
    # its gradient needs the base product by itself
    assert o.out_scale is not None
    base = op.call_fused_linear(
        x, o._replace(out_scale=None, down=None, up=None, dropout_seed=None),
        p._replace(rank=0, dropout_p=0.0, activation="none"), impl,
    )  # fmt: skip
    y = base * o.out_scale.to(base.dtype)
    if o.down is not None:
        zero = torch.zeros_like(o.out_scale)
        alone = o._replace(
            bias=None, out_scale=zero, delta_offsets=None, delta_columns=None, delta_values=None
        )
        y = y + op.call_fused_linear(x, alone, p._replace(has_delta=False), impl)
    return y


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """A linear layer plus its low-rank update: `fused_linear` with what LoRA needs.

        y[t] = W x[t] + bias + scale up f(down drop(x[t]))

    x                 (T, I) or (..., I) activations; T may be 0
    weight            (O, I) in x.dtype, or a PackedWeight of that shape, which gets no gradient
    down, up          (R, I) and (O, R): LoRA's A and B, of any floating dtype, 1 <= R <= 4096
    scale             of the update, such as LoRA's alpha / R
    bias              (O,)
    activation        f: "none" or "relu"
    dropout_p         probability, 0 <= p < 1, that the update does not see an element of x
    dropout_seed      (1,) int64; default drawn from torch's default CPU generator
    impl              "auto", "reference", "cpp_cpu", "triton_gpu" or "cuda_hopper"

    Returns (..., O) in x.dtype. Dtypes, accuracy and reproducibility are those of `fused_linear`.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1.
    """
    return fused_linear(
        x, weight, bias, down=down, up=up, scale=scale, activation=activation,
        dropout_p=dropout_p, dropout_seed=dropout_seed, impl=impl,
    )  # fmt: skip


def quantized_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    int8_activations: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """A linear layer over a packed weight: `fused_linear` without an update.

        y[t] = W x[t] + bias,   W decoded tile by tile

    x                 (T, I) or (..., I) activations; T may be 0
    weight            PackedWeight (O, I), such as `quantize_weight` and the readers return
    bias              (O,)
    int8_activations  round x to 8 bits, one scale a row; not with an fp8 weight
    impl              "auto", "reference", "cpp_cpu", "triton_gpu" or "cuda_hopper"

    Returns (..., O) in x.dtype. Dtypes, accuracy and reproducibility are those of `fused_linear`.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3; for int8_activations Dettmers et
    al., LLM.int8(), arXiv 2208.07339, section 2.
    """
    return fused_linear(x, weight, bias, int8_activations=int8_activations, impl=impl)


def multi_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    downs: Sequence[torch.Tensor | None],
    ups: Sequence[torch.Tensor | None],
    row_adapters: torch.Tensor,
    *,
    scales: Sequence[float],
    deltas: Sequence[WeightDelta | None] | WeightDelta | None = None,
    bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """A linear layer whose rows each belong to one of several adapters, or to none.

        y[t] = (W + deltas[a]) x[t] + bias + scales[a] ups[a] downs[a] x[t],   a = row_adapters[t]

    x              (T, I) or (..., I) activations; T may be 0
    weight         (O, I) in x.dtype, or a PackedWeight of that shape, which gets no gradient
    downs, ups     one (Ra, I) and (O, Ra) for each adapter; ranks may differ and add up to at most
                   4096. With deltas, None for an adapter without a low-rank update
    row_adapters   (T,) int32, or x.shape[:-1]: the adapter of a row, -1 for none
    scales         one number for each adapter
    deltas         a sparse (O, I) for each adapter, or None for one without; or all of them in one
                   by `WeightDelta.stacked`, which a call would else do anew. Summed up as the delta
                   of `fused_linear` is; forward only: nothing may require grad
    bias           (O,)
    impl           "auto", "reference", "cpp_cpu", "triton_gpu" or "cuda_hopper"

    Returns (..., O) in x.dtype. Dtypes, accuracy and reproducibility are those of `fused_linear`.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Chen et al., Punica, arXiv 2310.18547.
    """
    name = "multi_lora_linear"
    n_adapters = len(downs)
    if not len(downs) == len(ups) == len(scales) or not downs:
        raise ValueError(
            f"{name}: {len(downs)} downs, {len(ups)} ups and {len(scales)} scales, need as many "
            "of each, and at least 1"
        )
    if row_adapters.dtype != torch.int32 or row_adapters.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: row_adapters is {row_adapters.dtype} of shape {tuple(row_adapters.shape)}, "
            f"need int32 of shape {tuple(x.shape[:-1])} as x without its last axis"
        )
    n_out, n_in = weight.shape if isinstance(weight, PackedWeight) else _matrix(name, weight)
    delta = _stacked(name, deltas, n_adapters, n_out, n_in)
    for a, (down, up, scale) in enumerate(zip(downs, ups, scales, strict=True)):
        if down is None and up is None and delta is not None:
            continue
        if down is None or up is None:
            missing = "down" if down is None else "up"
            raise ValueError(
                f"{name}: {missing}s[{a}] is None, need downs and ups of each adapter, or with "
                "deltas neither"
            )
        expect_dtype(name, DTYPES, **{f"downs[{a}]": down})
        expect_dtype(name, DTYPES, **{f"ups[{a}]": up})
        expect_device(name, x=x, **{f"downs[{a}]": down, f"ups[{a}]": up})
        rank = down.shape[0] if down.dim() == 2 else 0
        if rank < 1 or down.shape[1] != n_in:
            raise ValueError(
                f"{name}: downs[{a}] has shape {tuple(down.shape)}, need (R, {n_in}), R at least 1"
            )
        if up.shape != (n_out, rank):
            raise ValueError(
                f"{name}: ups[{a}] has shape {tuple(up.shape)}, need ({n_out}, {rank})"
            )
        if not abs(scale) < math.inf:
            raise ValueError(f"{name}: scales[{a}] is {scale}, need a finite number")
    ranks = [0 if d is None else d.shape[0] for d in downs]
    # made on the CPU: nothing waits for a GPU to tell its ranks
    columns = torch.tensor([a for a, rank in enumerate(ranks) for _ in range(rank)]).long()
    each = torch.tensor([float(s) for s in scales])
    columns, column_scales = columns.int(), each[columns]
    device = row_adapters.device
    low_rank = {}
    if any(ranks):
        low_rank = dict(
            down=torch.cat([d for d in downs if d is not None]),
            up=torch.cat([u for u in ups if u is not None], dim=1),
            column_adapters=columns.to(device, non_blocking=True),
            column_scales=column_scales.to(device, non_blocking=True),
        )
    p, x2, o = describe(
        x, weight, bias, row_adapters=row_adapters.reshape(-1), delta=delta,
        n_deltas=n_adapters if delta is not None else 0, name=name, **low_rank,
    )  # fmt: skip
    if delta is not None and torch.is_grad_enabled() and op.needs_gradient(x2, o):
        raise ValueError(
            f"{name}: deltas of several adapters have no gradient, and x or another tensor "
            "requires one; call it under torch.no_grad()"
        )
    return op.call_fused_linear(x2, o, p, impl).view(*x.shape[:-1], p.out_features)


def _stacked(name, deltas, n_adapters: int, n_out: int, n_in: int) -> WeightDelta | None:
    """The deltas of all adapters one below the other, or None."""
    if deltas is None:
        return None
    if isinstance(deltas, WeightDelta):
        return deltas  # its shape is looked at with everything else
    if len(deltas) != n_adapters:
        raise ValueError(
            f"{name}: {len(deltas)} deltas and {n_adapters} downs, need as many, None for an "
            "adapter without"
        )
    for a, d in enumerate(deltas):
        if d is not None and d.shape != (n_out, n_in):
            raise ValueError(f"{name}: deltas[{a}] is of shape {d.shape}, need {(n_out, n_in)}: "
                             "(O, I) as in weight")  # fmt: skip
    return WeightDelta.stacked(deltas, n_out, n_in) if any(deltas) else None


def describe(
    x, weight, bias=None, *, out_scale=None, down=None, up=None, scale=1.0, activation="none",
    dropout_p=0.0, dropout_seed=None, int8_activations=False, row_adapters=None,
    column_adapters=None, column_scales=None, delta=None, n_deltas=0, name="fused_linear",
):  # fmt: skip
    """Check everything, and return the problem record, x as (T, I) and the other tensors."""
    packed = weight if isinstance(weight, PackedWeight) else None
    dense = weight if packed is None else None
    device = x.device.type
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        dense = None if dense is None else dense.to(dtype)
    expect_dtype(name, DTYPES, x=x)
    if dense is not None:
        expect_dtype(name, DTYPES, x=x, weight=dense)
    for argument, t in (("bias", bias), ("out_scale", out_scale), ("down", down), ("up", up)):
        if t is not None and t.dtype not in DTYPES:
            expect_dtype(name, DTYPES, **{argument: t})
    codes = None if packed is None else packed.codes
    expect_device(
        name, x=x, weight=dense if packed is None else codes, bias=bias, out_scale=out_scale,
        down=down, up=up, row_adapters=row_adapters,
    )  # fmt: skip
    if x.dim() == 0:
        raise ValueError(f"{name}: x has shape (), need axes (..., I)")
    n_out, n_in = weight.shape if packed is not None else _matrix(name, weight)
    if x.shape[-1] != n_in:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, need a last axis of I = {n_in} as in weight"
        )
    if x.dim() == 2:
        x2 = x
    else:  # -1 means nothing where a tensor is empty
        x2 = x.reshape(math.prod(x.shape[:-1]), n_in)
    for argument, t in (("bias", bias), ("out_scale", out_scale)):
        if t is not None and t.shape != (n_out,):
            raise ValueError(
                f"{name}: {argument} has shape {tuple(t.shape)}, need ({n_out},): O as in weight"
            )
    rank = _check_low_rank(name, n_out, n_in, down, up, scale, activation, dropout_p)
    if dropout_p and dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    if dropout_seed is not None and (
        dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1
    ):
        raise ValueError(
            f"{name}: dropout_seed is {dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}, "
            "need int64 of shape (1,)"
        )
    if int8_activations and (packed is None or packed.format == "fp8"):
        which = "dense" if packed is None else "fp8"
        raise ValueError(
            f"{name}: int8_activations needs a packed weight of whole-number codes, got {which}"
        )
    operands = Operands(
        weight=dense,
        bias=bias,
        out_scale=out_scale,
        down=down,
        up=up,
        row_adapters=row_adapters,
        column_adapters=column_adapters,
        column_scales=column_scales,
        dropout_seed=dropout_seed if dropout_p else None,
    )
    if packed is not None:
        expect_whole(name, "weight", packed, x)
        operands = _with_packed(operands, packed)
    if delta is not None:
        operands = _with_delta(name, operands, delta, x, max(n_deltas, 1) * n_out, n_in)
    nested = None if packed is None else packed.nested
    problem = Problem(
        device=device, dtype=x.dtype, tokens=x2.shape[0], in_features=n_in, out_features=n_out,
        rank=rank, format=DENSE if packed is None else packed.format,
        group_size=0 if packed is None else packed.group_size,
        nested_offset=0.0 if nested is None else float(nested.offset),
        nested_block=0 if nested is None else nested.block, scale=float(scale),
        activation=activation, dropout_p=float(dropout_p), int8_activations=int8_activations,
        has_delta=delta is not None, n_deltas=n_deltas,
    )  # fmt: skip
    return problem, x2, operands


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of x, or None."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _matrix(name: str, weight: torch.Tensor) -> tuple[int, int]:
    size = expect_shapes(name, weight=(weight, "OI"))
    return size["O"], size["I"]


def _check_low_rank(name, n_out, n_in, down, up, scale, activation, dropout_p) -> int:
    """The rank of the update; 0 without one."""
    if (down is None) != (up is None):
        missing = "down" if down is None else "up"
        raise ValueError(f"{name}: {missing} is missing, need down and up together or neither")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: no activation {activation!r}. Known: {', '.join(ACTIVATIONS)}")
    if not abs(scale) < math.inf:  # a graph compiler cannot follow math.isfinite
        raise ValueError(f"{name}: scale is {scale}, need a finite number")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, need 0 <= dropout_p < 1")
    if down is None:
        if dropout_p:
            raise ValueError(f"{name}: dropout_p is {dropout_p} without down and up to drop from")
        return 0
    rank = down.shape[0] if down.dim() == 2 else -1
    if down.shape != (rank, n_in):
        raise ValueError(f"{name}: down has shape {tuple(down.shape)}, need (R, {n_in})")
    if up.shape != (n_out, rank):
        raise ValueError(f"{name}: up has shape {tuple(up.shape)}, need ({n_out}, {rank})")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{name}: R is {rank}, need 1 <= R <= {MAX_RANK}")
    return rank


def _with_packed(operands: Operands, packed: PackedWeight) -> Operands:
    nested = packed.nested
    return operands._replace(
        codes=packed.codes,
        scales=packed.scales,
        offsets=packed.offsets,
        input_order=packed.input_order,
        nested_table=None if nested is None else nested.table,
        nested_absmax=None if nested is None else nested.absmax,
    )


def _with_delta(name, operands: Operands, delta: WeightDelta, x, n_out, n_in) -> Operands:
    if delta.shape != (n_out, n_in):
        raise ValueError(
            f"{name}: delta is of shape {delta.shape}, need {(n_out, n_in)}: (O, I) as in weight"
        )
    parts = {f"delta's {n}": getattr(delta, n) for n in ("row_offsets", "columns", "values")}
    expect_device(name, x=x, **parts)
    delta.expect_whole(name)
    if delta.values.dtype == torch.float64 and x.dtype != torch.float64:
        raise ValueError(
            f"{name}: delta's values are torch.float64 over x of {x.dtype}, "
            "need float32 or bfloat16"
        )
    return operands._replace(
        delta_offsets=delta.row_offsets, delta_columns=delta.columns, delta_values=delta.values
    )


_CANDIDATES = (
    choose.implementation_of("linear", "triton_gpu"),
    # before the one above wherever a measurement says so; there is none yet
    choose.implementation_of("linear", "cuda_hopper"),
    choose.implementation_of("linear", "cpp_cpu"),
    choose.REFERENCE,
)


def _sample_problems() -> dict[str, object]:
    """What `doctor` asks about: a usual training shape."""
    return {
        f"{label} {format}": Problem(
            device=device, dtype=dtype, tokens=512, in_features=4096, out_features=4096, rank=16,
            format=format, group_size=0 if format == DENSE else 64,
        )
        for label, device, dtype in choose.usual_types()
        for format in (DENSE, "nf4", "int4", "int8", "fp8")
    }  # fmt: skip


def _described(*args, impl="auto", **kwargs):
    return describe(*args, **kwargs)[0]


choose.register(choose.Operator("fused_linear", _CANDIDATES, _described, _sample_problems))
