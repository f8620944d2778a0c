"""Several linear layers over the same x: in one call where the C++ kernels can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.linear import api, op, prepared
from tilewright.ops.linear.problem import Operands, Problem

NAME = "linear_group"
_Layers = list[tuple[Operands, Problem]]


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One layer of a `linear_group`: what `fused_linear` takes beside x, with the same meaning.

    weight            (O, I) in x.dtype, or a PackedWeight
    bias              (O,)
    out_scale         (O,)
    down, up          (R, I) and (O, R)
    scale             of the update
    activation        "none" or "relu"
    dropout_p         of the update, 0 <= p < 1
    dropout_seed      (1,) int64; default drawn from torch's default CPU generator
    int8_activations  round x to 8 bits, one scale a row
    delta             sparse (O, I)
    """

    weight: torch.Tensor | PackedWeight
    bias: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0
    activation: str = "none"
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None
    int8_activations: bool = False
    delta: WeightDelta | None = None


def linear_group(
    x: torch.Tensor, layers: Sequence[LinearLayer], *, impl: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """Several linear layers over the same x, such as a model's q, k and v, or its gate and up.

        y_n[t] = ((W_n + D_n) x[t] + bias_n) out_scale_n  +  scale_n up_n f_n(down_n drop_n(x[t]))

    x        (T, I) or (..., I) activations; T may be 0
    layers   one LinearLayer for each result; they share I, and nothing else has to be alike
    impl     "auto", "reference", "cpp_cpu", "triton_gpu" or "cuda_hopper", as in `fused_linear`

    Returns one (..., O_n) in x.dtype for each layer: bitwise what `fused_linear` returns for it.
    Of the gradients, all but dx are bitwise those of separate calls too. Where the layers can go
    together, x is read once, and dx is summed over the layers in float32 and rounded once; separate
    calls round each layer's share. Up to 8 layers go together in an eager call on `cpp_cpu`, if all
    weights are dense, or all have 4 bits, or all are int8, or all fp8, none with an input_order, no
    layer has int8_activations, and no out_scale requires grad; all else is one call a layer.
    Dtypes, accuracy, reproducibility and autocast are those of `fused_linear`.
    ValueError: a shape, dtype or value outside the above, named with its layer. RuntimeError:
    `impl` was named and cannot run here.

    Source: Hu et al., LoRA, arXiv 2106.09685; Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    plain = _plain(layers) if impl == "auto" else None
    if plain is not None:
        ready = prepared.call_together(x, plain)
        if ready is not None:
            return ready
    x2, described = _described(x, layers)
    if _go_together(x2, described, impl):
        results = _call_together(x2, described)
    else:
        # each layer casts x for itself, so that autocast sums what each hands back in x's own dtype
        results = tuple(
            api.call_described(x2 if x.dtype == p.dtype else _in_rows(x.to(p.dtype)), o, p, impl)
            for o, p in described
        )
    if plain is not None and x.is_cpu and may_go_direct(x, *[w.codes for w, _ in plain]):
        for weight, _ in plain:
            prepared.remember(weight, x2.dtype, False)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in results)


def _plain(layers) -> list[tuple[PackedWeight, torch.Tensor | None]] | None:
    """Weights and biases, where all are packed and there is nothing beside them."""
    found = []
    for i in layers:
        if not isinstance(i, LinearLayer) or type(i.weight) is not PackedWeight:
            return None
        for t in (i.out_scale, i.down, i.up, i.dropout_seed, i.delta):
            if t is not None:
                return None
        # a scale is nobody's without an update, but has to be a number all the same
        if not abs(i.scale) < math.inf or i.activation != "none" or i.dropout_p:
            return None
        if i.int8_activations:
            return None
        found.append((i.weight, i.bias))
    return found or None


def _described(x, layers) -> tuple[torch.Tensor, list[tuple[Operands, Problem]]]:
    """Check everything, and return x as (T, I), cast if autocast asks for it, and the layers."""
    if not layers:
        raise ValueError(f"{NAME}: layers is empty, need at least 1")
    if x.dim() == 0:
        raise ValueError(f"{NAME}: x has shape (), need axes (..., I)")
    for n, layer in enumerate(layers):
        if not isinstance(layer, LinearLayer):
            raise ValueError(f"{NAME}: layers[{n}] is a {type(layer).__name__}, need a LinearLayer")
        weight, shape = layer.weight, tuple(layer.weight.shape)
        if len(shape) == 2 and x.shape[-1] != shape[1]:
            kind = "a packed" if isinstance(weight, PackedWeight) else "a"
            raise ValueError(
                f"{NAME}: x has shape {tuple(x.shape)}, need a last axis of I = {shape[1]} as in "
                f"layers[{n}], which has {kind} weight of shape {shape}"
            )
    dtype = api.autocast_dtype(x)
    x2 = _in_rows(x if dtype is None else x.to(dtype))
    described = []
    for n, layer in enumerate(layers):
        p, _, o = api.describe(
            x2, layer.weight, layer.bias, out_scale=layer.out_scale, down=layer.down, up=layer.up,
            scale=layer.scale, activation=layer.activation, dropout_p=layer.dropout_p,
            dropout_seed=layer.dropout_seed, int8_activations=layer.int8_activations,
            delta=layer.delta, name=f"{NAME}: layers[{n}]",
        )  # fmt: skip
        described.append((o, p))
    return x2, described


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# --- together ---


def _go_together(x: torch.Tensor, layers: _Layers, impl: str) -> bool:
    if x.device.type != "cpu" or len(layers) == 1:
        return False
    if not may_go_direct(x, *[t for o, _ in layers for t in o]):
        return False
    if any(api.scale_is_trained(o) for o, _ in layers):
        return False
    if any(choose.choose("fused_linear", impl, p) != "cpp_cpu" for _, p in layers):
        return False
    from tilewright.ops.linear import cpp_cpu

    return cpp_cpu.fit_together(layers)


def _call_together(x: torch.Tensor, layers: _Layers) -> tuple[torch.Tensor, ...]:
    from tilewright.ops.linear import cpp_cpu

    if torch.is_grad_enabled() and any(op.needs_gradient(x, o) for o, _ in layers):
        return _Group.apply(x, [p for _, p in layers], *[t for o, _ in layers for t in o])
    return tuple(y for y, _ in cpp_cpu.forward_of_layers(x, layers))


class _Group(torch.autograd.Function):
    """Layers that go together; their operands stand one after the other."""

    @staticmethod
    def forward(ctx, x, problems: list[Problem], *operands):
        from tilewright.ops.linear import cpp_cpu

        layers = _layers(problems, operands)
        results = cpp_cpu.forward_of_layers(x, layers)
        ctx.set_materialize_grads(False)
        needs = [_needs(ctx, n) for n in range(len(problems))]
        needs_x = any(
            o.down is not None or needs_it[op.WEIGHT] or needs_it[op.DELTA_VALUES]
            for (o, _), needs_it in zip(layers, needs, strict=True)
        )
        ctx.problems = problems
        ctx.save_for_backward(x if needs_x else None, *[hidden for _, hidden in results], *operands)
        return tuple(y for y, _ in results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        from tilewright.ops.linear import cpp_cpu

        problems, needs_dx = ctx.problems, ctx.needs_input_grad[0]
        x, *saved = ctx.saved_tensors
        hiddens, layers = saved[: len(problems)], _layers(problems, saved[len(problems) :])
        grads: list = [None] * len(ctx.needs_input_grad)
        if x is None:  # only its shape is asked for: one row, seen as all of them
            tokens, n_in = problems[0].tokens, problems[0].in_features
            x = hiddens[0].new_zeros(n_in).expand(tokens, n_in)

        asked, wants = [], []  # the layers that the kernels have something to do for
        for n, dy in enumerate(dys):
            needs = _needs(ctx, n)
            wanted = tuple(needs[place] for place in _PLACES)
            if dy is None:
                continue
            if needs_dx or any(wanted):
                asked.append(n)
                wants.append(wanted)
            o, at = layers[n][0], _first(n)
            if needs[op.WEIGHT]:
                grads[at + op.WEIGHT] = op.weight_gradient(dy, x, o.out_scale)
            if needs[op.DELTA_VALUES]:
                grads[at + op.DELTA_VALUES] = op.delta_gradient(dy, x, o, "cpp_cpu")
        if asked:
            dx, found = cpp_cpu.backward_of_layers(
                [dys[n] for n in asked], x, [hiddens[n] for n in asked],
                [layers[n] for n in asked], needs_dx, wants,
            )  # fmt: skip
            grads[0] = dx if needs_dx else None
            for n, wanted, of_layer in zip(asked, wants, found, strict=True):
                for place, wants_it, grad in zip(_PLACES, wanted, of_layer, strict=True):
                    grads[_first(n) + place] = grad if wants_it else None
        return tuple(grads)


_PLACES = (op.BIAS, op.DOWN, op.UP)  # in the order of what backward_of_layers finds


def _first(n: int) -> int:
    """Where among the arguments of _Group.forward the operands of layer n begin."""
    return 2 + n * op.N_OPERANDS


def _needs(ctx, n: int) -> tuple[bool, ...]:
    return ctx.needs_input_grad[_first(n) : _first(n + 1)]


def _layers(problems, operands) -> list[tuple[Operands, Problem]]:
    step = op.N_OPERANDS
    return [
        (Operands._make(operands[n * step : (n + 1) * step]), p) for n, p in enumerate(problems)
    ]


# --- explain ---


def _of_all(candidate: choose.Implementation) -> choose.Implementation:
    """An implementation of one layer, asked about all of them."""

    def why_not(problem) -> str | None:
        for n, p in enumerate(problem):
            reason = candidate.why_not(p)
            if reason is not None:
                return f"layers[{n}]: {reason}"
        return None

    return choose.Implementation(candidate.name, why_not)


def _problem(x, layers, impl="auto") -> tuple[Problem, ...]:
    return tuple(p for _, p in _described(x, layers)[1])


def _sample_problems() -> dict[str, object]:
    """What `doctor` asks about: q, k and v of a usual training shape."""
    of_one = choose.OPERATORS["fused_linear"].sample()
    return {
        label: (p, *[p._replace(out_features=1024)] * 2)
        for label, p in of_one.items()
        if isinstance(p, Problem)
    }


choose.register(
    choose.Operator(
        NAME, tuple(_of_all(c) for c in choose.OPERATORS["fused_linear"].candidates), _problem,
        _sample_problems,
    )
)  # fmt: skip
