"""The registered operators of moe_mlp: opcheck, graphs, autocast, checkpointing, refusals."""

from dataclasses import replace

import pytest
import torch
from attention_inputs import bitwise
from moe_inputs import GRADIENTS, Case, make_inputs, ours, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tilewright import choose, ops
from tilewright.ops.moe import api, op

pytestmark = pytest.mark.usefixtures("clean_memory")

CALLS = {
    "plain": Case(12, 2, 3, 16, 16),
    "biased": Case(12, 2, 3, 16, 16, bias=True, activation="clamped_swiglu", interleaved=True),
    "nowhere": Case(12, 3, 4, 16, 16, routing="nowhere", scale_input=True),
}
by_call = pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)


def described(case: Case, grad: bool):
    inputs = make_inputs(case, torch.float32)
    for name in GRADIENTS:
        if name in inputs:
            inputs[name].requires_grad_(grad)
    call = {n: t for n, t in inputs.items() if n != "dy"}
    p, x, ids, gates, o = api._describe(**call, **case.rule)
    return p, x, ids, gates, o, inputs["dy"]


@by_call
def test_opcheck_of_the_forward(case):
    p, x, ids, gates, o, _ = described(case, True)
    torch.library.opcheck(
        torch.ops.tilewright.moe_mlp.default, (x, ids, gates, True, *o, *op.rest(p, "auto"))
    )
    p, x, ids, gates, o, _ = described(case, False)
    torch.library.opcheck(
        torch.ops.tilewright.moe_mlp.default, (x, ids, gates, False, *o, *op.rest(p, "auto"))
    )


@pytest.mark.parametrize("only", [None, 0, 2])
@by_call
def test_opcheck_of_the_backward(case, only):
    p, x, ids, gates, o, dy = described(case, False)
    rest = (*o, *op.rest(p, "auto"))
    _, *saved = torch.ops.tilewright.moe_mlp(x, ids, gates, True, *rest)
    has = [t is not None for t in (x, gates, *o[: op.TRAINABLE])]
    wants = has if only is None else [i == only for i in range(2 + op.TRAINABLE)]
    args = (dy, x, gates, *saved, wants, *rest)
    torch.library.opcheck(torch.ops.tilewright.moe_mlp_backward.default, args)
    found = torch.ops.tilewright.moe_mlp_backward(*args)
    assert [t.numel() > 0 for t in found] == wants


@by_call
def test_compiles_into_one_graph(case):
    inputs = make_inputs(case, torch.float32)
    wanted = [n for n in GRADIENTS if n in inputs]
    compiled = torch.compile(ours(case), fullgraph=True, backend="aot_eager")
    eager = with_gradients(ours(case), inputs, wanted)
    got = with_gradients(compiled, inputs, wanted)
    assert all(bitwise(got[n], eager[n]) for n in eager)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_autocast_casts_in_and_gradients_out(inner):
    case = CALLS["biased"]
    inputs = make_inputs(case, torch.float32)
    with torch.autocast("cpu", dtype=inner):
        got = with_gradients(ours(case), inputs)
    narrow = dict(inputs)
    for name in ("x", "gate_up", "down", "dy"):
        narrow[name] = inputs[name].to(inner)
    need = with_gradients(ours(case), narrow)
    assert got["y"].dtype == inner
    assert all(got[n].dtype == torch.float32 for n in GRADIENTS)
    assert all(bitwise(got[n].to(t.dtype), t) for n, t in need.items())


def test_activation_checkpointing():
    case = CALLS["plain"]
    inputs = make_inputs(case, torch.float32)
    names = [n for n in inputs if n != "dy"]

    def recomputed(**call):
        return checkpoint(
            lambda *given: ours(case)(**dict(zip(names, given, strict=True))),
            *[call[n] for n in names], use_reentrant=False,
        )  # fmt: skip

    got, need = (with_gradients(f, inputs) for f in (recomputed, ours(case)))
    assert all(bitwise(got[n], need[n]) for n in need)


def test_fake_tensors_have_the_shapes_of_the_real_ones():
    case = CALLS["biased"]
    inputs = make_inputs(case, torch.bfloat16)
    real = ours(case)(**{n: t for n, t in inputs.items() if n != "dy"})
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(t) for n, t in inputs.items() if n != "dy"}
        fake = ours(case)(**fakes)
    assert fake.shape == real.shape and fake.dtype == real.dtype


def test_explain_names_the_kernel():
    inputs = make_inputs(CALLS["plain"], torch.float32)
    call = {n: t for n, t in inputs.items() if n != "dy"}
    assert choose.explain("moe_mlp", **call).chosen == "cpp_cpu"
    double = {n: t.double() if t.is_floating_point() else t for n, t in call.items()}
    explained = choose.explain("moe_mlp", **double)
    assert explained.chosen == "reference" and "float64" in explained.reasons["cpp_cpu"]


def test_gradients_of_the_reference_by_finite_differences():
    case = replace(CALLS["biased"], tokens=4, features=5, width=3)
    inputs = make_inputs(case, torch.float32)
    names = [n for n in GRADIENTS if n in inputs]
    leaves = [inputs[n].double().requires_grad_() for n in names]

    def function(*given):
        return ours(case)(ids=inputs["ids"], **dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)


WRONG = {
    "a-scalar": (dict(x=torch.zeros(())), r"x has shape \(\), need axes \(..., H\)"),
    "double-weights": (dict(gate_up=torch.zeros(3, 32, 16).double()), "gate_up is torch.float64"),
    "whole-x": (dict(x=torch.zeros(12, 16).long()), "x is torch.int64, need one of float32"),
    "float-ids": (dict(ids=torch.zeros(12, 2)), "ids is torch.float32, need int32 or int64"),
    "other-tokens": (dict(ids=torch.zeros(9, 2).long()), r"ids has shape \(9, 2\), need \(12,\)"),
    "other-slots": (dict(gates=torch.zeros(12, 3)), r"gates has shape \(12, 3\), need \(12, 2\)"),
    "whole-gates": (dict(gates=torch.zeros(12, 2).long()), "gates is torch.int64, need one of"),
    "flat-weight": (dict(down=torch.zeros(16, 16)), r"down has shape \(16, 16\), need axes"),
    "other-features": (dict(x=torch.zeros(12, 9)), r"gate_up has shape .* need H = 9 as in x"),
    "no-pairs": (
        dict(gate_up=torch.zeros(3, 31, 16)),
        "gate_up .* need 2 I = 32, I = 16 as in",
    ),
    "other-experts": (dict(down=torch.zeros(4, 16, 16)), "down has shape .* need E = 3"),
    "short-bias": (dict(gate_up_bias=torch.zeros(3, 16)), r"gate_up_bias .* need \(3, 32\)"),
    "flat-bias": (dict(down_bias=torch.zeros(48)), r"down_bias has shape \(48,\), need \(3, 16\)"),
    "activation": (dict(activation="mish"), "no activation 'mish'. Known: swiglu, geglu"),
    "interleaved-alone": (
        dict(activation="gelu", interleaved=True),
        "interleaved is for experts with a gate, activation gelu",
    ),
    "gate-of-none": (dict(activation="gelu"), "down has shape .* need I = 32 as in gate_up"),
    "limit": (
        dict(activation="clamped_swiglu", limit=0.0),
        "alpha is 1.702 and limit 0.0, need",
    ),
    "impl": (dict(impl="fast"), 'no impl "fast". Known: auto, triton_gpu, cpp_cpu, reference'),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_refusals(change, message):
    inputs = make_inputs(CALLS["plain"], torch.float32)
    call = {n: t for n, t in inputs.items() if n != "dy"}
    with pytest.raises(ValueError, match=f"moe_mlp: {message}"):
        ops.moe_mlp(**{**call, **change})


def test_a_named_kernel_that_cannot_run_says_so():
    inputs = make_inputs(CALLS["plain"], torch.float32)
    double = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items() if n != "dy"}
    with pytest.raises(RuntimeError, match=r"no kernel for torch.float64\. Here: reference"):
        ops.moe_mlp(**double, impl="cpp_cpu")
