"""The norm room's public functions: docstrings, checks, and the call into the operators."""

from __future__ import annotations

import math
from typing import overload

import torch

from tilewright import choose
from tilewright.ops.norm import op
from tilewright.ops.norm.problem import GEMMA, LAYER, LLAMA, Problem
from tilewright.shapes import expect_device, expect_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
CASTINGS = (LLAMA, GEMMA)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    residual: None = None,
    eps: float = 1e-6,
    casting: str = LLAMA,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    residual: torch.Tensor,
    eps: float = 1e-6,
    casting: str = LLAMA,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    casting: str = LLAMA,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rows over their root mean square, times a weight; with a residual the sum is normalised.

        s = x + residual,   y = s / sqrt(mean(s^2) + eps) (weight_offset + weight)

    x              (T, N) or (..., N); T may be 0
    weight         (N,) of any floating dtype; default 1
    residual       as x; the sum is rounded to x.dtype before it is normalised, and returned
    eps            at least 0
    casting        "llama" rounds s / sqrt(..) to x.dtype before it meets the weight, "gemma" rounds
                   the product alone; as the models of these names in transformers do
    weight_offset  1 for Gemma, whose weights are stored less 1
    impl           "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns y (..., N), with a residual (y, s). s has x.dtype; so has y, but with "llama" the wider
    of x's and weight's, as in torch. Dtypes of x: float32, bfloat16, float16 (float64: reference
    only). Sums are float32; the error against float64 is at most twice that of the same formula in
    torch. Each element is read once from memory and written once. A row's result does not depend on
    the other rows, and the weight's gradient, a sum over rows, not on the number of threads.
    Autocast changes nothing.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Zhang and Sennrich, Root mean square layer normalization, arXiv 1910.07467.
    """
    _expect_norm("rms_norm", x, weight, None, residual, eps)
    if casting not in CASTINGS:
        raise ValueError(f'rms_norm: no casting "{casting}". Known: {", ".join(CASTINGS)}')
    return op.call_norm(x, weight, None, residual, eps, weight_offset, casting, impl)


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rows less their mean, over their standard deviation; with a residual of the sum of both.

        s = x + residual,   y = (s - mean(s)) / sqrt(var(s) + eps) weight + bias

    x             (T, N) or (..., N); T may be 0
    weight, bias  (N,) of any floating dtype; default 1 and 0
    residual      as x; the sum is rounded to x.dtype before it is normalised, and returned
    eps           at least 0
    impl          "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns y (..., N) in x.dtype, with a residual (y, s). Dtypes and reproducibility are those of
    `rms_norm`; the variance is that of the centred row. The error against float64 is at most twice
    that of torch's layer_norm.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Ba et al., Layer normalization, arXiv 1607.06450.
    """
    _expect_norm("layer_norm", x, weight, bias, residual, eps)
    return op.call_norm(x, weight, bias, residual, eps, 0.0, LAYER, impl)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    heads_first: bool = False,
    in_place: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Rotary positions: pairs of a head's columns turned by the token's angles.

        y[a] = x[a] cos - x[b] sin,   y[b] = x[b] cos + x[a] sin

    with (a, b) = (c, c + C) for the C angles, or (2 c, 2 c + 1) if interleaved.

    x            (B, L, H, D); any strides, such as a view of a joint qkv
    cos, sin     (L, C) or (B, L, C), 1 <= 2 C <= D; columns of x from 2 C on stay as they are. Of
                 tables that hold every angle twice, pass the half, `cos[..., :C]`, which copies
                 nothing. In x.dtype each product is rounded as well, as transformers does; in
                 float32 only the result is. They get no gradient
    positions    (B, L) int64 or int32: rows of (P, C) tables, such as those of packed documents
    interleaved  pairs of neighbours, as in GPT-J, instead of halves
    heads_first  x is (B, H, L, D)
    in_place     x itself is turned and returned
    impl         "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns y as x, in its layout. The backward turns by the negative angle; it keeps the tables
    alone. Any scaling of positions or frequencies is the tables' own matter. Dtypes of x: float32,
    bfloat16, float16 (float64: reference only).
    ValueError: a shape, dtype or value outside the above (values of positions: on a CPU; on a GPU
    they are not read back). RuntimeError: `impl` was named and cannot run here.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.4.
    """
    _expect_rope(x, cos, sin, positions, heads_first)
    return op.call_rope(x, cos, sin, positions, interleaved, heads_first, in_place, impl)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Gated SiLU: silu(gate) up, from two tensors or the halves of one.

        y = gate / (1 + exp(-gate)) up

    gate  (T, F) or (..., F); without up (..., 2 F), gate first
    up    as gate
    impl  "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns (..., F) in gate.dtype: float32, bfloat16, float16 (float64: reference only). silu(gate)
    is rounded to it before it meets up, as in torch; gradients are computed from gate and up in
    float32 and rounded once, and nothing else is kept for them. The error against float64 is at
    most twice that of torch.
    ValueError: a shape or dtype outside the above. RuntimeError: `impl` was named and cannot run
    here.

    Source: Shazeer, GLU variants improve transformer, arXiv 2002.05202.
    """
    _expect_gated("swiglu", gate, up)
    return op.call_gated(gate, up, "silu", impl)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    impl: str = "auto",
) -> torch.Tensor:
    """Gated GELU: gelu(gate) up, from two tensors or the halves of one.

        y = gate Phi(gate) up,   or with tanh in place of the normal distribution function

    gate         (T, F) or (..., F); without up (..., 2 F), gate first
    up           as gate
    approximate  "none", or "tanh": Phi(a) = (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))) / 2
    impl         "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns (..., F) in gate.dtype; dtypes, rounding and accuracy are those of `swiglu`.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Shazeer, GLU variants improve transformer, arXiv 2002.05202; Hendrycks and Gimpel,
    Gaussian error linear units, arXiv 1606.08415.
    """
    _expect_gated("geglu", gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'geglu: no approximate "{approximate}". Known: none, tanh')
    return op.call_gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu", impl)


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Rows of a weight by their numbers, with a gradient that is the same in every run.

        y[t] = weight[ids[t]],   dweight[v] = sum of dy[t] over the t with ids[t] = v, in order

    ids                 (T,) or (...) int64 or int32, 0 to V - 1
    weight              (V, N)
    padding_idx         -V to V - 1: a row whose gradient is 0
    scale_grad_by_freq  dweight[v] is divided by the number of its t
    impl                "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns (..., N) in weight.dtype: float32, bfloat16, float16 (float64: reference only). The
    gradient is dense; its sums are float32 over tokens sorted by id, without atomics, and do not
    depend on the number of threads.
    ValueError: a shape, dtype or value outside the above; ids out of range on a CPU. On a GPU they
    are not read back, and such a row becomes NaN. RuntimeError: `impl` was named and cannot run
    here.

    Source: Mikolov et al., Efficient estimation of word representations, arXiv 1301.3781.
    """
    name = "embedding"
    if ids.dtype not in INTEGERS:
        raise ValueError(f"{name}: ids is {ids.dtype}, need torch.int64 or torch.int32")
    expect_dtype(name, DTYPES, weight=weight)
    expect_device(name, weight=weight, ids=ids)
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, need axes (V, N), N > 0")
    n_rows = weight.shape[0]
    if padding_idx is not None and not -n_rows <= padding_idx < n_rows:
        raise ValueError(
            f"{name}: padding_idx is {padding_idx}, need {-n_rows} to {n_rows - 1}, a row of weight"
        )
    padding_row = -1 if padding_idx is None else padding_idx % n_rows
    return op.call_embedding(ids, weight, padding_row, scale_grad_by_freq, impl)


def _expect_norm(name, x, weight, bias, residual, eps) -> None:
    if x.dtype not in DTYPES:
        expect_dtype(name, DTYPES, x=x)
    shape = x.shape
    if not shape or shape[-1] < 1:
        raise ValueError(
            f"{name}: x has shape {tuple(shape)}, need axes (..., N) with N at least 1"
        )
    for argument, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.shape != shape[-1:]:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(t.shape)}, need ({shape[-1]},): N as in x"
            )
        if t.dtype not in DTYPES:
            expect_dtype(name, DTYPES, **{argument: t})
        if t.device != x.device:
            expect_device(name, x=x, **{argument: t})
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(
                f"{name}: residual has shape {tuple(residual.shape)}, need {tuple(shape)} as x"
            )
        expect_dtype(name, DTYPES, x=x, residual=residual)
        expect_device(name, x=x, residual=residual)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name}: eps is {eps}, need a finite number of at least 0")


def _expect_rope(x, cos, sin, positions, heads_first) -> None:
    name = "rope"
    if x.dtype not in DTYPES:
        expect_dtype(name, DTYPES, x=x)
    if x.dim() != 4:
        axes = "(B, H, L, D)" if heads_first else "(B, L, H, D)"
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, need axes {axes}")
    batch, length, width = x.shape[0], x.shape[2 if heads_first else 1], x.shape[3]
    if cos.shape != sin.shape:
        raise ValueError(
            f"{name}: sin has shape {tuple(sin.shape)}, need {tuple(cos.shape)} as cos"
        )
    if cos.dtype != sin.dtype or cos.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{name}: cos is {cos.dtype} and sin {sin.dtype}, need {x.dtype} as x, or torch.float32"
        )
    if cos.device != x.device or sin.device != x.device:
        expect_device(name, x=x, cos=cos, sin=sin)
    if positions is None:
        fits = (
            cos.dim() in (2, 3)
            and cos.shape[-2] == length
            and (cos.dim() == 2 or cos.shape[0] in (1, batch))
        )
        if not fits:
            raise ValueError(
                f"{name}: cos has shape {tuple(cos.shape)}, need ({length}, C) or "
                f"({batch}, {length}, C): B and L as in x"
            )
    else:
        if cos.dim() != 2:
            raise ValueError(
                f"{name}: cos has shape {tuple(cos.shape)}, need axes (P, C) with positions"
            )
        if positions.dtype not in INTEGERS or positions.shape != (batch, length):
            raise ValueError(
                f"{name}: positions is {positions.dtype} of shape {tuple(positions.shape)}, need "
                f"torch.int64 or torch.int32 of shape ({batch}, {length})"
            )
        expect_device(name, x=x, positions=positions)
    if not 1 <= 2 * cos.shape[-1] <= width:
        raise ValueError(
            f"{name}: cos has {cos.shape[-1]} columns, need 1 to {width // 2}, half of D"
        )


def _expect_gated(name, gate, up) -> None:
    if gate.dtype not in DTYPES:
        expect_dtype(name, DTYPES, gate=gate)
    if gate.dim() == 0:
        raise ValueError(f"{name}: gate has shape (), need axes (..., F)")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{name}: gate has shape {tuple(gate.shape)}, need an even last axis without up"
            )
        return
    if up.shape != gate.shape:
        raise ValueError(
            f"{name}: up has shape {tuple(up.shape)}, need {tuple(gate.shape)} as gate"
        )
    if up.dtype != gate.dtype or up.device != gate.device:
        expect_dtype(name, DTYPES, gate=gate, up=up)
        expect_device(name, gate=gate, up=up)


_CANDIDATES = (
    choose.implementation_of("norm", "triton_gpu"),
    choose.implementation_of("norm", "cpp_cpu"),
    choose.REFERENCE,
)


def _register(name: str) -> None:
    def described(x, weight=None, *rest, impl="auto", **kwargs) -> Problem:
        tensor = x if name != "embedding" else kwargs.get("weight", weight)
        return Problem(name, tensor.device.type, tensor.dtype)

    def samples() -> dict[str, object]:
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        return {
            f"{device} {str(dtype).removeprefix('torch.')}": Problem(name, device, dtype)
            for device in devices
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }

    choose.register(choose.Operator(name, _CANDIDATES, described, samples))


for _name in ("rms_norm", "layer_norm", "rope", "swiglu", "geglu", "embedding"):
    _register(_name)
