"""The Triton kernels of a sparse delta against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself. D's product takes 16 rows, 4 entries and 16 tokens at once; of the gradient's
places whole tiles of 32 x 32 are taken where 1 in 8 has a value, else a dot product each.
"""

from dataclasses import replace

import pytest
import torch
from conftest import Target
from linear_inputs import (
    Case,
    Results,
    assert_accurate,
    gradients,
    make_inputs,
    prepared_gradients,
    random_delta,
    with_gradients,
)
from test_linear_delta import long_columns, rows_and_none
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops, settings
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.linear import reference, triton_config

TRITON = Target("triton_gpu")
by_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16), ids=lambda t: str(t).removeprefix("torch.")
)
ALL = dict(bias=True, out_scale=True)


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def bitwise(a: Results, b: Results) -> bool:
    pairs = zip(a.items(), b.items(), strict=True)
    return all(n == m and torch.equal(s, t) for (n, s), (m, t) in pairs)


def check(case, dtype):
    """y and all gradients within the rule, and the rule sees an error of 1 % in each."""
    expected = prepared_gradients(case, dtype)
    ours = gradients(TRITON, expected.inputs)
    assert_accurate(ours, expected)
    for name, result in ours.items():
        if result.any():
            spoilt = (
                Results(1.01 * result) if name == "y" else Results(ours.y, {name: 1.01 * result})
            )
            with pytest.raises(AssertionError, match=f"{name}: "):
                assert_accurate(spoilt, expected, (name,))
    return ours


CASES = {
    "one-of-everything": Case(1, 1, 1, 1, delta=1.0, **ALL),
    "nothing-divides": Case(21, 65, 33, 3, delta=0.05, **ALL),
    "dense-places": Case(21, 65, 70, delta=0.3, bias=True),
    "whole-tiles": Case(32, 64, 64, delta=0.2),
    "all-places": Case(20, 40, 34, delta=1.0),
    "one-token": Case(1, 100, 50, 4, delta=0.05),
    "three-tokens": Case(3, 100, 50, delta=0.2, bias=True),
    "everything": Case(40, 60, 50, 8, activation="relu", dropout_p=0.3, delta=0.1, **ALL),
    "bfloat16-values": Case(20, 60, 50, delta=0.1, delta_values=torch.bfloat16),
    "nf4": Case(20, 40, 34, 4, "nf4", 8, "nested", bias=True, delta=0.1),
    "int4-order": Case(20, 96, 50, 0, "int4", 32, act_order=True, delta=0.1, out_scale=True),
    "uint4-few": Case(5, 96, 50, 4, "uint4", 32, offsets=True, delta=0.2),
    "no-tokens": Case(0, 40, 50, 3, bias=True, delta=0.1),
    "no-inputs": Case(5, 0, 50, 3, bias=True, delta=0.1),
    "no-outputs": Case(5, 40, 0, 3, delta=0.1),
}


@by_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errs_at_most_twice_stock_torch(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("wanted", [2, 100])
def test_splits_add_it_once(monkeypatch, wanted):
    def split(capability, n_tiles, extent, step, is_narrow):
        n_steps = -(-extent // step)
        steps = -(-n_steps // min(wanted, n_steps))
        return -(-n_steps // steps), steps

    monkeypatch.setattr(triton_config, "split", split)
    check(Case(20, 100, 70, 20, delta=0.1, **ALL), torch.float32)
    check(Case(3, 130, 70, 4, "nf4", 32, activation="relu", delta=0.2), torch.float16)


@by_dtype
def test_a_delta_below_the_last_place_of_the_weight_counts(dtype):
    """Values 1e-5 of the weight, where what W makes of x is nothing."""
    x = torch.randn(20, 32).to(dtype)
    x = torch.stack([x, -x], 2).view(20, 64)
    weight = (1 + torch.rand(40, 32)).repeat_interleave(2, 1).to(dtype)
    delta = random_delta(40, 64, 0.2)
    delta = delta.with_values(1e-5 * delta.values)
    y = ops.fused_linear(x, weight, delta=delta, impl="triton_gpu")
    truth = x.double() @ delta.dense().double().T
    small = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert torch.allclose(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6 + small)
    assert (y != 0).double().mean() > 0.9


@pytest.mark.parametrize(
    "n_in, by_tiles", [(40_000, True), (65_536, False), (65_536, True), (70_000, True)]
)
def test_columns_past_15_and_16_bits(monkeypatch, n_in, by_tiles):
    monkeypatch.setattr(triton_config, "samples_tiles", lambda *_: by_tiles)
    wide = triton_config.Tiles(16, 16, 16384, 4, 1)  # fewer tiles for the interpreter
    for name in ("forward_tiles", "dx_tiles", "sampled_tiles"):
        monkeypatch.setattr(triton_config, name, lambda *_: wide)
    rows = triton_config.DeltaTiles(16384, 4, 4)
    monkeypatch.setattr(triton_config, "delta_tiles", lambda *_: rows)
    columns = torch.tensor([0, 255, 32_767, 32_768, 39_999, n_in - 1]).unique()
    places = torch.cat([columns, n_in * 2 + columns])
    delta = WeightDelta.from_flat(places, torch.randn(len(places)), 3, n_in)
    x, weight = torch.randn(4, n_in).requires_grad_(), torch.zeros(3, n_in)
    values = delta.values.requires_grad_()
    y = ops.fused_linear(x, weight, delta=delta, impl="triton_gpu")
    dx, dvalues = torch.autograd.grad(y, (x, values), torch.ones_like(y))
    with torch.no_grad():
        dense = delta.dense()
        assert torch.allclose(y, x @ dense.T, atol=1e-5)
        assert torch.allclose(dvalues, x.sum(0)[places % n_in], atol=1e-4)
        assert torch.allclose(dx, dense.sum(0).expand_as(dx), atol=1e-6)


@by_dtype
def test_long_columns_and_views_give_the_same_bits(dtype):
    inputs = make_inputs(CASES["everything"], dtype)
    delta = inputs.options["delta"]
    plain = gradients(TRITON, inputs)
    for other in (
        long_columns(delta),
        replace(delta, columns=delta.columns.repeat_interleave(2)[::2],
                values=delta.values.repeat_interleave(2)[::2]),
    ):  # fmt: skip
        options = {**inputs.options, "delta": other}
        views = replace(inputs, x=inputs.x.t().contiguous().t(), options=options)
        assert bitwise(gradients(TRITON, views), plain)


@by_dtype
@pytest.mark.parametrize("rows", [[], [0], [49], [0, 1, 30, 49]], ids=str)
def test_full_rows_and_empty_ones(rows, dtype):
    inputs = make_inputs(Case(20, 60, 50), dtype)
    delta = rows_and_none(50, 60, rows)
    ours = gradients(TRITON, replace(inputs, options={"delta": delta}))
    plain = gradients(TRITON, inputs)
    empty = [o for o in range(50) if o not in rows]
    assert torch.equal(ours.y[:, empty], plain.y[:, empty])
    assert ours.grads["delta"].shape == delta.values.shape
    assert torch.allclose(
        ours.grads["delta"].double(),
        reference.sampled_product(inputs.dy, inputs.x, delta.rows(), delta.wide_columns()),
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


@by_dtype
def test_other_tokens_do_not_matter(dtype):
    inputs = make_inputs(Case(40, 60, 50, delta=0.2), dtype)
    before = gradients(TRITON, inputs, ("x",))
    x = inputs.x.clone()
    x[3, 11], x[7] = float("inf"), float("nan")
    after = gradients(TRITON, replace(inputs, x=x), ("x",))
    rest = torch.tensor([t not in (3, 7) for t in range(40)])
    assert torch.equal(after.y[rest], before.y[rest])
    assert torch.equal(after.grads["x"], before.grads["x"])


def test_eight_bit_activations_do_not_reach_the_delta():
    case = Case(20, 64, 50, 3, "int8", delta=0.1, **ALL)
    inputs = make_inputs(case, torch.float32)
    options = {**inputs.options, "int8_activations": True}
    ours = ops.fused_linear(inputs.x, inputs.weight, impl="triton_gpu", **options)
    truth = ops.fused_linear(inputs.x, inputs.weight, impl="reference", **options)
    assert torch.allclose(ours, truth, atol=1e-4)


@by_dtype
@pytest.mark.parametrize("by_tiles", [False, True], ids=["entries", "tiles"])
@pytest.mark.parametrize("tokens", [0, 1, 17, 33, 70])
def test_sampled_products(monkeypatch, tokens, by_tiles, dtype):
    monkeypatch.setattr(triton_config, "samples_tiles", lambda *_: by_tiles)
    dy, x = torch.randn(tokens, 60).to(dtype), torch.randn(tokens, 70).to(dtype)
    for share in (0.02, 0.4):
        delta = random_delta(60, 70, share)
        places = delta.rows(), delta.wide_columns()
        found = ops.sampled_product(dy, x, delta, impl="triton_gpu")
        truth = reference.sampled_product(dy, x, *places)
        terms = reference.sampled_product(dy.abs(), x.abs(), *places)
        stock = (dy.float().T @ x.float())[places]
        assert found.dtype == torch.float32
        assert_errs_at_most_twice_stock("products", found, stock, truth, terms)
        if tokens:
            with pytest.raises(AssertionError, match="products: "):
                assert_errs_at_most_twice_stock("products", 1.01 * found, stock, truth, terms)


def test_a_group_of_layers():
    """q, k and v with a delta each, as separate calls make them."""
    x = torch.randn(20, 40)
    weights, deltas = (
        [torch.randn(n, 40) for n in (30, 20)],
        [random_delta(n, 40, 0.1) for n in (30, 20)],
    )
    layers = [ops.LinearLayer(w, delta=d) for w, d in zip(weights, deltas, strict=True)]
    together = ops.linear_group(x, layers, impl="triton_gpu")
    for y, w, d in zip(together, weights, deltas, strict=True):
        assert torch.equal(y, ops.fused_linear(x, w, delta=d, impl="triton_gpu"))


def test_only_values_train():
    inputs = make_inputs(Case(20, 40, 50, delta=0.1), torch.float32)
    both = gradients(TRITON, inputs, ("x", "delta"))
    alone = with_gradients(
        lambda i: ops.fused_linear(i.x, i.weight, impl="triton_gpu", **i.options),
        inputs,
        ("delta",),
    )
    assert torch.equal(both.grads["delta"], alone.grads["delta"])
