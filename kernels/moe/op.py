"""torch.library schemas, fakes and autograd of moe_mlp.

The choice among implementations is made inside the operators, so that a compiled graph holds one
opaque call whatever runs in it. _C is not imported before a call needs it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.common.packed import decode
from tilewright.ops.moe import low_rank, reference
from tilewright.ops.moe.problem import DENSE, OPERANDS, Operands, Packing, Problem

library = torch.library.Library("tilewright", "FRAGMENT")

_REST = ", ".join(f"Tensor? {name}" for name in OPERANDS) + (
    ", int experts, int width, str activation, float alpha, float limit, bool interleaved, "
    "bool transposed, bool scale_input, "
    "str up_format, int up_group_size, float up_nested_offset, int up_nested_block, "
    "str down_format, int down_group_size, float down_nested_offset, int down_nested_block, "
    "float? up_scale, float? down_scale, "
    "str impl"
)
# keeps: whether z is wanted. Returns y (T, H); z (T K, 2 I), what the activation was applied to, in
# the order of rows, or empty; order (T K) int32, the slot of each row, those that go nowhere last;
# starts (E + 1) int64, where each expert's rows begin
library.define(
    f"moe_mlp(Tensor x, Tensor ids, Tensor gates, bool keeps, {_REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# wants and results: dx, dgates, and the gradients of the first TRAINABLE operands
library.define(
    "moe_mlp_backward(Tensor dy, Tensor x, Tensor gates, Tensor z, Tensor order, Tensor starts, "
    f"bool[10] wants, {_REST}) -> ({', '.join(['Tensor'] * 10)})"
)

N_OPERANDS = len(OPERANDS)
TRAINABLE = 8  # gate_up, down, their biases, up_a, up_b, down_a, down_b


def rest(p: Problem, impl: str) -> tuple:
    """The operators' arguments after the tensors."""
    return (
        p.experts, p.width, p.activation, p.alpha, p.limit, p.interleaved, p.transposed,
        p.scale_input, *p.up, *p.down, p.up_scale, p.down_scale, impl,
    )  # fmt: skip


def _problem(x, gates, *r) -> tuple[Problem, Operands, str]:
    """The problem record, the weights and `impl` again, from the operators' arguments."""
    o = Operands._make(r[:N_OPERANDS])
    (experts, width, activation, alpha, limit, interleaved, transposed, scale_input, *packings,
     up_scale, down_scale, impl) = r[N_OPERANDS:]  # fmt: skip
    problem = Problem(
        device=x.device.type, dtype=x.dtype, tokens=x.shape[0], slots=gates.shape[1],
        experts=experts, features=x.shape[1], width=width, activation=activation, alpha=alpha,
        limit=limit, interleaved=interleaved, transposed=transposed, scale_input=scale_input,
        up=Packing(*packings[:4]), down=Packing(*packings[4:]), up_scale=up_scale,
        down_scale=down_scale,
    )  # fmt: skip
    return problem, o, impl


def sort_slots(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order (T K) int32 and starts (E + 1) int64 of ids (T, K)."""
    flat = ids.reshape(-1)
    flat = flat.masked_fill((flat < 0) | (flat >= experts), experts)  # nowhere: last
    by_expert = flat.sort(stable=True)
    edges = torch.arange(experts + 1, dtype=flat.dtype, device=flat.device)
    return by_expert.indices.int(), torch.searchsorted(by_expert.values, edges)


def _implementation(name: str):
    if name == "cpp_cpu":
        from tilewright.ops.moe import cpp_cpu

        return cpp_cpu
    if name == "triton_gpu":
        from tilewright.ops.moe import triton_gpu

        return triton_gpu
    return _ReferenceImplementation


class _ReferenceImplementation:
    """The reference in the operators' dtypes; it keeps no z, which its backward computes again."""

    @staticmethod
    def _weights(p: Problem, o: Operands) -> list[torch.Tensor | None]:
        if p.up.format == DENSE:
            weights = [o.gate_up, o.down]
        else:
            packed = p.packed_gate_up(o), p.packed_down(o)
            shapes = (p.experts, p.lines, p.features), (p.experts, p.features, p.width)
            weights = [decode(w).view(s) for w, s in zip(packed, shapes, strict=True)]
        return [*weights, *o[2:TRAINABLE]]

    @staticmethod
    def _call(x, ids, gates, weights, rule):
        named = dict(zip(OPERANDS[:TRAINABLE], weights, strict=True))
        return reference.moe_mlp(x, ids, gates, **named, **rule)

    @staticmethod
    def _rule(p: Problem) -> dict:
        return dict(
            activation=p.activation, interleaved=p.interleaved, transposed=p.transposed,
            scale_input=p.scale_input, alpha=p.alpha, limit=p.limit,
            up_scale=p.up_scale, down_scale=p.down_scale,
        )  # fmt: skip

    @classmethod
    def forward(cls, x, gates, order, starts, keeps, o, p):
        ids = cls._ids(order, starts, p)
        y = cls._call(x, ids, gates, cls._weights(p, o), cls._rule(p))
        shape = (order.numel() if keeps else 0, p.lines)
        return y.to(x.dtype), x.new_zeros(shape)

    @classmethod
    def backward(cls, dy, x, gates, z, order, starts, o, p, wants):
        inputs = [x, gates, *cls._weights(p, o)]
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
            x64, gates64, *weights = leaves
            ids = cls._ids(order, starts, p)
            y = cls._call(x64, ids, gates64, weights, cls._rule(p))
            wanted = [
                t for t, wants_it in zip(leaves, wants, strict=True) if wants_it and t is not None
            ]
            grads = iter(torch.autograd.grad(y, wanted, dy.double(), materialize_grads=True))
        return tuple(
            next(grads).to(t.dtype) if wants_it else x.new_empty(0)
            for t, wants_it in zip(inputs, wants, strict=True)
        )

    @staticmethod
    def _ids(order, starts, p: Problem) -> torch.Tensor:
        experts = torch.arange(p.experts, device=order.device).repeat_interleave(starts.diff())
        ids = torch.full((p.tokens * p.slots,), -1, dtype=torch.int64, device=order.device)
        ids[order[: experts.numel()].long()] = experts
        return ids.view(p.tokens, p.slots)


def _is_composed(implementation, p: Problem) -> bool:
    """Whether the low-rank updates are added around the implementation."""
    return implementation is not _ReferenceImplementation and low_rank.has_update(p)


def _run_forward(x, ids, gates, keeps, o: Operands, p: Problem, impl: str):
    implementation = _implementation(choose.choose("moe_mlp", impl, p))
    order, starts = sort_slots(ids, p.experts)
    if _is_composed(implementation, p):
        y, z = low_rank.forward(implementation, x, gates, order, starts, keeps, o, p)
    else:
        y, z = implementation.forward(x, gates, order, starts, keeps, o, p)
    return y, z, order, starts


def _forward(x, ids, gates, keeps, *r):
    p, o, impl = _problem(x, gates, *r)
    return _run_forward(x, ids, gates, keeps, o, p, impl)


def _backward(dy, x, gates, z, order, starts, wants, *r):
    p, o, impl = _problem(x, gates, *r)
    implementation = _implementation(choose.choose("moe_mlp", impl, p))
    if _is_composed(implementation, p):
        return low_rank.backward(implementation, dy, x, gates, z, order, starts, o, p, wants)
    found = implementation.backward(dy, x, gates, z, order, starts, o, p, wants)
    return *found, *[x.new_empty(0) for _ in range(len(wants) - len(found))]


for _name, _function in (("moe_mlp", _forward), ("moe_mlp_backward", _backward)):
    library.impl(_name, _function, "CPU")
    library.impl(_name, _function, "CUDA")


@torch.library.register_fake("tilewright::moe_mlp", lib=library)
def _(x, ids, gates, keeps, *r):
    p, _, _ = _problem(x, gates, *r)
    rows = ids.shape[0] * ids.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(rows if keeps else 0, p.lines),
        ids.new_empty(rows, dtype=torch.int32),
        ids.new_empty(p.experts + 1, dtype=torch.int64),
    )


@torch.library.register_fake("tilewright::moe_mlp_backward", lib=library)
def _(dy, x, gates, z, order, starts, wants, *r):
    return tuple(
        t.new_empty(t.shape) if wants_it else x.new_empty(0)
        for t, wants_it in zip((x, gates, *r[:TRAINABLE]), wants, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, _, gates, keeps, *r = inputs
    ctx.set_materialize_grads(False)
    if not keeps and any(ctx.needs_input_grad):
        raise RuntimeError("moe_mlp: a gradient is asked for, but keeps is False")
    ctx.save_for_backward(x, gates, *output[1:], *r[:N_OPERANDS])
    ctx.rest = r[N_OPERANDS:]


def _autograd_backward(ctx, dy, *_):
    x, gates, z, order, starts, *operands = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None] * len(needs)
    places = (0, 2, *range(4, 4 + TRAINABLE))
    wants = [needs[i] for i in places]
    if dy is not None and any(wants):
        found = torch.ops.tilewright.moe_mlp_backward(
            dy, x, gates, z, order, starts, wants, *operands, *ctx.rest
        )
        for i, wants_it, grad in zip(places, wants, found, strict=True):
            grads[i] = grad if wants_it else None
    return tuple(grads)


torch.library.register_autograd(
    "tilewright::moe_mlp", _autograd_backward, setup_context=_setup_context, lib=library
)


class _MoeMlp(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        return _autograd_backward(ctx, dy)


def call_moe_mlp(x, ids, gates, o: Operands, p: Problem, impl: str) -> torch.Tensor:
    """The registered operator, or in plain eager mode what it would end up calling."""
    trained = (x, gates, *o[:TRAINABLE])
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    if not may_go_direct(x, ids, gates, *[t for t in o if t is not None]):
        return torch.ops.tilewright.moe_mlp(x, ids, gates, keeps, *o, *rest(p, impl))[0]
    if keeps:
        return _MoeMlp.apply(x, ids, gates, True, *o, *rest(p, impl))[0]
    return _run_forward(x, ids, gates, False, o, p, impl)[0]
