"""The Triton linear kernels against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself. A tile has 16 tokens, 32 outputs and 32 inputs, and 32 columns of rank at most,
so that these sizes have whole tiles, tiles that cross an end, and none. Narrow products are cut
into three splits, the base product into none; test_splits cuts that as well.
"""

import pytest
import torch
from linear_cases import (
    SEED,
    Case,
    both_ways,
    call,
    make_inputs,
    packed_weight,
    stock,
    summed_magnitudes,
    truth_of,
)
from yardstick import assert_errs_at_most_twice_stock

from tilewright import choose, ops, settings
from tilewright.ops.common.packed import FORMATS, decode, pack_codes
from tilewright.ops.linear import reference, triton_config, triton_gpu
from tilewright.ops.linear.problem import Operands

DTYPES = (torch.float32, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def bitwise(a, b) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def check(case, dtype):
    """y and all gradients within the error rule, and the rule sees an error of 1 % in each."""
    tensors, dy = make_inputs(case, dtype)
    ours = both_ways(call, case, tensors, dy, "triton_gpu")
    theirs = both_ways(stock, case, tensors, dy)
    truth = truth_of(case, tensors, dy)
    terms = {}
    if not (case.int8_activations or case.dropout_p):
        terms = summed_magnitudes(case.with_(activation="none"), tensors, dy)
    assert ours["y"].is_contiguous() and ours["y"].dtype == dtype
    for name in truth:
        results = [r[name] for r in (ours, theirs, truth)]
        assert_errs_at_most_twice_stock(name, *results, terms.get(name))
        if truth[name].any():
            with pytest.raises(AssertionError):
                assert_errs_at_most_twice_stock(
                    name, 1.01 * results[0], *results[1:], terms.get(name)
                )
    return ours


FULL = {"has_bias": True, "has_out_scale": True}
DENSE = {
    "one-of-everything": Case(1, 1, 1, 1, **FULL),
    "nothing-divides-a-tile": Case(7, 65, 33, 3, **FULL),
    "whole-tiles": Case(32, 64, 64, 16),
    "several-tiles": Case(50, 100, 72, 20, has_bias=True),
    "no-update": Case(20, 40, 50, has_bias=True),
    "neither-bias-nor-update": Case(20, 40, 50),
    "wide-rank": Case(20, 40, 50, 70),
    "wider-than-the-layer": Case(20, 9, 8, 33),
    "float32-adapters": Case(20, 70, 50, 5, adapter=torch.float32, **FULL),
    "float64-adapters": Case(20, 70, 50, 5, adapter=torch.float64, has_bias=True),
    "relu": Case(40, 70, 50, 12, activation="relu", **FULL),
    "dropout": Case(40, 70, 50, 12, dropout_p=0.3, **FULL),
    "dropout-relu": Case(20, 33, 50, 12, dropout_p=0.5, activation="relu"),
    "adapters": Case(40, 70, 50, 6, adapters=3, has_bias=True),
    "many-adapters": Case(20, 40, 34, 11, adapters=7, adapter=torch.float32),
}


@by_dtype
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_dense(case, dtype):
    check(case, dtype)


PACKED = {
    "groups": Case(20, 96, 50, 4, group=32),
    "groups-of-8": Case(20, 72, 50, group=8, has_bias=True),
    "groups-of-24": Case(20, 100, 50, 4, group=24, **FULL),
    "one-scale-a-row": Case(20, 65, 33, 4),
    "fewer-than-a-line": Case(3, 3, 5, 2),
    "few-tokens": Case(2, 100, 70, 4, group=32, has_bias=True),
}


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("format", FORMATS)
def test_packed(format, case):
    check(case.with_(format=format), torch.float32)


@pytest.mark.parametrize("name", ["groups", "few-tokens"])  # the few scale their sums
@pytest.mark.parametrize("format", FORMATS)
def test_packed_float16(format, name):
    check(PACKED[name].with_(format=format), torch.float16)


FEATURES = {
    "offsets": Case(20, 96, 50, format="uint4", group=32, has_offsets=True),
    "offsets-of-few": Case(
        5, 96, 50, 4, format="uint4", group=32, has_offsets=True, has_order=True
    ),
    "offsets-of-8": Case(20, 72, 50, 4, format="uint4", group=8, has_offsets=True),
    "offsets-of-int8": Case(20, 72, 50, format="int8", group=24, has_offsets=True),
    "input-order": Case(20, 96, 50, 4, format="int4", group=32, has_order=True, has_bias=True),
    "input-order-dropout": Case(
        20, 70, 50, 4, format="int4", group=8, has_order=True, has_offsets=True, dropout_p=0.3
    ),
    "nested": Case(20, 96, 50, 4, format="nf4", group=32, scales="nested"),
    "nested-of-8": Case(20, 72, 50, format="fp4", group=8, scales="nested", has_bias=True),
    "float16-scales": Case(20, 96, 50, format="int4", group=32, scales=torch.float16),
    "bfloat16-scales": Case(20, 72, 50, format="fp8", group=24, scales=torch.bfloat16),
    "dropout": Case(40, 96, 50, 4, format="nf4", group=32, dropout_p=0.2, **FULL),
    "adapters": Case(40, 70, 50, 4, format="nf4", group=64, adapters=3, has_bias=True),
    "wide-rank-relu": Case(20, 64, 40, 70, format="int8", activation="relu", **FULL),
}


@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
def test_packed_features(case):
    check(case, torch.float32)


@pytest.mark.parametrize(
    "name", ["input-order-dropout", "nested", "offsets-of-few", "bfloat16-scales", "adapters"]
)
def test_packed_features_in_float16(name):
    check(FEATURES[name], torch.float16)


EIGHT_BITS = {
    "groups": Case(20, 96, 50, 4, group=32, **FULL),
    "one-scale-a-row": Case(20, 70, 33, 4, has_bias=True),
    "offsets": Case(20, 128, 50, group=64, has_offsets=True),
    "input-order-nested": Case(3, 96, 50, 4, group=32, has_order=True, scales="nested"),
}


@pytest.mark.parametrize("case", EIGHT_BITS.values(), ids=EIGHT_BITS)
@pytest.mark.parametrize("format", ["int4", "nf4", "int8"])
def test_int8_activations(format, case):
    check(case.with_(format=format, int8_activations=True), torch.float32)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_int8_activations_in_float16(name):
    check(EIGHT_BITS[name].with_(format="int4", int8_activations=True), torch.float16)


@pytest.mark.parametrize("format", ["uint4", "fp4", "e2m1"])
def test_int8_activations_of_the_other_formats(format):
    check(EIGHT_BITS["groups"].with_(format=format, int8_activations=True), torch.float32)


@pytest.mark.parametrize("wanted", [2, 100])
def test_splits(monkeypatch, wanted):
    """The base product in splits: the second pass adds bias, factors and the update."""

    def split(capability, n_tiles, extent, step, is_narrow):
        n_steps = -(-extent // step)
        steps = -(-n_steps // min(wanted, n_steps))
        return -(-n_steps // steps), steps

    monkeypatch.setattr(triton_config, "split", split)
    check(Case(20, 100, 70, 20, **FULL), torch.float32)
    check(Case(3, 130, 70, 4, format="nf4", group=32, activation="relu", **FULL), torch.float16)
    check(
        Case(20, 96, 50, 4, format="int4", group=32, int8_activations=True, **FULL), torch.float32
    )


@pytest.mark.parametrize("group", [8, 32, 0], ids=["groups-of-8", "groups-of-32", "rows"])
@pytest.mark.parametrize("format", FORMATS)
def test_unit_vectors_read_the_weight_bit_for_bit(format, group):
    """Forward and backward: both decode every element exactly as `decode` does in float32."""
    case = Case(40, 40, 40, format=format, group=group, has_offsets=True, has_order=True)
    weight = packed_weight(case)
    wanted = decode(weight)
    x = torch.eye(40)
    y = ops.fused_linear(x, weight, impl="triton_gpu")
    assert bitwise(y.T.contiguous(), wanted)
    x = torch.zeros(40, 40).requires_grad_()
    (dx,) = torch.autograd.grad(ops.fused_linear(x, weight, impl="triton_gpu"), x, torch.eye(40))
    assert bitwise(dx, wanted)


def test_every_code_of_fp8():
    """All 256, the two NaN included: one code a row, so that a NaN spoils its own row alone."""
    case = Case(1, 1, 256, format="fp8")
    weight = packed_weight(case)
    weight.codes.copy_(pack_codes(torch.arange(256, dtype=torch.uint8)[:, None], "fp8"))
    wanted = decode(weight)[:, 0]
    y = ops.fused_linear(torch.ones(1, 1), weight, impl="triton_gpu")[0]
    assert wanted.isnan().sum() == 2
    assert torch.equal(y.nan_to_num(123.0), wanted.nan_to_num(123.0))


@pytest.mark.parametrize("order", [False, True], ids=["in-order", "input-order"])
@pytest.mark.parametrize("seed", [0, SEED], ids=hex)
def test_the_dropped_elements_are_philox_words(seed, order):
    """In y, dx and ddown: with unit vectors in the other places each shows the elements kept."""
    T, I, p = 37, 43, 0.45
    kept = reference.philox_uniform(seed, torch.arange(T), I) >= p
    case = Case(T, I, I, format="int4", group=8, has_order=order)
    weight = packed_weight(case)
    weight.scales.zero_()
    options = dict(dropout_p=p, dropout_seed=torch.tensor([seed]), impl="triton_gpu")
    x = torch.ones(T, I).requires_grad_()
    eye = torch.eye(I)
    y = ops.fused_linear(x, weight, down=eye, up=eye, **options)
    assert torch.equal(y > 0, kept)
    (dx,) = torch.autograd.grad(y, x, torch.ones(T, I))
    assert torch.equal(dx > 0, kept)
    down = torch.zeros(T, I).requires_grad_()
    up = torch.zeros(I, T)
    up[:T] = torch.eye(T)
    y = ops.fused_linear(x, weight, down=down, up=up, **options)
    (ddown,) = torch.autograd.grad(y, down, torch.eye(T, I))
    assert torch.equal(ddown > 0, kept)


def transposed(t):
    """The same values with the axes exchanged in memory."""
    return t.t().contiguous().t()


def every_second(t):
    """The same values with a stride of 2 in the last axis, NaN in between."""
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


def off_by_one(t):
    """The same values, one element past an aligned address."""
    return t.new_zeros(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)


@by_dtype
@pytest.mark.parametrize("layout", [transposed, every_second, off_by_one])
def test_strided_tensors_give_the_same_bits(layout, dtype):
    case = Case(20, 40, 50, 5, **FULL)
    tensors, dy = make_inputs(case, dtype)

    def laid_out(lay_out):
        leaves = {n: lay_out(t).detach() for n, t in tensors.items()}
        trained = [t for n, t in leaves.items() if n in ("x", "bias", "down", "up")]
        for t in trained:
            t.requires_grad_()
        y = call(case, leaves, "triton_gpu")
        return y, *torch.autograd.grad(y, trained, lay_out(dy))

    results = laid_out(torch.clone), laid_out(layout)
    assert all(bitwise(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("axes", ["all", "tokens", "out"])
def test_an_expanded_upstream_gradient(axes):
    """dy with stride 0, as .sum() hands it down, equals its contiguous copy bitwise."""
    case = Case(20, 40, 50, 5, format="nf4", group=8, **FULL)
    tensors, dy = make_inputs(case, torch.float32)
    dy = {"all": dy[:1, :1], "tokens": dy[:1], "out": dy[:, :1]}[axes].expand(20, 50)
    a = both_ways(call, case, tensors, dy, "triton_gpu")
    b = both_ways(call, case, tensors, dy.contiguous(), "triton_gpu")
    assert all(bitwise(a[name], b[name]) for name in a)


@by_dtype
@pytest.mark.parametrize("eight_bits", [False, True], ids=["whole", "int8"])
def test_a_row_does_not_depend_on_the_others(dtype, eight_bits):
    """Infinities and NaN in the other rows of a tile change no bit of it."""
    case = Case(20, 96, 50, 4, format="int4", group=32, int8_activations=eight_bits, **FULL)
    tensors, _ = make_inputs(case, dtype)
    clean = call(case, tensors, "triton_gpu")
    spoilt = tensors["x"].clone()
    spoilt[3, 5], spoilt[11] = float("inf"), float("nan")
    y = call(case, tensors | {"x": spoilt}, "triton_gpu")
    others = torch.tensor([t not in (3, 11) for t in range(20)])
    assert bitwise(y[others], clean[others]) and not y[11].isfinite().any()
    if eight_bits:
        assert not y[3].isfinite().any()


@pytest.mark.parametrize("need", ["x", "bias", "down", "up"])
def test_a_gradient_does_not_depend_on_which_others_are_needed(need):
    case = Case(20, 40, 50, 5, format="nf4", group=8, activation="relu", **FULL)
    tensors, dy = make_inputs(case, torch.float32)
    wanted = both_ways(call, case, tensors, dy, "triton_gpu")
    leaf = tensors[need].clone().requires_grad_()
    call(case, tensors | {need: leaf}, "triton_gpu").backward(dy)
    assert bitwise(leaf.grad, wanted[f"d{need}"])


@pytest.mark.parametrize("shape", [(0, 40, 50), (5, 0, 50), (5, 40, 0)], ids=str)
def test_an_extent_of_zero(shape):
    case = Case(*shape, 3, has_bias=True)
    T, I, O = shape
    tensors = {
        "x": torch.randn(T, I), "weight": torch.randn(O, I), "bias": torch.randn(O),
        "down": torch.randn(3, I), "up": torch.randn(O, 3),
    }  # fmt: skip
    dy = torch.randn(T, O)
    ours = both_ways(call, case, tensors, dy, "triton_gpu")
    truth = truth_of(case, tensors, dy)
    for name in truth:
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-6, atol=1e-6)


@by_dtype
def test_rounded_rows_are_those_of_the_reference(dtype):
    """Also where x is half of the row's maximum, and 63.5 may go either way."""
    x = torch.randn(40, 100).to(dtype)
    x[::2, 7] = x[::2].abs().amax(1) / 2
    x[5] = 0.0
    x[6, 3], x[7, 4] = float("inf"), float("nan")
    codes, row_scales = torch.empty(40, 100, dtype=torch.int8), torch.empty(40)
    triton_gpu.quantize_launch(x, codes, row_scales, None).run()
    wanted_codes, wanted_scales = reference.quantize_rows(x.double())
    finite = wanted_scales[:, 0].isfinite()
    assert finite.sum() == 38 and row_scales[~finite].isnan().all()
    assert torch.equal(codes[finite].double(), wanted_codes[finite])
    assert torch.equal(row_scales[finite], wanted_scales[finite, 0].float())


def test_groups_that_int8_activations_cannot_take():
    case = Case(4, 96, 50, format="int4", group=24, int8_activations=True)
    tensors, _ = make_inputs(case, torch.float32)
    with pytest.raises(RuntimeError, match="multiple of 32 inputs or one a row, got group_size 24"):
        call(case, tensors, "triton_gpu")


def test_bfloat16_is_refused_here():
    x, weight = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        ops.fused_linear(x, weight, impl="triton_gpu")


def test_results_that_are_not_wanted_are_empty():
    case = Case(5, 8, 9, 2)
    tensors, dy = make_inputs(case, torch.float32)
    problem = choose.OPERATORS["fused_linear"].problem(**tensors)
    operands = Operands(weight=tensors["weight"], down=tensors["down"], up=tensors["up"])
    hidden = torch.zeros(5, 2)
    for wants in ((True, False, False, False), (False, False, False, True)):
        found = triton_gpu.backward(dy, tensors["x"], hidden, operands, problem, wants)
        assert [t.numel() > 0 for t in found] == list(wants)
