"""Several sparse deltas in one call, beside low-rank updates: each row meets its own adapter's."""

import re
from dataclasses import replace

import pytest
import torch
from linear_inputs import (
    DTYPES,
    Case,
    bitwise,
    by_reference,
    dtype_name,
    magnitudes,
    make_inputs,
    move,
    random_delta,
    unfused,
    wide,
)
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops
from tilewright.ops.common.sparse_delta import WeightDelta

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# adapters: a low-rank update, a delta, both, a delta of other values, one nobody has
N_IN, N_OUT, RANKS = 40, 50, (5, 0, 3, 0, 2)
DELTAS = (None, 0.2, 0.1, 1.0, 0.3)
BASES = {
    "dense": Case(56, N_IN, N_OUT, bias=True),
    "nf4": Case(56, N_IN, N_OUT, format="nf4", group=8, act_order=True),
    "int8-few": Case(9, N_IN, N_OUT, format="int8", bias=True),
    "dense-few": Case(3, N_IN, N_OUT),
    "two": Case(2, N_IN, N_OUT, format="int4", group=8),
    "one": Case(1, N_IN, N_OUT, bias=True),
    "many-rows": Case(300, N_IN, N_OUT, bias=True),
}
by_base = pytest.mark.parametrize("case", BASES.values(), ids=BASES)


def adapters(dtype):
    """downs, ups, scales and deltas."""
    kinds = torch.float32, torch.bfloat16
    downs = [torch.randn(r, N_IN).to(dtype) / N_IN**0.5 if r else None for r in RANKS]
    ups = [torch.randn(N_OUT, r).to(dtype) / r**0.5 if r else None for r in RANKS]
    deltas = [share and random_delta(N_OUT, N_IN, share, kinds[a % 2])
              for a, share in enumerate(DELTAS)]  # fmt: skip
    return downs, ups, [1.0, -0.5, 0.7, 1.0, 2.0], deltas


def rows_of(tokens: int) -> torch.Tensor:
    """The adapter of each row: -1, 0, 1, 2, 3 in turn."""
    return (torch.arange(tokens) % 5 - 1).int()


def call(target, inputs, of_adapters, rows):
    downs, ups, scales, deltas = move(list(of_adapters), target.device)
    deltas = [move(d, target.device) for d in deltas]
    function, here = ops.multi_lora_linear, move([inputs.x, inputs.weight, rows], target.device)
    bias = move(inputs.options.get("bias"), target.device)
    options = dict(scales=scales, deltas=deltas, bias=bias, impl=target.name)
    return function(*here[:2], downs, ups, here[2], **options).cpu()


@pytest.fixture
def cpu_impl(impl):
    if impl.name == "triton_gpu":
        pytest.skip("triton_gpu takes one sparse delta for all rows")
    return impl


def of_one(inputs, of_adapters, adapter: int):
    """The call of fused_linear with this adapter for every row."""
    downs, ups, scales, deltas = of_adapters
    options = dict(inputs.options)
    if adapter >= 0 and downs[adapter] is not None:
        options.update(down=downs[adapter], up=ups[adapter], scale=scales[adapter],
                       activation="none")  # fmt: skip
    if adapter >= 0 and deltas[adapter] is not None:
        options["delta"] = deltas[adapter]
    return replace(inputs, options=options)


@by_dtype
@by_base
def test_a_row_is_what_its_adapter_alone_makes_of_it(cpu_impl, case, dtype):
    inputs, of_adapters, rows = make_inputs(case, dtype), adapters(dtype), rows_of(case.tokens)
    ours = call(cpu_impl, inputs, of_adapters, rows)
    for adapter in rows.unique().tolist():
        one, mine = of_one(inputs, of_adapters, adapter), rows == adapter
        results = unfused(one), by_reference(wide(one)), by_reference(magnitudes(one))
        mine_of = [t[mine] for t in results]
        assert_errs_at_most_twice_stock(f"adapter {adapter}", ours[mine], *mine_of)
        with pytest.raises(AssertionError, match=f"adapter {adapter}: "):
            assert_errs_at_most_twice_stock(f"adapter {adapter}", 1.01 * ours[mine], *mine_of)


@by_dtype
@by_base
def test_deltas_spoilt_by_one_percent_are_seen(case, dtype, kernel_once):
    if kernel_once.name == "triton_gpu":
        pytest.skip("triton_gpu takes one sparse delta for all rows")
    inputs, of_adapters = make_inputs(case, dtype), adapters(dtype)
    rows = torch.full((case.tokens,), 3, dtype=torch.int32)
    right = of_one(inputs, of_adapters, 3)
    spoilt = [d and d.with_values(1.01 * d.values.float()) for d in of_adapters[3]]
    ours = call(kernel_once, inputs, (*of_adapters[:3], spoilt), rows)
    results = unfused(right), by_reference(wide(right)), by_reference(magnitudes(right))
    with pytest.raises(AssertionError, match="y: "):
        assert_errs_at_most_twice_stock("y", ours, *results)


@pytest.mark.parametrize("case", ["dense", "nf4", "int8-few", "many-rows"])
def test_other_rows_and_their_adapters_do_not_matter(cpu_impl, case):
    """Neither their values nor how many of them share the adapter; nor do threads."""
    if cpu_impl.name == "reference":
        pytest.skip("a promise of the kernels")
    inputs, of_adapters = make_inputs(BASES[case], torch.bfloat16), adapters(torch.bfloat16)
    rows = rows_of(BASES[case].tokens)
    before, mine = call(cpu_impl, inputs, of_adapters, rows), rows == 2
    x = torch.where(mine[:, None], inputs.x, float("nan"))
    for other in (-1, 2, 3):
        others = torch.where(mine, rows, other).int()
        after = call(cpu_impl, replace(inputs, x=x), of_adapters, others)
        assert bitwise(after[mine], before[mine]), other
        assert after[~mine].isnan().all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert bitwise(call(cpu_impl, inputs, of_adapters, rows), before)
    finally:
        torch.set_num_threads(threads)


def test_stacked_once_and_strided_rows_give_the_same_bits(kernel_once):
    if kernel_once.name == "triton_gpu":
        pytest.skip("triton_gpu takes one sparse delta for all rows")
    inputs, (downs, ups, scales, deltas) = (
        make_inputs(BASES["dense"], torch.float32),
        adapters(torch.float32),
    )
    given = dict(scales=scales, impl=kernel_once.name)
    rows = rows_of(56)
    plain = ops.multi_lora_linear(inputs.x, inputs.weight, downs, ups, rows, deltas=deltas, **given)
    stack = WeightDelta.stacked(deltas, N_OUT, N_IN)
    apart = inputs.x.repeat_interleave(2, 1)[:, ::2].view(7, 8, N_IN)
    y = ops.multi_lora_linear(
        apart, inputs.weight, downs, ups, rows.view(7, 8), deltas=stack, **given
    )
    assert bitwise(y.view(56, N_OUT), plain)
    stack.row_offsets.diff()  # what a stack says of itself
    assert stack.shape == (5 * N_OUT, N_IN) and stack.nnz == sum(d.nnz for d in deltas if d)
    assert torch.equal(stack.dense()[N_OUT : 2 * N_OUT], deltas[1].dense().float())
    object.__delattr__(stack, "_is_whole")
    stack.expect_whole("test")


def test_deltas_alone_and_extents_of_nothing(cpu_impl):
    delta = random_delta(N_OUT, N_IN, 0.2)
    weight = torch.randn(N_OUT, N_IN)
    for tokens in (0, 1, 20):
        x, rows = torch.randn(tokens, N_IN), torch.zeros(tokens, dtype=torch.int32)
        arguments = [None], [None], rows
        y = ops.multi_lora_linear(x, weight, *arguments, scales=[1.0], deltas=[delta],
                                  impl=cpu_impl.name)  # fmt: skip
        wanted = ops.fused_linear(x, weight, delta=delta, impl="reference")
        assert torch.allclose(y, wanted, atol=1e-5), tokens


x, weight, rows = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, dtype=torch.int32)
good = WeightDelta.from_flat(torch.tensor([3]), torch.ones(1), 4, 8)
other = WeightDelta.from_flat(torch.tensor([3]), torch.ones(1), 8, 4)
REFUSED = {
    "count": (dict(deltas=[good, good]), "2 deltas and 1 downs, need as many"),
    "shape": (dict(deltas=[other]), "deltas[0] is of shape (8, 4), need (4, 8)"),
    "stack": (dict(deltas=WeightDelta.stacked([good, good], 4, 8)),
              "delta is of shape (8, 8), need (4, 8)"),
    "grad": (dict(deltas=[good.with_values(torch.ones(1, requires_grad=True))]),
             "deltas of several adapters have no gradient"),
    "neither": ({}, "downs[0] is None, need downs and ups of each adapter"),
    "row": (dict(deltas=[good], row_adapters=rows + 1), "row_adapters[0] is 1, need -1 for none"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_refusals(options, message):
    given = {"row_adapters": rows, **options}
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.multi_lora_linear(x, weight, [None], [None], scales=[1.0], **given)
    assert str(refusal.value).startswith("multi_lora_linear: ")
