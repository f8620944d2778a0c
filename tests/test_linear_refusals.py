"""Every refusal of the linear room, by its message: argument, what came, what is needed."""

import re
from dataclasses import replace

import pytest
import torch
from linear_inputs import random_packed

import tilewright
from tilewright import choose, ops

x, weight = torch.zeros(5, 16), torch.zeros(8, 16)
down, up = torch.zeros(3, 16), torch.zeros(8, 3)
packed = random_packed("nf4", 8, 16, 8)
nested = random_packed("nf4", 8, 16, 8, "nested")
SEED = torch.tensor([1])
low_rank = {"down": down, "up": up}

CALLS = {
    "x-axes": ((torch.tensor(1.0), weight), {}, "x has shape (), need axes (..., I)"),
    "x-width": (
        (x[:, :15], weight),
        {},
        "x has shape (5, 15), need a last axis of I = 16 as in weight",
    ),
    "x-width-packed": (
        (torch.zeros(2, 3, 17), packed),
        {},
        "x has shape (2, 3, 17), need a last axis of I = 16 as in weight",
    ),
    "x-integers": (
        (x.int(), weight),
        {},
        "x is torch.int32, need one of float32, bfloat16, float16, float64",
    ),
    "weight-axes": ((x, weight[0]), {}, "weight has shape (16,), need axes (O, I)"),
    "weight-dtype": ((x, weight.half()), {}, "weight is torch.float16, need torch.float32 as in x"),
    "weight-device": ((x, weight.to("meta")), {}, "weight is on meta, need cpu as in x"),
    "packed-device": ((x, packed.to("meta")), {}, "weight is on meta, need cpu as in x"),
    "bias-shape": (
        (x, weight, torch.zeros(7)),
        {},
        "bias has shape (7,), need (8,): O as in weight",
    ),
    "bias-dtype": (
        (x, weight, torch.zeros(8, dtype=torch.int32)),
        {},
        "bias is torch.int32, need one of float32",
    ),
    "bias-device": (
        (x, weight, torch.zeros(8, device="meta")),
        {},
        "bias is on meta, need cpu as in x",
    ),
    "out-scale-shape": (
        (x, weight),
        {"out_scale": torch.zeros(8, 1)},
        "out_scale has shape (8, 1), need (8,): O as in weight",
    ),
    "out-scale-dtype": (
        (x, weight),
        {"out_scale": torch.zeros(8).bool()},
        "out_scale is torch.bool, need one of float32",
    ),
    "down-alone": ((x, weight), {"down": down}, "up is missing, need down and up together"),
    "up-alone": ((x, weight), {"up": up}, "down is missing, need down and up together"),
    "down-shape": (
        (x, weight),
        {"down": down[:, :8], "up": up},
        "down has shape (3, 8), need (R, 16)",
    ),
    "down-axes": ((x, weight), {"down": down[0], "up": up}, "down has shape (16,), need (R, 16)"),
    "up-shape": ((x, weight), {"down": down, "up": up.T}, "up has shape (3, 8), need (8, 3)"),
    "no-rank": (
        (x, weight),
        {"down": down[:0], "up": up[:, :0]},
        "R is 0, need 1 <= R <= 4096",
    ),
    "too-much-rank": (
        (x, weight),
        {"down": torch.zeros(4097, 16), "up": torch.zeros(8, 4097)},
        "R is 4097, need 1 <= R <= 4096",
    ),
    "down-dtype": (
        (x, weight),
        {"down": down.int(), "up": up},
        "down is torch.int32, need one of float32",
    ),
    "activation": (
        (x, weight),
        {**low_rank, "activation": "gelu"},
        "no activation 'gelu'. Known: none, relu",
    ),
    "nan-scale": (
        (x, weight),
        {**low_rank, "scale": float("nan")},
        "scale is nan, need a finite number",
    ),
    "infinite-scale": (
        (x, weight),
        {**low_rank, "scale": float("inf")},
        "scale is inf, need a finite number",
    ),
    "dropout-of-all": (
        (x, weight),
        {**low_rank, "dropout_p": 1.0},
        "dropout_p is 1.0, need 0 <= dropout_p < 1",
    ),
    "dropout-negative": (
        (x, weight),
        {**low_rank, "dropout_p": -0.1},
        "dropout_p is -0.1, need 0 <= dropout_p < 1",
    ),
    "dropout-nan": (
        (x, weight),
        {**low_rank, "dropout_p": float("nan")},
        "dropout_p is nan, need 0 <= dropout_p < 1",
    ),
    "dropout-of-nothing": (
        (x, weight),
        {"dropout_p": 0.1},
        "dropout_p is 0.1 without down and up to drop from",
    ),
    "seed-dtype": (
        (x, weight),
        {**low_rank, "dropout_p": 0.1, "dropout_seed": SEED.int()},
        "dropout_seed is torch.int32 of shape (1,), need int64 of shape (1,)",
    ),
    "seed-shape": (
        (x, weight),
        {**low_rank, "dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])},
        "dropout_seed is torch.int64 of shape (2,), need int64 of shape (1,)",
    ),
    "int8-over-dense": (
        (x, weight),
        {"int8_activations": True},
        "int8_activations needs a packed weight of whole-number codes, got dense",
    ),
    "int8-over-fp8": (
        (x, random_packed("fp8", 8, 16, 8)),
        {"int8_activations": True},
        "int8_activations needs a packed weight of whole-number codes, got fp8",
    ),
    "unknown-impl": (
        (x, weight),
        {"impl": "fastest"},
        'no impl "fastest". Known: auto, triton_gpu, cuda_hopper, cpp_cpu, reference',
    ),
}


@pytest.mark.parametrize("arguments, options, message", CALLS.values(), ids=CALLS)
def test_fused_linear(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.fused_linear(*arguments, **options)
    assert str(refusal.value).startswith("fused_linear: ")


# a PackedWeight that does not fit itself: its kernels would read past the ends of its tensors
CORRUPT = {
    "format": (packed, {"format": "nf5"}, "no format 'nf5'. Known: int4, uint4, nf4"),
    "row-blocks": (
        packed,
        {"out_features": 17},
        "weight's codes is torch.uint8 of shape (1, 2, 64), need uint8 of shape (2, 2, 64)",
    ),
    "lines": (
        packed,
        {"codes": packed.codes[:, :1]},
        "weight's codes is torch.uint8 of shape (1, 1, 64), need uint8 of shape (1, 2, 64)",
    ),
    "bits": (
        packed,
        {"format": "int8"},
        "weight's codes is torch.uint8 of shape (1, 2, 64), need uint8 of shape (1, 4, 64)",
    ),
    "codes-dtype": (
        packed,
        {"codes": packed.codes.to(torch.int32)},
        "weight's codes is torch.int32 of shape (1, 2, 64), need uint8",
    ),
    "group-size": (packed, {"group_size": 0}, "weight's group_size is 0, need at least 1"),
    "groups": (
        packed,
        {"group_size": 16},
        "weight's scales is torch.float32 of shape (1, 2, 16), need float32 or float16 or bfloat16 "
        "of shape (1, 1, 16)",
    ),
    "scales-dtype": (
        packed,
        {"scales": packed.scales.double()},
        "weight's scales is torch.float64 of shape (1, 2, 16), need float32 or float16",
    ),
    "scales-bytes": (
        packed,
        {"scales": packed.scales.to(torch.uint8)},
        "weight's scales is torch.uint8 of shape (1, 2, 16), need float32 or float16",
    ),
    "nested-scales": (
        nested,
        {"scales": packed.scales},
        "weight's scales is torch.float32 of shape (1, 2, 16), need uint8 of shape (1, 2, 16)",
    ),
    "offsets": (
        packed,
        {"offsets": packed.scales[:, :1]},
        "weight's offsets is torch.float32 of shape (1, 1, 16), need",
    ),
    "order-length": (
        packed,
        {"input_order": torch.arange(15, dtype=torch.int32)},
        "weight's input_order is torch.int32 of shape (15,), need int32 of shape (16,)",
    ),
    "nested-table": (
        nested,
        {"nested": nested.nested._replace(table=torch.zeros(255))},
        "weight's nested table is torch.float32 of shape (255,), need",
    ),
    "nested-absmax": (
        nested,
        {"nested": nested.nested._replace(absmax=torch.zeros(2))},
        "weight's nested absmax is torch.float32 of shape (2,), need float32 or float16 or "
        "bfloat16 of shape (3,)",
    ),
    "nested-block": (
        nested,
        {"nested": nested.nested._replace(block=0)},
        "weight's nested block is 0, need at least 1",
    ),
    "scales-device": (
        packed,
        {"scales": packed.scales.to("meta")},
        "weight's scales is on meta, need cpu as in x",
    ),
}


@pytest.mark.parametrize("whole, change, message", CORRUPT.values(), ids=CORRUPT)
def test_a_packed_weight_that_does_not_fit_itself(whole, change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.quantized_linear(x, replace(whole, **change))
    assert str(refusal.value).startswith("fused_linear: ")


rows = torch.zeros(5, dtype=torch.int32)
ADAPTERS = {
    "none": (([], [], rows), {"scales": []}, "0 downs, 0 ups and 0 scales, need as many of each"),
    "counts": (
        ([down], [up, up], rows),
        {"scales": [1.0]},
        "1 downs, 2 ups and 1 scales, need as many of each, and at least 1",
    ),
    "rows-dtype": (
        ([down], [up], rows.long()),
        {"scales": [1.0]},
        "row_adapters is torch.int64 of shape (5,), need int32 of shape (5,)",
    ),
    "rows-shape": (
        ([down], [up], rows[:4]),
        {"scales": [1.0]},
        "row_adapters is torch.int32 of shape (4,), need int32 of shape (5,)",
    ),
    "down-shape": (
        ([down, down[:, :8]], [up, up], rows),
        {"scales": [1.0, 1.0]},
        "downs[1] has shape (3, 8), need (R, 16), R at least 1",
    ),
    "down-axes": (
        ([torch.tensor(1.0)], [up], rows),
        {"scales": [1.0]},
        "downs[0] has shape (), need (R, 16)",
    ),
    "up-shape": (
        ([down, down], [up, up[:, :2]], rows),
        {"scales": [1.0, 1.0]},
        "ups[1] has shape (8, 2), need (8, 3)",
    ),
    "rank": (
        ([torch.zeros(3000, 16)] * 2, [torch.zeros(8, 3000)] * 2, rows),
        {"scales": [1.0, 1.0]},
        "R is 6000, need 1 <= R <= 4096",
    ),
    "scale": (
        ([down], [up], rows),
        {"scales": [float("inf")]},
        "scales[0] is inf, need a finite number",
    ),
}


@pytest.mark.parametrize("arguments, options, message", ADAPTERS.values(), ids=ADAPTERS)
def test_multi_lora_linear(arguments, options, message):
    downs, ups, row_adapters = arguments
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.multi_lora_linear(x, weight, downs, ups, row_adapters, **options)
    assert str(refusal.value).startswith("multi_lora_linear: ")


@pytest.mark.parametrize("impl", ["cpp_cpu", "reference"])
@pytest.mark.parametrize("stray", [-2, 2, 2**31 - 1])
@pytest.mark.parametrize("base", [weight, packed], ids=["dense", "packed"])
def test_an_adapter_that_is_not_there(base, stray, impl):
    row_adapters = rows.clone()
    row_adapters[3] = stray
    message = f"row_adapters[3] is {stray}, need -1 for none or 0 to 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.multi_lora_linear(
            x, base, [down, down], [up, up], row_adapters, scales=[1.0, 1.0], impl=impl
        )


def test_a_named_implementation_runs_or_raises():
    message = r'fused_linear: impl "triton_gpu" cannot run: tensors are on cpu.* Here: cpp_cpu'
    with pytest.raises(RuntimeError, match=message):
        ops.fused_linear(x, weight, impl="triton_gpu")
    message = r'fused_linear: impl "cpp_cpu" cannot run: no kernel for torch\.float64'
    with pytest.raises(RuntimeError, match=message):
        ops.fused_linear(x.double(), weight.double(), impl="cpp_cpu")
    with pytest.raises(RuntimeError, match="Here: cpp_cpu, reference"):
        ops.multi_lora_linear(x, weight, [down], [up], rows, scales=[1.0], impl="triton_gpu")


def test_explain_says_which_and_why_not_the_others():
    explanation = tilewright.explain("fused_linear", x, packed, **low_rank)
    assert explanation.chosen == "cpp_cpu"
    assert explanation.reasons["reference"] == "cpp_cpu comes first"
    assert "fused_linear: cpp_cpu" in str(explanation)
    double = tilewright.explain("fused_linear", x.double(), packed)
    assert double.chosen == "reference" and "float64" in double.reasons["cpp_cpu"]


def test_int8_activations_run_where_explain_says():
    explanation = tilewright.explain("fused_linear", x, packed, int8_activations=True)
    problem = choose.OPERATORS["fused_linear"].problem(x, packed, int8_activations=True)
    assert problem.int8_activations
    for name in ("cpp_cpu", "reference"):
        if name == explanation.chosen or "comes first" in explanation.reasons[name]:
            ops.quantized_linear(x, packed, int8_activations=True, impl=name)
        else:
            with pytest.raises(RuntimeError, match=re.escape(explanation.reasons[name])):
                ops.quantized_linear(x, packed, int8_activations=True, impl=name)


@pytest.mark.parametrize("which", ["x", "weight", "down"])
def test_a_negated_view_is_refused(which):
    given = {"x": x, "weight": weight, "down": down, "up": up}
    shape = given[which].shape
    given[which] = torch.zeros(shape, dtype=torch.complex64).conj().imag
    assert given[which].is_neg()
    with pytest.raises(ValueError, match=r"fused_linear: .*negated view"):
        ops.fused_linear(**given)
