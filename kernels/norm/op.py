"""torch.library schemas, fakes and autograd of the norm room.

The choice among implementations is made inside the operators, so that a compiled graph holds one
opaque call whatever runs in it. Neither triton nor _C is imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch.autograd.function import once_differentiable

from tilewright import choose, settings
from tilewright.direct import may_go_direct
from tilewright.ops.norm import reference
from tilewright.ops.norm.problem import LAYER, Problem, heads_last, stats_shape, y_dtype

library = torch.library.Library("tilewright", "FRAGMENT")

library.define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "float weight_offset, str kind, str impl) -> (Tensor, Tensor, Tensor)"
)
# wants: dx, dweight, dbias
library.define(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
    "float eps, float weight_offset, str kind, bool[3] wants, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, "
    "bool heads_first, bool inverse, str impl) -> Tensor"
)
library.define("gated(Tensor gate, Tensor? up, str activation, str impl) -> Tensor")
library.define(
    "gated_backward(Tensor dy, Tensor gate, Tensor? up, str activation, bool[2] wants, str impl) "
    "-> (Tensor, Tensor)"
)
library.define(
    "embedding(Tensor ids, Tensor weight, int padding_row, bool by_frequency, str impl) -> Tensor"
)
library.define(
    "embedding_backward(Tensor dy, Tensor ids, int n_rows, int padding_row, bool by_frequency, "
    "str impl) -> Tensor"
)


class _ReferenceImplementation:
    """The reference in the operators' dtypes."""

    @staticmethod
    def norm(x, weight, bias, residual, eps, weight_offset, kind, keeps_stats):
        y, total = reference.norm(x, weight, bias, residual, eps, weight_offset, kind == LAYER)
        mean = total.mean(-1, keepdim=True) if kind == LAYER else total.new_zeros(())
        rstd = torch.rsqrt((total - mean).square().mean(-1) + eps)
        parts = [rstd.flatten(), mean.flatten()] if kind == LAYER else [rstd.flatten()]
        return (
            y.to(y_dtype(kind, x.dtype, weight)).contiguous(),
            None if residual is None else total.to(x.dtype).contiguous(),
            torch.stack(parts).float(),
        )

    @staticmethod
    def norm_backward(dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants):
        like = (x, weight, bias)
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().double().requires_grad_() for t in like]
            y, _ = reference.norm(
                leaves[0], leaves[1], leaves[2], None, eps, weight_offset, kind == LAYER
            )
            wanted = [
                t for t, wants_it in zip(leaves, wants, strict=True) if wants_it and t is not None
            ]
            grads = iter(torch.autograd.grad(y, wanted, dy.double()))
        found = [
            next(grads) if wants_it and t is not None else None
            for t, wants_it in zip(like, wants, strict=True)
        ]
        if found[0] is not None and dsum is not None:
            found[0] = found[0] + dsum.double()
        return tuple(
            None if g is None else g.to(t.dtype).contiguous()
            for g, t in zip(found, like, strict=True)
        )

    @staticmethod
    def rope(x, cos, sin, positions, interleaved, heads_first, inverse, y):
        if positions is not None and positions.device.type == "cpu":
            _expect_in_range("rope", "positions", positions, cos.shape[0], "cos")
        turned = reference.rope(
            heads_last(x, heads_first), cos, -sin if inverse else sin, positions, interleaved
        )
        heads_last(y, heads_first).copy_(turned)

    @staticmethod
    def gated(gate, up, activation):
        a, b = (gate, up) if up is not None else gate.chunk(2, dim=-1)
        return reference.gated(a, b, activation).to(gate.dtype).contiguous()

    @classmethod
    def gated_backward(cls, dy, gate, up, activation, wants):
        with torch.enable_grad():
            leaves = [t.detach().double().requires_grad_() for t in (gate, up) if t is not None]
            a, b = leaves if up is not None else leaves[0].chunk(2, dim=-1)
            grads = torch.autograd.grad(reference.gated(a, b, activation), leaves, dy.double())
        found = [g.to(gate.dtype).contiguous() for g in grads]
        both = (found[0], found[1] if up is not None else None)
        return tuple(g if wants_it else None for g, wants_it in zip(both, wants, strict=True))

    @staticmethod
    def embedding(ids, weight):
        if ids.device.type == "cpu":
            _expect_in_range("embedding", "ids", ids, weight.shape[0], "weight")
        return reference.embedding(ids.long(), weight).to(weight.dtype)

    @staticmethod
    def embedding_backward(dy, ids, n_rows, padding_row, by_frequency):
        rows = dy.reshape(-1, dy.shape[-1])
        found = reference.embedding_gradient(
            rows, ids.reshape(-1).long(), n_rows, padding_row, by_frequency
        )
        return found.to(dy.dtype)


def _expect_in_range(name: str, argument: str, t: torch.Tensor, n: int, of: str) -> None:
    stray = ((t < 0) | (t >= n)).nonzero()
    if stray.numel():
        place = stray[0].tolist()
        raise ValueError(
            f"{name}: {argument}{place} is {int(t[tuple(place)])}, need 0 to {n - 1}, "
            f"the rows of {of}"
        )


@functools.cache
def _found(name: str, impl: str, device: str, dtype: torch.dtype, forced: str | None):
    # `forced` is not read: with another value of the variable the choice is made again
    chosen = choose.choose(name, impl, Problem(name, device, dtype))
    if chosen == "reference":
        return _ReferenceImplementation
    return importlib.import_module(f"tilewright.ops.norm.{chosen}")


def _chosen(name: str, impl: str, x: torch.Tensor):
    return _found(name, impl, x.device.type, x.dtype, settings.forced_impl())


def _or_empty(like: torch.Tensor, *tensors):
    """Operators return tensors alone: nothing becomes one of no elements."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _or_none(wants, tensors):
    return [t if wants_it else None for t, wants_it in zip(tensors, wants, strict=True)]


# --- norms ---


def _norm_name(kind: str) -> str:
    return "layer_norm" if kind == LAYER else "rms_norm"


def _norm(x, weight, bias, residual, eps, weight_offset, kind, impl):
    implementation = _chosen(_norm_name(kind), impl, x)
    found = implementation.norm(x, weight, bias, residual, eps, weight_offset, kind, True)
    return _or_empty(x, *found)


def _norm_backward(
    dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants, impl
):  # fmt: skip
    implementation = _chosen(_norm_name(kind), impl, x)
    found = implementation.norm_backward(
        dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants
    )
    return _or_empty(x, *found)


def _norm_setup(ctx, inputs, output):
    x, weight, bias, residual, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else output[1], weight, bias, output[2])
    ctx.rest = rest


def _norm_autograd(ctx, dy, dsum, dstats, is_direct=False):
    x, weight, bias, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants = [needs[0] or needs[3], needs[1], needs[2]]
    eps, weight_offset, kind, impl = ctx.rest
    if dy is None:
        grads = [dsum if wants[0] else None, None, None]
    else:
        dsum = dsum if wants[0] else None
        arguments = (dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants)
        if is_direct:
            grads = _chosen(_norm_name(kind), impl, x).norm_backward(*arguments)
        else:
            grads = _or_none(wants, torch.ops.tilewright.norm_backward(*arguments, impl))
    dx, dweight, dbias = grads
    return (dx if needs[0] else None), dweight, dbias, (dx if needs[3] else None), *[None] * 4


class _Norm(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, weight_offset, kind, impl):
        inputs = (x, weight, bias, residual, eps, weight_offset, kind, impl)
        y, total, stats = _chosen(_norm_name(kind), impl, x).norm(*inputs[:-1], True)
        _norm_setup(ctx, inputs, (y, total, stats))
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        return _norm_autograd(ctx, dy, dsum, None, may_go_direct(dy, dsum))


def call_norm(x, weight, bias, residual, eps, weight_offset, kind, impl):
    """y, or with a residual (y, sum): the registered operator, or in plain eager mode what it
    would end up calling."""
    if not may_go_direct(x, weight, bias, residual):
        y, total, _ = torch.ops.tilewright.norm(
            x, weight, bias, residual, eps, weight_offset, kind, impl
        )
        return y if residual is None else (y, total)
    if torch.is_grad_enabled():
        for t in (x, weight, bias, residual):
            if t is not None and t.requires_grad:
                return _Norm.apply(x, weight, bias, residual, eps, weight_offset, kind, impl)
    implementation = _chosen(_norm_name(kind), impl, x)
    y, total, _ = implementation.norm(x, weight, bias, residual, eps, weight_offset, kind, False)
    return y if residual is None else (y, total)


# --- rotary positions ---


def _rope(x, cos, sin, positions, interleaved, heads_first, inverse, impl):
    y = _fake_rope(x)
    _chosen("rope", impl, x).rope(x, cos, sin, positions, interleaved, heads_first, inverse, y)
    return y


def _rope_setup(ctx, inputs, output):
    _, cos, sin, positions, *rest = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.rest = rest


def _rope_autograd(ctx, dy, is_direct=False):
    cos, sin, positions = ctx.saved_tensors
    interleaved, heads_first, inverse, impl = ctx.rest
    run = _rope if is_direct else torch.ops.tilewright.rope
    dx = run(dy, cos, sin, positions, interleaved, heads_first, not inverse, impl)
    return dx, *[None] * 7


class _Rope(torch.autograd.Function):
    """The same forward and backward for calls that go direct, and the one that works in place."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved, heads_first, inverse, impl, in_place):
        inputs = (x, cos, sin, positions, interleaved, heads_first, inverse, impl)
        _rope_setup(ctx, inputs, None)
        if not in_place:
            return _rope(*inputs)
        ctx.mark_dirty(x)
        _chosen("rope", impl, x).rope(*inputs[:-1], x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_rope_autograd(ctx, dy, may_go_direct(dy)), None


def call_rope(x, cos, sin, positions, interleaved, heads_first, in_place, impl):
    rest = (cos, sin, positions, interleaved, heads_first, False, impl)
    if not may_go_direct(x, cos, sin, positions):
        y = torch.ops.tilewright.rope(x, *rest)
        return x.copy_(y) if in_place else y
    if x.requires_grad and torch.is_grad_enabled():
        return _Rope.apply(x, *rest, in_place)
    if not in_place:
        return _rope(x, *rest)
    _chosen("rope", impl, x).rope(x, *rest[:-1], x)
    torch.autograd.graph.increment_version(x)
    return x


# --- gated activations ---


def _gated_name(activation: str) -> str:
    return "swiglu" if activation == "silu" else "geglu"


def _gated(gate, up, activation, impl):
    return _chosen(_gated_name(activation), impl, gate).gated(gate, up, activation)


def _gated_backward(dy, gate, up, activation, wants, impl):
    implementation = _chosen(_gated_name(activation), impl, gate)
    return _or_empty(gate, *implementation.gated_backward(dy, gate, up, activation, wants))


def _gated_setup(ctx, inputs, output):
    gate, up, *rest = inputs
    ctx.save_for_backward(gate, up)
    ctx.rest = rest


def _gated_autograd(ctx, dy, is_direct=False):
    gate, up = ctx.saved_tensors
    activation, impl = ctx.rest
    wants = list(ctx.needs_input_grad[:2])
    arguments = (dy, gate, up, activation, wants)
    if is_direct:
        found = _chosen(_gated_name(activation), impl, gate).gated_backward(*arguments)
    else:
        found = _or_none(wants, torch.ops.tilewright.gated_backward(*arguments, impl))
    return *found, None, None


class _Gated(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, gate, up, activation, impl):
        _gated_setup(ctx, (gate, up, activation, impl), None)
        return _gated(gate, up, activation, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gated_autograd(ctx, dy, may_go_direct(dy))


def call_gated(gate, up, activation, impl):
    if not may_go_direct(gate, up):
        return torch.ops.tilewright.gated(gate, up, activation, impl)
    if (gate.requires_grad or (up is not None and up.requires_grad)) and torch.is_grad_enabled():
        return _Gated.apply(gate, up, activation, impl)
    return _gated(gate, up, activation, impl)


# --- embedding ---


def _embedding(ids, weight, padding_row, by_frequency, impl):
    return _chosen("embedding", impl, weight).embedding(ids, weight)


def _embedding_backward(dy, ids, n_rows, padding_row, by_frequency, impl):
    implementation = _chosen("embedding", impl, dy)
    return implementation.embedding_backward(dy, ids, n_rows, padding_row, by_frequency)


def _embedding_setup(ctx, inputs, output):
    ids, weight, *rest = inputs
    ctx.save_for_backward(ids)
    ctx.n_rows, ctx.rest = weight.shape[0], rest


def _embedding_autograd(ctx, dy, is_direct=False):
    (ids,) = ctx.saved_tensors
    run = _embedding_backward if is_direct else torch.ops.tilewright.embedding_backward
    dweight = run(dy, ids, ctx.n_rows, *ctx.rest)
    return None, dweight, None, None, None


class _Embedding(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, *inputs):
        _embedding_setup(ctx, inputs, None)
        return _embedding(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _embedding_autograd(ctx, dy, may_go_direct(dy))


def call_embedding(ids, weight, padding_row, by_frequency, impl):
    if not may_go_direct(ids, weight):
        return torch.ops.tilewright.embedding(ids, weight, padding_row, by_frequency, impl)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Embedding.apply(ids, weight, padding_row, by_frequency, impl)
    return _embedding(ids, weight, padding_row, by_frequency, impl)


# --- registration ---

for _operator, _function in (
    ("norm", _norm),
    ("norm_backward", _norm_backward),
    ("rope", _rope),
    ("gated", _gated),
    ("gated_backward", _gated_backward),
    ("embedding", _embedding),
    ("embedding_backward", _embedding_backward),
):
    library.impl(_operator, _function, "CPU")
    library.impl(_operator, _function, "CUDA")


def _fake_norm(x, weight, bias, residual, eps, weight_offset, kind, impl):
    return (
        x.new_empty(x.shape, dtype=y_dtype(kind, x.dtype, weight)),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(stats_shape(kind, x), dtype=torch.float32),
    )


def _fake_norm_backward(
    dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants, impl
):  # fmt: skip
    return tuple(
        t.new_empty(t.shape) if wants_it else x.new_empty(0)
        for t, wants_it in zip((x, weight, bias), wants, strict=True)
    )


def _fake_rope(x, *rest):
    """In the layout of x, but for columns that are no neighbours."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


def _fake_gated(gate, up, activation, impl):
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1))


def _fake_gated_backward(dy, gate, up, activation, wants, impl):
    return (
        gate.new_empty(gate.shape if wants[0] else 0),
        gate.new_empty(0 if up is None or not wants[1] else up.shape),
    )


def _fake_embedding(ids, weight, *rest):
    return weight.new_empty(*ids.shape, weight.shape[1])


def _fake_embedding_backward(dy, ids, n_rows, *rest):
    return dy.new_empty(n_rows, dy.shape[-1])


for _operator, _fake in (
    ("norm", _fake_norm),
    ("norm_backward", _fake_norm_backward),
    ("rope", _fake_rope),
    ("gated", _fake_gated),
    ("gated_backward", _fake_gated_backward),
    ("embedding", _fake_embedding),
    ("embedding_backward", _fake_embedding_backward),
):
    torch.library.register_fake(f"tilewright::{_operator}", _fake, lib=library)

for _operator, _backward, _setup in (
    ("norm", _norm_autograd, _norm_setup),
    ("rope", _rope_autograd, _rope_setup),
    ("gated", _gated_autograd, _gated_setup),
    ("embedding", _embedding_autograd, _embedding_setup),
):
    torch.library.register_autograd(
        f"tilewright::{_operator}", _backward, setup_context=_setup, lib=library
    )
