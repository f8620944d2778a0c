"""Several low-rank updates in one call: each row meets its own, and no other."""

from dataclasses import replace

import pytest
import torch
from linear_inputs import (
    DTYPES,
    Case,
    Inputs,
    Results,
    assert_accurate,
    bitwise,
    by_reference,
    dtype_name,
    magnitudes,
    make_inputs,
    prepared,
    random_packed,
    require,
    run,
    unfused,
    wide,
)
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

TOKENS = 56
MIXES = {  # the adapter of each row
    "distinct": torch.arange(TOKENS) % 7,
    "identical": torch.full((TOKENS,), 3),
    "uniform": torch.randint(0, 7, (TOKENS,), generator=torch.Generator().manual_seed(1)),
    "skewed": torch.where(torch.arange(TOKENS) % 8 == 0, torch.arange(TOKENS) % 7, 2),
    "zipf": torch.multinomial(1 / torch.arange(1.0, 8), TOKENS, True,
                              generator=torch.Generator().manual_seed(2)),
    "some-without": torch.arange(TOKENS) % 8 - 1,
    "all-without": torch.full((TOKENS,), -1),
}  # fmt: skip
RANKS = (1, 3, 8, 128, 16, 5, 64)
BASES = {
    "dense": Case(TOKENS, 40, 50, adapters=RANKS, bias=True),
    "nf4": Case(TOKENS, 40, 50, format="nf4", group=8, adapters=RANKS, act_order=True),
    "int8-few": Case(9, 40, 50, format="int8", adapters=RANKS, bias=True),
}
by_base = pytest.mark.parametrize("case", BASES.values(), ids=BASES)


def with_rows(inputs: Inputs, rows) -> Inputs:
    rows = rows[: inputs.x.shape[0]].int()
    return replace(inputs, options={**inputs.options, "row_adapters": rows})


def single(inputs: Inputs, adapter: int) -> Inputs:
    """The same call with this adapter for every row, by fused_linear; -1 is none."""
    o = inputs.options
    options = {n: o[n] for n in ("bias",) if n in o}
    if adapter >= 0:
        options.update(down=o["downs"][adapter], up=o["ups"][adapter], scale=o["scales"][adapter],
                       activation="none")  # fmt: skip
    return replace(inputs, options=options)


@by_dtype
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@by_base
def test_errs_at_most_twice_stock_torch(impl, case, mix, dtype):
    inputs = with_rows(make_inputs(case, dtype), mix)
    truth, terms = by_reference(wide(inputs)), by_reference(magnitudes(inputs))
    assert_errs_at_most_twice_stock("y", run(impl, inputs), unfused(inputs), truth, terms)


@by_dtype
@by_base
def test_a_row_is_what_its_adapter_alone_makes_of_it(impl, case, dtype):
    """Within the rule, for the scale is rounded into the hidden values of a mix: each row against
    the call of fused_linear with its adapter."""
    inputs = with_rows(make_inputs(case, dtype), MIXES["some-without"])
    rows = inputs.options["row_adapters"]
    ours = run(impl, inputs).cpu()
    for adapter in range(-1, len(RANKS)):
        one = single(inputs, adapter)
        mine = rows == adapter
        if mine.any():
            results = unfused(one), by_reference(wide(one)), by_reference(magnitudes(one))
            assert_errs_at_most_twice_stock(
                f"adapter {adapter}", ours[mine], *(t[mine] for t in results)
            )
            if adapter == -1:
                assert bitwise(ours[mine], run(impl, one).cpu()[mine])


@pytest.mark.parametrize("case", ["dense", "nf4"])
def test_other_rows_and_their_adapters_do_not_matter(kernel, case):
    inputs = with_rows(make_inputs(BASES[case], torch.bfloat16), MIXES["uniform"])
    before = run(kernel, inputs)
    rows = inputs.options["row_adapters"]
    mine = rows == 4
    x = torch.where(mine[:, None], inputs.x, float("nan"))
    others = torch.where(mine, rows, 6 - rows)
    others[rows == 2] = -1
    after = run(kernel, with_rows(replace(inputs, x=x), others))
    assert bitwise(after[mine], before[mine])
    assert after[~mine].isnan().all()


def test_an_infinite_adapter_spoils_its_own_hidden_values_alone(kernel_once):
    """NaN in one adapter's down: rows of other adapters stay finite, and keep their bits."""
    inputs = with_rows(make_inputs(BASES["nf4"], torch.float32), MIXES["uniform"])
    before = run(kernel_once, inputs)
    inputs.options["downs"][2].fill_(float("nan"))
    after = run(kernel_once, inputs)
    mine = inputs.options["row_adapters"] == 2
    assert after[mine].isnan().all() and bitwise(after[~mine], before[~mine])


def leaves_of(inputs: Inputs, device="cpu"):
    """x, and the adapters, as leaves; and the inputs with them."""
    o = inputs.options
    x = inputs.x.detach().to(device).requires_grad_()
    downs = [d.detach().to(device).requires_grad_() for d in o["downs"]]
    ups = [u.detach().to(device).requires_grad_() for u in o["ups"]]
    return [x, *downs, *ups], replace(inputs, x=x, options={**o, "downs": downs, "ups": ups})


@by_dtype
@pytest.mark.parametrize("mix", ["uniform", "some-without", "all-without"])
@by_base
def test_gradients(impl, case, mix, dtype):
    inputs = with_rows(make_inputs(case, dtype), MIXES[mix])
    grads = []
    for function, given in (
        (lambda i: run(impl, i), inputs), (unfused, inputs), (by_reference, wide(inputs)),
        (by_reference, magnitudes(inputs)),
    ):  # fmt: skip
        leaves, live = leaves_of(given)
        y = function(live)
        grads.append(torch.autograd.grad(y, leaves, given.dy.to(y)))
    names = ["x", *(f"downs[{n}]" for n in range(7)), *(f"ups[{n}]" for n in range(7))]
    for name, ours, stock, truth, terms in zip(names, *grads, strict=True):
        if truth.any():
            assert_errs_at_most_twice_stock(name, ours, stock, truth, terms)
        else:
            assert not ours.any(), f"{name}: no row has this adapter"


@by_dtype
def test_float32_adapters_over_a_lower_dtype_and_leading_axes(impl, dtype):
    case = Case(42, 40, 50, format="int4", group=8, adapters=(4, 9), adapter=torch.float32,
                lead=(6, 7), bias=True)  # fmt: skip
    expected = prepared(case, dtype)
    assert_accurate(Results(run(impl, expected.inputs)), expected)


@by_dtype
def test_one_adapter_in_a_mix_of_one(impl, dtype):
    case = Case(30, 40, 50, adapters=(6,))
    expected = prepared(case, dtype)
    assert_accurate(Results(run(impl, expected.inputs)), expected)


def test_adapters_of_other_dtypes_together(impl_once):
    x = torch.randn(20, 40, dtype=torch.bfloat16)
    weight = random_packed("nf4", 30, 40, 8)
    downs = [torch.randn(4, 40), torch.randn(2, 40, dtype=torch.bfloat16)]
    ups = [torch.randn(30, 4), torch.randn(30, 2, dtype=torch.bfloat16)]
    rows = torch.arange(20, dtype=torch.int32) % 2
    require(impl_once, x, weight)
    y = ops.multi_lora_linear(x, weight, downs, ups, rows, scales=[1, 2], impl=impl_once.name)
    same = ops.multi_lora_linear(
        x, weight, [d.bfloat16() for d in downs], [u.bfloat16() for u in ups], rows,
        scales=[1.0, 2.0], impl=impl_once.name,
    )  # fmt: skip
    assert bitwise(y, same)
