"""The registered operators: opcheck, compiled graphs, autocast, checkpointing, the direct path."""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
from linear_inputs import (
    Case,
    bitwise,
    by_reference,
    make_inputs,
    wide,
    with_gradients,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tilewright import choose, ops
from tilewright.direct import may_go_direct
from tilewright.ops.linear import api, op

pytestmark = pytest.mark.usefixtures("clean_memory")

CALLS = {
    "dense": Case(20, 24, 30, bias=True),
    "lora": Case(20, 24, 30, 4, bias=True, activation="relu"),
    "nf4": Case(20, 24, 30, 4, "nf4", 8, "nested", act_order=True),
    "uint4": Case(3, 24, 30, 4, "uint4", 8, offsets=True, bias=True),
    "dropout": Case(20, 24, 30, 4, "int8", 8, dropout_p=0.3),
    "adapters": Case(20, 24, 30, adapters=(3, 2)),
}
by_call = pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)


def described(case: Case, dtype=torch.float32, grad=True):
    """The registered operator's arguments for a case."""
    inputs = make_inputs(case, dtype)
    o = inputs.options
    if case.adapters:
        ranks = torch.tensor([len(d) for d in o["downs"]])
        columns = torch.arange(len(ranks), dtype=torch.int32).repeat_interleave(ranks)
        options = dict(
            down=torch.cat(o["downs"]), up=torch.cat(o["ups"], 1), column_adapters=columns,
            row_adapters=o["row_adapters"],
            column_scales=torch.tensor(o["scales"])[columns.long()],
        )  # fmt: skip
    else:
        options = o
    p, x, operands = api.describe(inputs.x, inputs.weight, **options)
    trained = {n: getattr(operands, n).requires_grad_() for n in ("bias", "down", "up")
               if grad and getattr(operands, n) is not None}  # fmt: skip
    operands = operands._replace(**trained)
    return x.requires_grad_(grad), operands, p, inputs


@by_call
def test_opcheck_of_the_forward(case):
    x, operands, p, _ = described(case)
    torch.library.opcheck(
        torch.ops.tilewright.fused_linear.default, (x, *operands, *op.rest(p, "auto"))
    )


@pytest.mark.parametrize("wants", [(True,) * 4, (True, False, False, False),
                                   (False, True, True, True)])  # fmt: skip
@by_call
def test_opcheck_of_the_backward(case, wants):
    x, operands, p, inputs = described(case, grad=False)
    has = (True, operands.bias is not None, operands.down is not None, operands.up is not None)
    wants = [w and h for w, h in zip(wants, has, strict=True)]
    if not any(wants):
        return
    rest = (*operands, *op.rest(p, "auto"))
    _, hidden = torch.ops.tilewright.fused_linear(x, *rest)
    args = (inputs.dy, x, hidden, wants, *rest)
    torch.library.opcheck(torch.ops.tilewright.fused_linear_backward.default, args)
    found = torch.ops.tilewright.fused_linear_backward(*args)
    assert [t.numel() > 0 for t in found] == wants


def function_of(case: Case):
    return ops.multi_lora_linear if case.adapters else ops.fused_linear


def call(function, inputs):
    return function(inputs.x, inputs.weight, **inputs.options)


def same(a, b) -> bool:
    b = dict(b.items())
    return all(bitwise(t, b[n]) for n, t in a.items())


@by_call
def test_compiles_into_one_graph(case):
    inputs = make_inputs(case, torch.float32)
    function = function_of(case)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = with_gradients(functools.partial(call, function), inputs)
    assert same(eager, with_gradients(functools.partial(call, compiled), inputs))


def test_compiles_with_dynamic_shapes():
    compiled = torch.compile(ops.fused_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 33, 70):
        inputs = make_inputs(CALLS["nf4"].but(tokens=tokens), torch.float32)
        eager = with_gradients(functools.partial(call, ops.fused_linear), inputs)
        assert same(eager, with_gradients(functools.partial(call, compiled), inputs)), tokens


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["lora", "nf4"])
def test_autocast_casts_in_and_gradients_out(case, inner):
    inputs = make_inputs(CALLS[case], torch.float32)
    with torch.autocast("cpu", dtype=inner):
        results = with_gradients(functools.partial(call, ops.fused_linear), inputs)
    assert results.y.dtype == inner
    assert all(t.dtype == torch.float32 for t in results.grads.values())
    weight = inputs.weight.to(inner) if case == "lora" else inputs.weight
    expected = call(ops.fused_linear, replace(inputs, x=inputs.x.to(inner), weight=weight))
    assert bitwise(results.y, expected)


def test_autocast_leaves_float64_alone():
    inputs = wide(make_inputs(CALLS["lora"], torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(ops.fused_linear, inputs)
    assert torch.allclose(y, by_reference(inputs), rtol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", ["nf4", "dropout", "dense"])
def test_activation_checkpointing(case, use_reentrant):
    inputs = make_inputs(CALLS[case], torch.float32)
    options = {n: o for n, o in inputs.options.items() if n != "dropout_seed"}
    grads = []
    for wrap in (False, True):
        torch.manual_seed(3)
        x = inputs.x.clone().requires_grad_()
        layer = functools.partial(ops.fused_linear, **options)
        if wrap:
            y = checkpoint(layer, x, inputs.weight, use_reentrant=use_reentrant)
        else:
            y = layer(x, inputs.weight)
        y.backward(inputs.dy)
        grads.append((y.detach(), x.grad))
    assert all(bitwise(a, b) for a, b in zip(*grads, strict=True))


class Count(TorchDispatchMode):
    """How often each of our operators is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tilewright":
            self.seen.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@by_call
def test_the_direct_path_equals_the_operator_bitwise(case):
    inputs = make_inputs(case, torch.bfloat16)
    function = functools.partial(call, function_of(case))
    assert may_go_direct(inputs.x)
    direct = with_gradients(function, inputs)
    with Count() as count:
        assert not may_go_direct(inputs.x)
        through = with_gradients(function, inputs)
    assert count.seen == ["fused_linear", "fused_linear_backward"]
    assert same(direct, through)


def test_frozen_everything_never_reaches_the_backward():
    inputs = make_inputs(CALLS["nf4"], torch.float32)
    with Count() as count:
        y = call(ops.fused_linear, inputs)
    assert count.seen == ["fused_linear"] and not y.requires_grad


def test_fake_tensors_give_shapes_and_dtypes():
    inputs = make_inputs(CALLS["nf4"], torch.bfloat16)
    with FakeTensorMode() as mode:
        weight = inputs.weight.map(mode.from_tensor)
        x = torch.empty(2, 5, 24, dtype=torch.bfloat16)
        y = ops.quantized_linear(x, weight)
    assert y.shape == (2, 5, 30) and y.dtype == torch.bfloat16


class Wrapped(torch.Tensor):
    """A subclass without a dispatch of its own."""


def test_subclasses_and_parameters():
    inputs = make_inputs(CALLS["lora"], torch.float32)
    expected = call(ops.fused_linear, inputs)
    wrapped = replace(inputs, x=inputs.x.as_subclass(Wrapped))
    assert not may_go_direct(wrapped.x)
    assert bitwise(call(ops.fused_linear, wrapped).as_subclass(torch.Tensor), expected)
    down = torch.nn.Parameter(inputs.options["down"])
    options = {**inputs.options, "down": down}
    call(ops.fused_linear, replace(inputs, options=options)).sum().backward()
    assert down.grad.abs().sum() > 0


@pytest.mark.parametrize("case", ["dense", "nf4"])
def test_vmap_agrees_with_a_loop(case):
    inputs = make_inputs(CALLS[case], torch.float32)
    x = torch.randn(3, 20, 24)
    looped = torch.stack([ops.fused_linear(t, inputs.weight) for t in x])
    assert torch.allclose(torch.vmap(lambda t: ops.fused_linear(t, inputs.weight))(x), looped)


def test_explain_and_doctor_know_the_operator():
    operator = choose.OPERATORS["fused_linear"]
    for label, problem in operator.sample().items():
        explanation = choose.explain_problem("fused_linear", problem)
        assert explanation.chosen is not None, label


def test_deterministic_mode_changes_nothing():
    inputs = make_inputs(CALLS["nf4"], torch.float32)
    before = call(ops.fused_linear, inputs)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True)
        assert bitwise(before, call(ops.fused_linear, inputs))
