"""Groups of layers over one x, and what together and apart makes of them."""

import functools
from dataclasses import replace

import pytest
import torch
from linear_inputs import DTYPES, SEED, Case, Inputs, bitwise, dtype_name, make_inputs, move

from tilewright import ops
from tilewright.ops.linear import cpp_cpu, reference

OF_LAYERS = ("bias", "down", "up", "delta", "weight")  # gradients beside dx

# grouped-query widths, ranks from none to more than a strip of lanes, and past a chunk of 512
# inputs, a panel of 512 outputs and a pass of 1024 tokens
GROUPS = {
    "qkv-dense": (Case(0, 72, 83, 8, bias=True), Case(0, 72, 40), Case(0, 72, 24, 64, scale=0.5)),
    "qkv-nf4": (Case(0, 72, 83, 64, "nf4", 24, "nested", bias=True),
                Case(0, 72, 40, 8, "nf4", 8, torch.float16), Case(0, 72, 24, 0, "nf4", 0)),
    "gate-up-4-bits": (Case(0, 72, 70, 8, "int4", 8, activation="relu"),
                       Case(0, 72, 70, 3, "uint4", 32, offsets=True, out_scale=True)),
    "everything-dense": (Case(0, 72, 50, 8, bias=True, out_scale=True, activation="relu",
                              dropout_p=0.3, delta=0.2),
                         Case(0, 72, 83, 3, dropout_p=0.5), Case(0, 72, 24, delta=0.1)),
}  # fmt: skip
IN_TURN = {
    "one-layer": (Case(0, 72, 83, 8, "nf4", 8, bias=True),),
    "int8": (Case(0, 72, 83, 0, "int8"), Case(0, 72, 40, 8, "int8", 8, bias=True)),
    "fp8": (Case(0, 72, 40, 2, "fp8", 8), Case(0, 72, 16, 0, "fp8", 24)),
    "everything-4-bits": (Case(0, 72, 50, 8, "nf4", 8, "nested", True, bias=True, out_scale=True,
                               activation="relu", dropout_p=0.3, delta=0.2),
                          Case(0, 72, 83, 0, "e2m1", 24), Case(0, 72, 24, 64, "fp4", 8)),
    "past-every-extent-dense": (Case(0, 530, 20, 3), Case(0, 530, 540, 0, bias=True)),
    "past-every-extent-nf4": (Case(0, 530, 540, 3, "nf4", 64), Case(0, 530, 20, 70, "nf4", 64)),
    "no-outputs": (Case(0, 72, 0, 3, bias=True), Case(0, 72, 40, 3)),
    "no-inputs": (Case(0, 0, 30, 3, bias=True), Case(0, 0, 40)),
    "eight-layers": tuple(Case(0, 24, 8 + n, (0, 2, 3)[n % 3], "int8", 8) for n in range(8)),
    "float32-adapters": (Case(0, 72, 40, 8, adapter=torch.float32), Case(0, 72, 83, 3)),
}  # fmt: skip
TOKENS = (0, 1, 3, 8, 17, 130, 600)


def in_turn():
    """Every number of tokens with each group, in one dtype after the other."""
    pairs = {}
    for n, (name, group) in enumerate([*GROUPS.items(), *IN_TURN.items()]):
        for m, tokens in enumerate(TOKENS):
            dtypes = DTYPES if name in GROUPS and tokens in (3, 17, 130) else [DTYPES[(n + m) % 3]]
            for dtype in dtypes:
                pairs[f"{name}-T{tokens}-{dtype_name(dtype)}"] = group, tokens, dtype
    pairs["many-tokens-dense"] = GROUPS["qkv-dense"], 1030, torch.bfloat16
    pairs["many-tokens-nf4"] = GROUPS["qkv-nf4"], 1030, torch.float32
    return pytest.mark.parametrize("group, tokens, dtype", pairs.values(), ids=pairs)


@functools.lru_cache(maxsize=8)
def make_group(cases: tuple[Case, ...], tokens: int, dtype) -> list[Inputs]:
    """Each layer's inputs; they have one x, and each a dropout of its own."""
    group = []
    for n, case in enumerate(cases):
        case = case.but(tokens=tokens)
        inputs = make_inputs(case, dtype)
        if case.dropout_p:
            factors = reference.dropout_factors(SEED + n, tokens, case.n_in, case.dropout_p)
            options = {**inputs.options, "dropout_seed": torch.tensor([SEED + n])}
            inputs = replace(inputs, options=options, factors=factors)
        group.append(replace(inputs, x=group[0].x if group else inputs.x))
    return group


def layer_of(inputs: Inputs) -> ops.LinearLayer:
    return ops.LinearLayer(inputs.weight, **inputs.options)


def together(group: list[Inputs], impl="auto") -> tuple:
    return ops.linear_group(group[0].x, [layer_of(i) for i in group], impl=impl)


def apart(group: list[Inputs], impl="auto") -> tuple:
    return tuple(ops.fused_linear(i.x, i.weight, impl=impl, **i.options) for i in group)


def results(function, group: list[Inputs], wanted=OF_LAYERS, wants_dx=True, dys=None) -> dict:
    """`function(group)` and the gradients of x and of the layers' tensors that are named, by name
    and layer; dys that are None are of results that nobody uses."""
    leaves, live = {}, []
    x = group[0].x.detach().clone(memory_format=torch.preserve_format)
    if wants_dx:
        leaves["x"] = x.requires_grad_()
    for n, i in enumerate(group):
        mine = {
            name: t.detach().requires_grad_()
            for name, t in i.named.items() if name in wanted
        }  # fmt: skip
        leaves |= {f"{name} {n}": t for name, t in mine.items()}
        weight = mine.pop("weight", i.weight)
        if "delta" in mine:
            mine["delta"] = i.options["delta"].with_values(mine["delta"])
        live.append(replace(i, x=x, weight=weight, options={**i.options, **mine}))
    ys = function(live)
    dys = [i.dy for i in group] if dys is None else dys
    used = [(y, dy.to(y)) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    grads = torch.autograd.grad(
        [y for y, _ in used], list(leaves.values()), [dy for _, dy in used], allow_unused=True
    )
    return {**{f"y {n}": y.detach() for n, y in enumerate(ys)},
            **dict(zip(leaves, grads, strict=True))}  # fmt: skip


def different(a: dict, b: dict, but=()) -> list[str]:
    """The names of what is not bitwise the same."""
    assert a.keys() == b.keys()
    return [n for n in a if n not in but and not (
        bitwise(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] is b[n])]  # fmt: skip


def on(target, group: list[Inputs]) -> list[Inputs]:
    """The group on the target's device, or a skip with its reason."""
    group = [
        replace(i, x=move(i.x, target.device), weight=move(i.weight, target.device),
                options={n: move(o, target.device) for n, o in i.options.items()})
        for i in group
    ]  # fmt: skip
    for i in group:
        target.require("fused_linear", i.x, i.weight, **i.options)
    return [replace(i, x=group[0].x) for i in group]


def recorded(monkeypatch) -> dict[str, list[int]]:
    """How many layers each call of the C++ kernels is about."""
    calls = {"forward": [], "backward": []}
    forward, backward = cpp_cpu.forward_of_layers, cpp_cpu.backward_of_layers

    def recorded_forward(x, layers):
        calls["forward"].append(len(layers))
        return forward(x, layers)

    def recorded_backward(dys, x, hiddens, layers, *rest):
        calls["backward"].append(len(layers))
        return backward(dys, x, hiddens, layers, *rest)

    monkeypatch.setattr(cpp_cpu, "forward_of_layers", recorded_forward)
    monkeypatch.setattr(cpp_cpu, "backward_of_layers", recorded_backward)
    return calls
