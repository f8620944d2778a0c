"""The Triton kernels of the moe room against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself. A tile has 16 rows, 32 lanes (16 pairs of gate and up) and a depth of 32, so
that these sizes have whole tiles, tiles that cross an end, and none.
"""

import pytest
import torch
from attention_inputs import bitwise
from moe_inputs import GRADIENTS, Case, judge, make_inputs, ours, prepared, with_gradients
from test_moe_packed import prepared as packed_prepared

from tilewright import ExpertsLora, choose, ops, settings
from tilewright.ops.moe import triton_gpu

DTYPES = (torch.float32, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
PLAIN = Case(37, 2, 5, 40, 24)
CASES = {
    "one-of-everything-but-tokens": Case(64, 1, 1, 1, 1),
    "nothing-divides": Case(7, 3, 7, 65, 33),
    "whole-tiles": Case(32, 2, 2, 64, 32),
    "several-tiles": Case(70, 1, 2, 72, 50, bias=True),
    "all-to-one": PLAIN.but(routing="one"),
    "repeated": PLAIN.but(routing="repeated", slots=4),
    "nowhere": PLAIN.but(routing="nowhere", slots=3, bias=True),
    "without-tokens": PLAIN.but(routing="sparse", experts=12, bias=True),
    "interleaved": PLAIN.but(interleaved=True, bias=True, activation="geglu"),
    "transposed": PLAIN.but(transposed=True, activation="geglu_tanh"),
    "gpt-oss": PLAIN.but(activation="clamped_swiglu", bias=True, interleaved=True, transposed=True),
    "scaled-input": PLAIN.but(scale_input=True, bias=True, ids_dtype=torch.int32),
    "scaled-input-nowhere": PLAIN.but(scale_input=True, routing="nowhere", slots=3),
}


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def wanted(case):
    return [n for n in GRADIENTS if case.bias or "bias" not in n]


@by_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errs_at_most_twice_the_loop(case, dtype):
    """And an error of 1 % is seen in each result."""
    p = prepared(case, dtype)
    got = with_gradients(ours(case, "triton_gpu"), p.inputs, wanted(case))
    judge("triton_gpu", got, p)
    for name, value in got.items():
        if p.truth[name].any():
            with pytest.raises(AssertionError):
                judge("spoilt", {name: 1.01 * value}, p)


@pytest.mark.parametrize("only", GRADIENTS)
def test_a_gradient_alone_is_that_among_all(only):
    case = CASES["nowhere"]
    inputs = make_inputs(case, torch.float32)
    everything = with_gradients(ours(case, "triton_gpu"), inputs, GRADIENTS)
    alone = with_gradients(ours(case, "triton_gpu"), inputs, (only,))
    assert all(bitwise(alone[n], everything[n]) for n in alone)


def test_experts_without_tokens_get_exactly_zero():
    case = CASES["without-tokens"]
    inputs = make_inputs(case, torch.float32)
    got = with_gradients(ours(case, "triton_gpu"), inputs)
    empty = [e for e in range(case.experts) if not (inputs["ids"] == e).any()]
    assert len(empty) >= 5
    assert not any(got[n][empty].any() for n in GRADIENTS[2:])


def test_slots_that_go_nowhere_have_no_part():
    case = CASES["nowhere"]
    inputs = make_inputs(case, torch.float32)
    nowhere = (inputs["ids"] < 0) | (inputs["ids"] >= case.experts)
    inputs["gates"][nowhere] = float("nan")
    got = with_gradients(ours(case, "triton_gpu"), inputs)
    assert all(t.isfinite().all() for t in got.values())
    assert not got["gates"][nowhere].any() and not got["y"][0].any() and not got["x"][0].any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens):
    case = PLAIN.but(tokens=tokens, bias=True)
    inputs = make_inputs(case, torch.float32)
    got = with_gradients(ours(case, "triton_gpu"), inputs)
    assert got["y"].shape == got["x"].shape == (tokens, 40)
    assert all(got[n].any() == bool(tokens) for n in GRADIENTS[2:])


def test_strides_change_no_bit():
    case = PLAIN
    inputs = make_inputs(case, torch.float32)
    views = dict(inputs)
    for name in ("x", "gate_up", "down"):
        apart = torch.full((*inputs[name].shape, 2), float("nan"))
        apart[..., 0] = inputs[name]
        views[name] = apart[..., 0]
    views["dy"] = torch.ones(()).expand(37, 40)
    names = GRADIENTS[:4]
    results = []
    for given in (views, dict(inputs, dy=torch.ones(37, 40))):
        leaves = {n: given[n].detach().requires_grad_() for n in names}
        call = {n: leaves.get(n, t) for n, t in given.items() if n != "dy"}
        y = ours(case, "triton_gpu")(**call)
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), given["dy"])))
    assert all(bitwise(a, b) for a, b in zip(*results, strict=True))


def test_a_token_does_not_depend_on_the_others():
    inputs = make_inputs(PLAIN, torch.float32)
    call = {n: t for n, t in inputs.items() if n != "dy"}
    y = ours(PLAIN, "triton_gpu")(**call)
    call["x"] = inputs["x"].clone()
    call["x"][20:] = float("inf")
    assert bitwise(ours(PLAIN, "triton_gpu")(**call)[:20], y[:20])


@by_dtype
@pytest.mark.parametrize("scale_input", [False, True])
def test_low_rank_updates(dtype, scale_input):
    """The sums of narrow products, with those of the reference in float64."""
    case = PLAIN.but(scale_input=scale_input, routing="nowhere", slots=3)
    inputs = make_inputs(case, dtype)
    generator = torch.Generator().manual_seed(3)
    shapes = dict(up_a=(5, 3, 40), up_b=(5, 48, 3), down_a=(5, 20, 24), down_b=(5, 40, 20))
    for name, shape in shapes.items():
        inputs[name] = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
    names = ("x", "gates", *shapes)
    results = []
    for impl in ("triton_gpu", "reference"):
        leaves = {n: inputs[n].clone().requires_grad_() for n in names}
        call = {n: leaves.get(n, t) for n, t in inputs.items() if n not in ("dy", *shapes)}
        updates = dict(
            gate_up_lora=ExpertsLora(leaves["up_a"], leaves["up_b"], 0.5),
            down_lora=ExpertsLora(leaves["down_a"], leaves["down_b"], 2.0),
        )
        y = ops.moe_mlp(**call, **updates, **case.rule, impl=impl)
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), inputs["dy"])))
    for name, got, need in zip(("y", *names), *results, strict=True):
        scale = need.float().square().mean().sqrt()
        error = (got.float() - need.float()).square().mean().sqrt() / scale
        assert error < (2e-6 if dtype == torch.float32 else 2e-3), (name, error)


PACKED = {
    "int4": dict(format="int4", group=16),
    "uint4-offsets": dict(format="uint4", group=32, offsets=True, scales=torch.float16),
    "nf4-nested": dict(format="nf4", group=16, scales="nested"),
    "nf4-rows": dict(format="nf4"),
    "int8-rows": dict(format="int8"),
    "fp8": dict(format="fp8", group=8),
}
HALVES = Case(40, 2, 3, 80, 48, bias=True)
TURNED = Case(30, 3, 4, 48, 32, interleaved=True, scale_input=True, routing="nowhere")
PACKED_CALLS = {n: (HALVES, options) for n, options in PACKED.items()} | {
    f"{n}, interleaved": (TURNED, PACKED[n]) for n in ("uint4-offsets", "nf4-nested")
}


@pytest.mark.parametrize("number", range(len(PACKED_CALLS)), ids=list(PACKED_CALLS))
def test_packed_experts(number):
    case, options = list(PACKED_CALLS.values())[number]
    p = packed_prepared(case, DTYPES[number % 2], **options)
    got = with_gradients(ours(case, "triton_gpu"), p.inputs, ("x", "gates"))
    judge("triton_gpu", got, p)
    for name, value in got.items():
        with pytest.raises(AssertionError):
            judge("spoilt", {name: 1.01 * value}, p)


def test_auto_takes_it_here_and_bfloat16_is_refused():
    inputs = make_inputs(PLAIN, torch.float32)
    call = {n: t for n, t in inputs.items() if n != "dy"}
    assert choose.explain("moe_mlp", **call).chosen == "triton_gpu"
    narrow = {n: t.bfloat16() if t.is_floating_point() else t for n, t in call.items()}
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        ops.moe_mlp(**narrow, impl="triton_gpu")


@pytest.mark.parametrize("counts", [[0, 0], [16, 0, 17], [1], [40, 1, 15, 33]], ids=str)
def test_tables_of_tiles(counts):
    """Every row once, in tiles of one expert."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    order = torch.arange(sum(counts) + 5, dtype=torch.int32)
    rows = triton_gpu.rows_of(order, starts, 16)
    seen = []
    for tile, e in enumerate(rows.tile_experts.tolist()):
        if e < len(counts):
            first = int(starts[e]) + 16 * (tile - (int(rows.tile_ends[e - 1]) if e else 0))
            seen += range(first, min(first + 16, int(starts[e + 1])))
    assert seen == list(range(sum(counts)))
    assert int(rows.tile_ends[-1]) <= rows.tile_experts.numel()
