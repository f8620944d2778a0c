"""torch.library schemas, fakes and autograd of the linear room.

The choice among implementations is made inside the operators, so that a compiled graph holds one
opaque call whatever runs in it. Neither triton nor _C is imported before a call needs it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.common.packed import decode, eight_bit_table
from tilewright.ops.common.sparse_delta import expect_in_range, rows_of
from tilewright.ops.linear import reference, sampled  # noqa: F401  registers what the backward calls
from tilewright.ops.linear.problem import DENSE, OPERANDS, Operands, Problem

library = torch.library.Library("tilewright", "FRAGMENT")

_REST = ", ".join(f"Tensor? {name}" for name in OPERANDS) + (
    ", int out_features, str format, int group_size, float nested_offset, int nested_block, "
    "float scale, str activation, float dropout_p, bool int8_activations, str impl"
)
library.define(f"fused_linear(Tensor x, {_REST}) -> (Tensor, Tensor)")
# wants: dx, dbias, ddown, dup
library.define(
    f"fused_linear_backward(Tensor dy, Tensor x, Tensor hidden, bool[4] wants, {_REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

N_OPERANDS = len(OPERANDS)
WEIGHT, BIAS, OUT_SCALE, DOWN, UP, DELTA_OFFSETS, DELTA_COLUMNS, DELTA_VALUES = (
    OPERANDS.index(name)
    for name in ("weight", "bias", "out_scale", "down", "up", "delta_offsets", "delta_columns",
                 "delta_values")
)  # fmt: skip


def rest(p: Problem, impl: str) -> tuple:
    """The operators' arguments after the tensors."""
    return (
        p.out_features, p.format, p.group_size, p.nested_offset, p.nested_block, p.scale,
        p.activation, p.dropout_p, p.int8_activations, impl,
    )  # fmt: skip


def _problem(x, *r, needs_grad=False) -> tuple[Problem, Operands, str]:
    """The problem record, the tensors and `impl` again, from the operators' arguments."""
    o = Operands._make(r[:N_OPERANDS])
    (out_features, format, group_size, nested_offset, nested_block, scale, activation, dropout_p,
     int8_activations, impl) = r[N_OPERANDS:]  # fmt: skip
    n_deltas = 0
    if o.delta_offsets is not None and o.row_adapters is not None:
        n_deltas = (o.delta_offsets.shape[0] - 1) // max(out_features, 1)
    problem = Problem(
        device=x.device.type, dtype=x.dtype, tokens=x.shape[0], in_features=x.shape[1],
        out_features=out_features, rank=0 if o.down is None else o.down.shape[0], format=format,
        group_size=group_size, nested_offset=nested_offset, nested_block=nested_block,
        scale=scale, activation=activation, dropout_p=dropout_p,
        int8_activations=int8_activations, needs_grad=needs_grad,
        has_delta=o.delta_values is not None, n_deltas=n_deltas,
    )  # fmt: skip
    return problem, o, impl


def _implementation(name: str):
    if name == "cpp_cpu":
        from tilewright.ops.linear import cpp_cpu

        return cpp_cpu
    if name == "cuda_hopper":
        from tilewright.ops.linear import cuda_hopper

        return cuda_hopper
    if name == "triton_gpu":
        from tilewright.ops.linear import triton_gpu

        return triton_gpu
    return _ReferenceImplementation


class _ReferenceImplementation:
    """The reference in the operators' dtypes."""

    @staticmethod
    def _weight(p: Problem, o: Operands) -> torch.Tensor:
        if p.format == DENSE:
            assert o.weight is not None
            return o.weight.double()
        return decode(p.packed(o), eight_bit_table(p.format) if p.int8_activations else None)

    @staticmethod
    def _delta(p: Problem, o: Operands) -> torch.Tensor | None:
        if not p.has_delta:
            return None
        dense = p.delta(o).dense().double()
        return dense.view(p.n_deltas, p.out_features, p.in_features) if p.n_deltas else dense

    @staticmethod
    def _low_rank(x: torch.Tensor, p: Problem, o: Operands) -> dict:
        dropped = None
        if p.dropout_p:
            seed = int(o.dropout_seed.item()) if o.dropout_seed is not None else 0
            dropped = reference.dropout_factors(seed, p.tokens, p.in_features, p.dropout_p)
            dropped = dropped.to(x.device)
        return dict(
            # as they meet x
            down=None if o.down is None else o.down.to(x.dtype),
            up=None if o.up is None else o.up.to(x.dtype), scale=p.scale,
            activation=p.activation, dropped=dropped, row_adapters=o.row_adapters,
            column_adapters=o.column_adapters, column_scales=o.column_scales,
        )  # fmt: skip

    @classmethod
    def forward(cls, x, o, p):
        weight = cls._weight(p, o)
        if p.int8_activations:
            codes, scale = reference.quantize_rows(x)
            base, _ = reference.fused_linear(codes * scale, weight, o.bias, o.out_scale)
            zero = torch.zeros_like(weight)
            # neither D nor the update reads rounded x
            update, hidden = reference.fused_linear(
                x, zero, None, o.out_scale, delta=cls._delta(p, o), **cls._low_rank(x, p, o)
            )
            y = base + update
        else:
            y, hidden = reference.fused_linear(
                x, weight, o.bias, o.out_scale, delta=cls._delta(p, o), **cls._low_rank(x, p, o)
            )
        return y.to(x.dtype), hidden.to(x.dtype)

    @classmethod
    def backward(cls, dy, x, hidden, o, p, wants):
        low_rank = cls._low_rank(x, p, o)
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().double().requires_grad_()
                for t in (x, o.bias, low_rank["down"], low_rank["up"])
            ]
            x64, bias, down, up = leaves
            low_rank |= {"down": down, "up": up}
            y, _ = reference.fused_linear(
                x64, cls._weight(p, o), bias, o.out_scale, delta=cls._delta(p, o), **low_rank
            )
            wanted = [
                t for t, wants_it in zip(leaves, wants, strict=True) if wants_it and t is not None
            ]
            grads = iter(torch.autograd.grad(y, wanted, dy.double()))
        like = (x, o.bias, o.down, o.up)
        return tuple(
            next(grads).to(t.dtype) if wants_it else x.new_empty(0)
            for t, wants_it in zip(like, wants, strict=True)
        )


def _expect_adapters(o: Operands, p: Problem) -> None:
    """Refuse rows of adapters that are not there; on a GPU it would wait for the device."""
    rows, columns = o.row_adapters, o.column_adapters
    if rows is None or rows.device.type != "cpu":
        return
    last = max(-1 if columns is None else int(columns.max()), p.n_deltas - 1)
    stray = ((rows < -1) | (rows > last)).nonzero()
    if stray.numel():
        t = int(stray[0])
        raise ValueError(
            f"multi_lora_linear: row_adapters[{t}] is {int(rows[t])}, "
            f"need -1 for none or 0 to {last}"
        )


def _run_forward(x, o: Operands, p: Problem, impl: str):
    _expect_adapters(o, p)
    return _implementation(choose.choose("fused_linear", impl, p)).forward(x, o, p)


def _expect_delta(o: Operands, p: Problem) -> None:
    """A traced call's delta was seen without its values, and only here has them."""
    if p.has_delta and p.device == "cpu":
        d = p.delta(o)
        expect_in_range("fused_linear", d.row_offsets, d.columns, *d.shape)


def _forward(x, *r):
    p, o, impl = _problem(x, *r)
    _expect_delta(o, p)
    return _run_forward(x, o, p, impl)


def _backward(dy, x, hidden, wants, *r):
    p, o, impl = _problem(x, *r, needs_grad=True)
    name = choose.choose("fused_linear", impl, p)
    return _implementation(name).backward(dy, x, hidden, o, p, wants)


for _name, _function in (("fused_linear", _forward), ("fused_linear_backward", _backward)):
    library.impl(_name, _function, "CPU")
    library.impl(_name, _function, "CUDA")


@torch.library.register_fake("tilewright::fused_linear", lib=library)
def _(x, *r):
    p, _, _ = _problem(x, *r)
    return x.new_empty(x.shape[0], p.out_features), x.new_empty(x.shape[0], p.rank)


@torch.library.register_fake("tilewright::fused_linear_backward", lib=library)
def _(dy, x, hidden, wants, *r):
    _, o, _ = _problem(x, *r)
    return tuple(
        t.new_empty(t.shape) if wants_it else x.new_empty(0)
        for t, wants_it in zip((x, o.bias, o.down, o.up), wants, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, *r = inputs
    ctx.set_materialize_grads(False)
    # x serves the gradients of the weight and of an update; of a frozen base nothing weight-sized
    # is new
    needs_x = (
        r[DOWN] is not None
        or ctx.needs_input_grad[1 + WEIGHT]
        or ctx.needs_input_grad[1 + DELTA_VALUES]
    )
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(x if needs_x else None, output[1], *r[:N_OPERANDS])
    ctx.rest = r[N_OPERANDS:]


def _autograd_backward(ctx, dy, dhidden):
    x, hidden, *operands = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None] * len(needs)
    if dy is None:
        return tuple(grads)
    if x is None:  # only its shape is asked for: one row, seen as all of them
        x = dy.new_zeros(ctx.in_features).expand(dy.shape[0], ctx.in_features)
    places = (0, 1 + BIAS, 1 + DOWN, 1 + UP)
    wants = [needs[i] for i in places]
    if any(wants):
        found = torch.ops.tilewright.fused_linear_backward(
            dy, x, hidden, wants, *operands, *ctx.rest
        )
        for i, wants_it, grad in zip(places, wants, found, strict=True):
            grads[i] = grad if wants_it else None
    if needs[1 + WEIGHT]:
        grads[1 + WEIGHT] = weight_gradient(dy, x, operands[OUT_SCALE])
    if needs[1 + DELTA_VALUES]:
        grads[1 + DELTA_VALUES] = delta_gradient(dy, x, operands, ctx.rest[-1])
    return tuple(grads)


def weight_gradient(dy, x, out_scale) -> torch.Tensor:
    """Of a trainable dense weight: a plain product."""
    upstream = dy if out_scale is None else dy * out_scale.to(dy.dtype)
    return upstream.T @ x


def delta_gradient(dy, x, operands, impl) -> torch.Tensor:
    """dvalues[n] = out_scale[o] sum_t dy[t, o] x[t, i] for the place (o, i) of value n."""
    offsets, columns, values, out_scale = (
        operands[i] for i in (DELTA_OFFSETS, DELTA_COLUMNS, DELTA_VALUES, OUT_SCALE)
    )
    found = torch.ops.tilewright.sampled_product(dy, x, offsets, columns, impl)
    if out_scale is not None:
        found = found * out_scale.to(found.dtype)[rows_of(offsets, columns.shape[0])]
    return found.to(values.dtype)


torch.library.register_autograd(
    "tilewright::fused_linear", _autograd_backward, setup_context=_setup_context, lib=library
)


class _FusedLinear(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, x, *r):
        outputs = _forward(x, *r)
        _setup_context(ctx, (x, *r), outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dhidden):
        return _autograd_backward(ctx, dy, None)


def call_fused_linear(x, o: Operands, p: Problem, impl: str) -> torch.Tensor:
    """The registered operator, or in plain eager mode what it would end up calling."""
    if not may_go_direct(x, *[t for t in o if t is not None]):
        return torch.ops.tilewright.fused_linear(x, *o, *rest(p, impl))[0]
    if torch.is_grad_enabled() and needs_gradient(x, o):
        return _FusedLinear.apply(x, *o, *rest(p, impl))[0]
    return _run_forward(x, o, p, impl)[0]


def needs_gradient(x, o: Operands) -> bool:
    for t in (x, o.weight, o.bias, o.down, o.up, o.delta_values):
        if t is not None and t.requires_grad:
            return True
    return False
