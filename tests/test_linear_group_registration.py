"""Groups of layers: what goes apart, torch's machinery, refusals."""

import functools
import inspect
import re
from dataclasses import fields, replace

import pytest
import torch
from linear_group_inputs import (
    GROUPS,
    apart,
    different,
    layer_of,
    make_group,
    recorded,
    results,
    together,
)
from linear_inputs import bitwise, random_packed, wide
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tilewright
from tilewright import choose, ops


@pytest.fixture
def native_calls(monkeypatch):
    return recorded(monkeypatch)


# --- what does not go together ---


def act_order(group):
    weight = random_packed("nf4", 83, 72, 8, act_order=True)
    return [replace(group[0], weight=weight), *group[1:]]


def another_kind(group):
    return [replace(group[0], weight=random_packed("int8", 83, 72, 8)), *group[1:]]


def dense_among_them(group):
    return [replace(group[0], weight=torch.randn(83, 72).to(group[0].x.dtype)), *group[1:]]


def int8_activations(group):
    return [replace(i, options={**i.options, "int8_activations": True}) for i in group]


def trained_factors(group):
    factors = torch.ones(83, requires_grad=True)
    return [replace(group[0], options={**group[0].options, "out_scale": factors}), *group[1:]]


def nine_layers(group):
    return [*group] * 3


APART = [act_order, another_kind, dense_among_them, int8_activations, trained_factors, nine_layers]


@pytest.mark.parametrize("change", APART, ids=[f.__name__ for f in APART])
@pytest.mark.parametrize("tokens", [3, 40])
def test_what_does_not_go_together_goes_apart(native_calls, tokens, change):
    group = change(make_group(GROUPS["qkv-nf4"], tokens, torch.bfloat16))
    ours = results(together, group)
    assert set(native_calls["forward"]) == {1} and set(native_calls["backward"]) == {1}
    assert different(results(apart, group), ours) == []


def test_a_kernel_that_cannot_take_one_of_them():
    """Groups of 12 inputs are the reference's; the others are the kernels'."""
    odd = random_packed("nf4", 83, 72, 12)
    group = make_group(GROUPS["qkv-nf4"], 20, torch.float32)
    group = [replace(group[0], weight=odd), *group[1:]]
    assert different(results(apart, group), results(together, group)) == []
    with pytest.raises(RuntimeError, match='impl "cpp_cpu" cannot run: group_size is 12'):
        together(group, "cpp_cpu")


def test_float64_and_the_reference_by_name(native_calls):
    group = [wide(i) for i in make_group(GROUPS["qkv-nf4"], 20, torch.float32)]
    assert different(results(apart, group), results(together, group)) == []
    group = make_group(GROUPS["qkv-nf4"], 20, torch.float32)
    separate = results(functools.partial(apart, impl="reference"), group)
    ours = results(functools.partial(together, impl="reference"), group)
    assert different(separate, ours) == [] and native_calls["forward"] == []


def test_a_forced_implementation(monkeypatch, native_calls):
    monkeypatch.setenv("TILEWRIGHT_IMPL", "reference")
    together(make_group(GROUPS["qkv-nf4"], 3, torch.float32))
    assert native_calls["forward"] == []


# --- torch's machinery ---


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("group", ["qkv-dense", "gate-up-4-bits"])
def test_compiles_into_one_graph(group, native_calls):
    group = make_group(GROUPS[group], 20, torch.float32)
    made_inside = torch.compile(together, fullgraph=True, backend="aot_eager")
    separate = results(apart, group)
    native_calls["forward"].clear()
    assert different(separate, results(made_inside, group)) == []
    taken = torch.compile(ops.linear_group, fullgraph=True, backend="aot_eager")
    made_outside = results(lambda g: taken(g[0].x, [layer_of(i) for i in g]), group)
    assert different(separate, made_outside) == []
    assert set(native_calls["forward"]) == {1}


@pytest.mark.usefixtures("clean_memory")
def test_packed_weights_alone_compile_into_one_graph():
    layers = [ops.LinearLayer(random_packed("nf4", n, 72, 8)) for n in (40, 24)]
    x = torch.randn(3, 72)
    compiled = torch.compile(ops.linear_group, fullgraph=True, backend="aot_eager")
    expected = ops.linear_group(x, layers)
    for _ in range(2):
        assert all(bitwise(a, b) for a, b in zip(compiled(x, layers), expected, strict=True))


class PassingOn(TorchDispatchMode):
    """Changes nothing, and counts: under it calls go through the registered operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tilewright":
            self.seen.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_under_a_mode_each_layer_is_its_operator():
    group = make_group(GROUPS["qkv-nf4"], 20, torch.bfloat16)
    with PassingOn() as mode:
        ours = results(together, group)
    assert mode.seen == ["fused_linear"] * 3 + ["fused_linear_backward"] * 3
    assert different(results(apart, group), ours) == []


@pytest.mark.usefixtures("clean_memory")
def test_fake_tensors_give_shapes():
    weight = random_packed("nf4", 30, 24, 8)
    with FakeTensorMode() as mode:
        layers = [ops.LinearLayer(weight.map(mode.from_tensor)), ops.LinearLayer(torch.ones(7, 24))]
        ys = ops.linear_group(torch.empty(2, 5, 24), layers)
    assert [tuple(y.shape) for y in ys] == [(2, 5, 30), (2, 5, 7)]


def test_vmap_agrees_with_a_loop():
    group = make_group(GROUPS["qkv-dense"], 4, torch.float32)
    layers = [layer_of(i) for i in group]
    x = torch.randn(3, 4, 72)
    looped = [torch.stack(ys) for ys in zip(*[ops.linear_group(t, layers) for t in x], strict=True)]
    mapped = torch.vmap(lambda t: ops.linear_group(t, layers))(x)
    assert all(torch.allclose(a, b) for a, b in zip(looped, mapped, strict=True))


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    group = make_group(GROUPS["everything-dense"], 20, torch.float32)
    layers = [
        layer_of(replace(i, options={n: o for n, o in i.options.items() if n != "dropout_seed"}))
        for i in group
    ]
    found = []
    for wrap in (False, True):
        torch.manual_seed(3)
        x = group[0].x.clone().requires_grad_()
        function = functools.partial(ops.linear_group, layers=layers)
        ys = checkpoint(function, x, use_reentrant=use_reentrant) if wrap else function(x)
        torch.autograd.backward(ys, [i.dy for i in group])
        found.append((*ys, x.grad))
    assert all(bitwise(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", ["qkv-dense", "gate-up-4-bits"])
@pytest.mark.parametrize("change", [list, int8_activations], ids=["together", "apart"])
def test_autocast_casts_in_and_gradients_out(native_calls, change, group, inner):
    goes_apart = change is int8_activations
    if goes_apart and group == "qkv-dense":
        pytest.skip("int8_activations are for packed weights")
    group = change(make_group(GROUPS[group], 40, torch.float32))
    with torch.autocast("cpu", dtype=inner):
        separate = results(apart, group)
        native_calls["forward"].clear()
        ours = results(together, group)
    assert native_calls["forward"] == ([1] * len(group) if goes_apart else [len(group)])
    assert ours["x"].dtype == torch.float32 and ours["y 0"].dtype == inner
    assert different(separate, ours, but=() if goes_apart else ("x",)) == []
    error = (separate["x"] - ours["x"]).abs().max()
    assert error <= 2 * torch.finfo(inner).eps * separate["x"].abs().max()


def test_parameters_and_accumulation():
    """Leaves of a module, two calls before their gradients are read."""
    group = make_group(GROUPS["qkv-dense"], 20, torch.float32)
    grads = []
    for function in (together, apart):
        down = torch.nn.Parameter(group[0].options["down"].clone())
        live = [replace(group[0], options={**group[0].options, "down": down}), *group[1:]]
        for _ in range(2):
            sum(y.square().sum() for y in function(live)).backward()
        grads.append(down.grad)
    assert bitwise(*grads) and grads[0].abs().sum() > 0


# --- refusals ---

x = torch.zeros(5, 16)
fits, narrow = ops.LinearLayer(torch.zeros(8, 16)), ops.LinearLayer(torch.zeros(8, 15))
packed = random_packed("nf4", 8, 16, 8)
REFUSALS = {
    "no-layers": (x, [], "layers is empty, need at least 1"),
    "no-layer": (x, [fits, torch.zeros(8, 16)], "layers[1] is a Tensor, need a LinearLayer"),
    "x-axes": (torch.tensor(1.0), [fits], "x has shape (), need axes (..., I)"),
    "x-fits-one": (
        x,
        [fits, narrow],
        "x has shape (5, 16), need a last axis of I = 15 as in layers[1], which has a weight of "
        "shape (8, 15)",
    ),
    "x-fits-the-other": (
        torch.zeros(2, 3, 15),
        [narrow, ops.LinearLayer(packed)],
        "x has shape (2, 3, 15), need a last axis of I = 16 as in layers[1], which has a packed "
        "weight of shape (8, 16)",
    ),
    "x-dtype": (x.int(), [fits], "layers[0]: x is torch.int32, need one of float32"),
    "weight-axes": (
        x,
        [fits, ops.LinearLayer(torch.zeros(16))],
        "layers[1]: weight has shape (16,), need axes (O, I)",
    ),
    "weight-dtype": (
        x,
        [fits, ops.LinearLayer(torch.zeros(8, 16).half())],
        "layers[1]: weight is torch.float16, need torch.float32 as in x",
    ),
    "weight-device": (
        x,
        [ops.LinearLayer(packed.to("meta")), fits],
        "layers[0]: weight is on meta, need cpu as in x",
    ),
    "bias-shape": (
        x,
        [fits, replace(fits, bias=torch.zeros(7))],
        "layers[1]: bias has shape (7,), need (8,): O as in weight",
    ),
    "up-alone": (
        x,
        [replace(fits, up=torch.zeros(8, 3)), fits],
        "layers[0]: down is missing, need down and up together or neither",
    ),
    "corrupt": (
        x,
        [ops.LinearLayer(packed), ops.LinearLayer(replace(packed, out_features=17))],
        "layers[1]: weight's codes is torch.uint8 of shape (1, 2, 64), need uint8 of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("given, layers, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(given, layers, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.linear_group(given, layers)
    assert str(refusal.value).startswith("linear_group: ")


def test_a_named_implementation_runs_or_raises():
    with pytest.raises(RuntimeError, match='impl "triton_gpu" cannot run: tensors are on cpu'):
        ops.linear_group(x, [fits, fits], impl="triton_gpu")
    with pytest.raises(ValueError, match='no impl "fastest"'):
        ops.linear_group(x, [fits, fits], impl="fastest")


def test_explain_and_doctor_know_the_operator():
    explanation = tilewright.explain("linear_group", x, [fits, ops.LinearLayer(packed)])
    assert explanation.chosen == "cpp_cpu"
    odd = ops.LinearLayer(random_packed("nf4", 8, 24, 12))
    explanation = tilewright.explain("linear_group", torch.zeros(5, 24), [odd, odd])
    assert explanation.chosen == "reference"
    assert explanation.reasons["cpp_cpu"].startswith("layers[0]: group_size is 12")
    for label, problem in choose.OPERATORS["linear_group"].sample().items():
        assert choose.explain_problem("linear_group", problem).chosen is not None, label


def test_a_layer_takes_what_fused_linear_takes():
    taken = dict(inspect.signature(ops.fused_linear).parameters)
    of_layer = {f.name: f.default for f in fields(ops.LinearLayer)}
    assert {*taken} - {"x", "impl"} == {*of_layer}
    assert all(taken[n].default == d for n, d in of_layer.items() if n != "weight")
