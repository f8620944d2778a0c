"""Low-rank updates of experts in moe_mlp: forward and gradients against float64, PEFT's layout."""

import pytest
import torch
from attention_inputs import bitwise
from linear_inputs import exactly_decoded, random_packed
from moe_inputs import DTYPES, Case, loop, make_inputs
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ExpertsLora, ops
from tilewright.ops.common.packed import decode
from tilewright.ops.moe import api, cpp_cpu, op
from tilewright.ops.moe.problem import ALONE

PLAIN = Case(37, 2, 5, 48, 32)
CASES = {
    "many": PLAIN,
    "few": PLAIN.but(tokens=3),
    "one-of-everything": Case(9, 1, 1, 1, 1),
    "nothing-divides": Case(41, 3, 7, 97, 47, bias=True),
    "interleaved-transposed": PLAIN.but(
        interleaved=True, transposed=True, bias=True, activation="clamped_swiglu"
    ),
    "interleaved-decode": PLAIN.but(tokens=4, interleaved=True, activation="geglu"),
    "scaled-input": PLAIN.but(scale_input=True, bias=True, activation="geglu_tanh"),
    "nowhere": PLAIN.but(routing="nowhere", slots=3),
    "sparse": PLAIN.but(routing="sparse", experts=12),
    "more-rows-than-an-item": Case(700, 2, 3, 33, 20),
    "without-a-gate": PLAIN.but(activation="gelu", bias=True),
}
WEIGHTS = ("gate_up", "down")
TRAINED = ("x", "gates", "up_a", "up_b", "down_a", "down_b")
SCALE = 0.5


def with_updates(case: Case, dtype, rank=4, kind=None, which=WEIGHTS, seed=1):
    """The inputs of a call, and a and b of its updates, flat, in dtype or `kind`."""
    inputs = make_inputs(case, dtype)
    generator = torch.Generator().manual_seed(seed)
    lines = case.width if case.activation in ALONE else 2 * case.width
    extents = dict(gate_up=(case.features, lines, rank), down=(case.width, case.features, rank + 1))
    for name in which:
        n_in, n_out, r = extents[name]
        short = {"gate_up": "up", "down": "down"}[name]
        a = torch.randn(case.experts * r, n_in, generator=generator) / n_in**0.5
        b = torch.randn(n_out, r * case.experts, generator=generator) * 2 / r**0.5
        inputs |= {f"{short}_a": a.to(kind or dtype), f"{short}_b": b.to(kind or dtype)}
    return inputs


def grouped(call: dict) -> dict:
    """The arguments of moe_mlp, with the updates as it takes them."""
    call = dict(call)
    for name, short in (("gate_up_lora", "up"), ("down_lora", "down")):
        if f"{short}_a" in call:
            call[name] = ExpertsLora(call.pop(f"{short}_a"), call.pop(f"{short}_b"), SCALE)
    return call


def both_ways(function, inputs, wanted=TRAINED):
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in wanted if n in inputs}
    call = {n: leaves.get(n, t) for n, t in inputs.items() if n != "dy"}
    y = function(**grouped(call))
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def exact(inputs):
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def placed(value, device):
    """A tensor, a packed weight or an update there."""
    if isinstance(value, ExpertsLora):
        return ExpertsLora(value.a.to(device), value.b.to(device), value.scale)
    return value.to(device)


def ours(case, target):
    """By this target where it runs, from and to the CPU; or a skip with its reason."""

    def function(**call):
        call = {n: placed(t, target.device) for n, t in call.items()}
        target.require("moe_mlp", **call, **case.rule)
        return ops.moe_mlp(**call, **case.rule, impl=target.name).cpu()

    return function


def by_loop(case):
    return lambda **call: loop(**call, case=case)


def judge(got, stock, truth, floor=64.0):
    """floor: magnitudes summed up in float32, over what they sum up to."""
    for part, true in truth.items():
        terms = floor * true.abs().mean() + 0 * true
        assert_errs_at_most_twice_stock(part, got[part], stock[part], true, terms)


def check(case, target, inputs, stock=None, true=None):
    """Our results against the loop's and those of float64, which may have other weights."""
    got = both_ways(ours(case, target), inputs)
    loops = (both_ways(by_loop(case), i) for i in (stock or inputs, exact(true or inputs)))
    judge(got, *loops)


@pytest.mark.parametrize("number, case", enumerate(CASES.values()), ids=CASES)
def test_errs_at_most_twice_the_loop(number, case, impl):
    inputs = with_updates(case, DTYPES[number % 3])
    check(case, impl, inputs)


def test_the_updates_are_no_small_part():
    inputs = with_updates(PLAIN, torch.float64)
    with_them = both_ways(by_loop(PLAIN), inputs)["y"]
    plain = both_ways(by_loop(PLAIN), make_inputs(PLAIN, torch.float64))["y"]
    assert (with_them - plain).square().mean() > 0.05 * with_them.square().mean()


@pytest.mark.parametrize("part", ["y", *TRAINED])
def test_one_percent_is_seen(part, impl_once):
    inputs = with_updates(PLAIN, torch.float32)
    truth = both_ways(by_loop(PLAIN), exact(inputs))
    good, stock = both_ways(ours(PLAIN, impl_once), inputs), both_ways(by_loop(PLAIN), inputs)
    with pytest.raises(AssertionError, match="rms error"):
        judge({part: 1.01 * good[part]}, stock, {part: truth[part]})


@pytest.mark.parametrize("which", [("gate_up",), ("down",)], ids=["gate_up", "down"])
@pytest.mark.parametrize("scale_input", [False, True])
def test_one_of_two_updates(which, scale_input, impl_once):
    case = PLAIN.but(scale_input=scale_input)
    inputs = with_updates(case, torch.float32, which=which)
    check(case, impl_once, inputs)


@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_updates_of_packed_experts(format, impl_once):
    case = Case(40, 2, 3, 80, 48)
    inputs, stock, true = (with_updates(case, torch.float32, kind=torch.float32) for _ in "abc")
    shapes = dict(gate_up=(3, 96, 80), down=(3, 80, 48))
    for name, shape in shapes.items():
        packed = random_packed(format, shape[0] * shape[1], shape[2], group=16)
        inputs[name] = packed
        stock[name] = decode(packed).view(shape)
        true[name] = exactly_decoded(packed).view(shape)
    check(case, impl_once, inputs, stock, true)


def test_float32_updates_of_bfloat16_experts(impl_once):
    inputs = with_updates(PLAIN, torch.bfloat16, kind=torch.float32)
    got = both_ways(ours(PLAIN, impl_once), inputs)
    assert all(got[n].dtype == torch.float32 for n in TRAINED[2:])
    check(PLAIN, impl_once, inputs)


def test_three_axes_are_those_of_two(kernel_once):
    inputs = with_updates(PLAIN, torch.float32)
    need = both_ways(ours(PLAIN, kernel_once), inputs)
    flat = dict(inputs)
    for short, rank in (("up", 4), ("down", 5)):
        inputs[f"{short}_a"] = inputs[f"{short}_a"].unflatten(0, (5, rank))
        inputs[f"{short}_b"] = inputs[f"{short}_b"].unflatten(1, (rank, 5)).permute(2, 0, 1)
    got = both_ways(ours(PLAIN, kernel_once), inputs)
    for n in need:
        shaped = got[n]
        if n.endswith("_a"):
            shaped = shaped.flatten(0, 1)
        elif n.endswith("_b"):
            shaped = shaped.permute(1, 2, 0).flatten(1)
        assert bitwise(shaped.contiguous(), need[n].contiguous()) and shaped.shape == need[n].shape
        assert n not in flat or shaped.shape == flat[n].shape


def test_peft_means_the_same():
    """The weights that PEFT folds, for a parameter (E, out, in)."""

    class Experts(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.gate_up, self.down = (nn.Parameter(inputs[n]) for n in WEIGHTS)

    inputs = make_inputs(PLAIN, torch.float32)
    folded, updates = dict(inputs), {}
    for name in WEIGHTS:
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False)
        wrapper = ParamWrapper(Experts(inputs), "default", name, config, r=3, lora_alpha=6)
        a, b = (getattr(wrapper, m)["default"].weight.detach() for m in ("lora_A", "lora_B"))
        updates[f"{name}_lora"] = ExpertsLora(a, b, 2.0)
        folded[name] = inputs[name] + wrapper.get_delta_weight("default").detach()
        assert (folded[name] - inputs[name]).abs().max() > 0.05
    calls = [{n: t for n, t in i.items() if n != "dy"} for i in (folded, inputs)]
    need = ops.moe_mlp(**calls[0], **PLAIN.rule)
    got = ops.moe_mlp(**calls[1], **updates, **PLAIN.rule)
    torch.testing.assert_close(got, need, rtol=1e-4, atol=1e-4)


# --- the products that updates are made of ---

SPANS = {
    "uneven": ([0, 3, 3, 40, 41, 90], 90),
    "nowhere-at-the-end": ([0, 10, 700], 720),
    "no-rows": ([0, 0, 0], 0),
}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_in, n_out", [(1, 1), (97, 5), (5, 330), (600, 16)])
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products_and_sums_of_outer_ones(spans, dtype, n_in, n_out, turned):
    edges, n_rows = spans
    starts, experts = torch.tensor(edges), len(edges) - 1
    generator = torch.Generator().manual_seed(n_in + n_out)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tokens, others = normal(50, n_in), normal(n_rows, n_out)
    index = torch.randint(0, 50, (n_rows,), generator=generator, dtype=torch.int32)
    weight = normal(experts, n_in, n_out).mT if turned else normal(experts, n_out, n_in)
    given = tokens[index.long()], others, weight
    stock = by_expert(*given, edges)
    truth = by_expert(*(t.double() for t in given), edges)
    terms = by_expert(*(t.double().abs() for t in given), edges)
    for rows, at in ((tokens, index), (given[0], None)):
        product = cpp_cpu.grouped(rows, at, weight, starts)
        assert not product[edges[-1] :].any()
        sums = cpp_cpu.outer(rows, at, others, None, starts)
        turned_sums = cpp_cpu.outer(others, None, rows, at, starts).mT
        for n, got in ((0, product), (1, sums), (1, turned_sums)):
            assert_errs_at_most_twice_stock(str(n), got, stock[n], truth[n], terms[n])


def by_expert(rows, others, weight, edges):
    """The rows of each expert times its matrix, and the sum of their outer products."""
    product = rows.new_zeros(rows.shape[0], weight.shape[1])
    sums = rows.new_zeros(weight.shape[0], rows.shape[1], others.shape[1])
    for e in range(weight.shape[0]):
        part = slice(edges[e], edges[e + 1])
        product[part] = rows[part] @ weight[e].T
        sums[e] = rows[part].T @ others[part]
    return product, sums


def test_the_number_of_calls_does_not_grow_with_the_experts():
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += 1
            return function(*args, **(kwargs or {}))

    for experts in (3, 24):
        case = PLAIN.but(experts=experts)
        counts.append(0)
        both_ways_directly(case, with_updates(case, torch.float32), "cpp_cpu", Count())
    assert counts[0] == counts[1] > 20


def test_threads_change_no_bit_of_an_update():
    before, results = torch.get_num_threads(), []
    inputs = with_updates(CASES["more-rows-than-an-item"], torch.bfloat16)
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(both_ways(lambda **c: ops.moe_mlp(**c, impl="cpp_cpu"), inputs))
    finally:
        torch.set_num_threads(before)
    assert all(bitwise(r[n], results[0][n]) for r in results for n in r)


def test_experts_without_tokens_get_exactly_zero(impl_once):
    case = CASES["sparse"]
    inputs = with_updates(case, torch.float32)
    got = both_ways(ours(case, impl_once), inputs)
    empty = [e for e in range(12) if not (inputs["ids"] == e).any()]
    assert len(empty) >= 5
    for short, rank in (("up", 4), ("down", 5)):
        a = got[f"{short}_a"].unflatten(0, (12, rank))
        b = got[f"{short}_b"].unflatten(1, (rank, 12))
        assert not a[empty].any() and not b[:, :, empty].any() and a.any() and b.any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens, impl_once):
    inputs = with_updates(PLAIN.but(tokens=tokens), torch.float32)
    got = both_ways(ours(PLAIN, impl_once), inputs)
    assert got["y"].shape == (tokens, 48)
    for n in TRAINED[2:]:
        assert got[n].shape == inputs[n].shape and got[n].any() == bool(tokens)


def both_ways_directly(case, inputs, impl, watch):
    """Forward and backward under a dispatch mode, which sees into our operators."""
    call = grouped({n: t for n, t in inputs.items() if n != "dy"})
    problem, x, ids, gates, o = api._describe(**call, **case.rule)
    wants = [True, True, *[False] * 4, *[True] * 4]
    with watch:
        _, *saved = op._run_forward(x, ids, gates, True, o, problem, impl)
        rest = op.rest(problem, impl)
        op._backward(inputs["dy"], x, gates, *saved, wants, *o, *rest)


def test_no_tensor_as_large_as_the_experts_is_made(kernel_once):
    """Neither W + B A nor its gradient."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    sizes.append(t.numel())
            return out

    case = Case(8, 1, 16, 64, 64)
    inputs = with_updates(case, torch.float32, rank=2)
    inputs = {n: t.to(kernel_once.device) for n, t in inputs.items()}
    both_ways_directly(case, inputs, kernel_once.name, Watch())
    assert sizes and max(sizes) < inputs["down"].numel() / 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(up_a=torch.zeros(21, 48)), r"gate_up_lora.a has shape \(21, 48\), need \(20, 48\)"),
        (dict(up_a=torch.zeros(20, 40)), r"gate_up_lora.a has shape \(20, 40\), need \(20, 48\)"),
        (dict(down_b=torch.zeros(48, 20)), r"down_lora.b has shape \(48, 20\), need \(48, 25\)"),
        (dict(down_b=torch.zeros(48, 25).long()), "down_lora.b is torch.int64, need one of"),
    ],
)
def test_refusals(change, message):
    inputs = with_updates(PLAIN, torch.float32) | change
    with pytest.raises(ValueError, match=f"moe_mlp: {message}"):
        ops.moe_mlp(**grouped({n: t for n, t in inputs.items() if n != "dy"}))
