"""Sparse deltas of a weight: values and gradients, what small ones do, what is refused."""

import random
import sys
from dataclasses import replace

import pytest
import torch
from linear_inputs import (
    DENSE,
    DTYPES,
    GRADIENTS,
    Case,
    Prepared,
    assert_accurate,
    bitwise,
    by_reference,
    decoded,
    dtype_name,
    gradients,
    magnitudes,
    make_inputs,
    move,
    prepared_gradients,
    random_delta,
    random_packed,
    require,
    run,
    unfused,
    wide,
    with_dtypes,
    with_gradients,
)
from memory_probes import allocations, peak_growth_bytes
from test_linear_fuzz import call, sparse
from test_linear_gradients import LAYOUTS, OF_TORCH
from yardstick import assert_errs_at_most_twice_stock

from tilewright import choose, ops
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.linear import cpp_cpu, reference

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

ALL = dict(bias=True, out_scale=True)
CASES, IN_TURN = {}, {}
# one token after another, tokens in lanes, blocks of 48 or 32, items of 512, 1024 at once
for tokens in (1, 2, 3, 4, 5, 9, 16, 17, 48, 49, 97):
    CASES[f"T{tokens}-dense"] = Case(tokens, 60, 70, 5, delta=0.2, **ALL)
    CASES[f"T{tokens}-nf4"] = Case(tokens, 60, 70, 5, "nf4", 8, bias=True, delta=0.2)
for tokens in (511, 513, 1025, 1100):
    IN_TURN[f"T{tokens}-dense"] = Case(tokens, 24, 30, bias=True, delta=0.3)
    IN_TURN[f"T{tokens}-int4"] = Case(tokens, 24, 30, 3, "int4", 8, delta=0.3)
for n, n_out in enumerate((1, 2, 15, 16, 17, 63, 65, 257, 513)):
    IN_TURN[f"O{n_out}-dense"] = Case(3 + 50 * (n % 2), 20, n_out, delta=0.3, bias=True)
for n, n_in in enumerate((1, 7, 8, 9, 130, 257, 511, 513)):
    IN_TURN[f"I{n_in}-uint4"] = Case(
        3 + 50 * (n % 2), n_in, 30, 4 * (n % 2), "uint4", 32, offsets=True, delta=0.3
    )
for n, share in enumerate((1e-3, 0.01, 0.5, 1.0)):
    IN_TURN[f"share-{share}"] = Case(60, 70, 50, delta=share)
    IN_TURN[f"share-{share}-few"] = Case(5 - n, 70, 50, 0, "int8", delta=share)
CASES |= {
    "everything-dense": Case(60, 60, 50, 8, **ALL, activation="relu", dropout_p=0.3, delta=0.2),
    "everything-packed": Case(60, 60, 50, 8, "nf4", 8, "nested", True, True, **ALL,
                              activation="relu", dropout_p=0.3, delta=0.2),
    "everything-few": Case(4, 200, 150, 8, "nf4", 8, "nested", True, True, **ALL,
                           activation="relu", delta=0.2),
    "act-order": Case(60, 130, 70, 0, "int4", 32, act_order=True, delta=0.1),
    "bfloat16-values": Case(60, 60, 50, delta=0.2, delta_values=torch.bfloat16),
    "bfloat16-values-few": Case(3, 60, 50, 0, "fp8", delta=0.2, delta_values=torch.bfloat16),
    "3-D": Case(84, 40, 50, 4, lead=(6, 2, 7), **ALL, delta=0.1),
}  # fmt: skip


@with_dtypes(CASES, IN_TURN)
def test_errs_at_most_twice_stock_torch(impl, case, dtype):
    """Stock: a linear over the weight with the delta added, and rounded to the dtype of x."""
    expected = prepared_gradients(case, dtype)
    ours = gradients(impl, expected.inputs)
    values = expected.inputs.options["delta"].values
    assert ours.grads["delta"].shape == values.shape and ours.grads["delta"].dtype == values.dtype
    assert_accurate(ours, expected)


@by_dtype
@pytest.mark.parametrize("case", ["T97-dense", "T97-nf4", "T3-nf4", "act-order"])
def test_the_rule_fails_a_delta_spoilt_by_one_percent(case, dtype):
    case = CASES[case].but(rank=0, bias=False, out_scale=False, delta=0.2)
    expected = prepared_gradients(case, dtype)
    delta = expected.inputs.options["delta"]

    def spoilt(live):
        off = delta.with_values(1.01 * delta.values)
        return ops.fused_linear(live.x, live.weight, impl="cpp_cpu", delta=off)

    ours = with_gradients(spoilt, expected.inputs, ("x",))
    for name in ("y", "x"):
        with pytest.raises(AssertionError, match=f"{name}: rms error"):
            assert_accurate(ours, expected, (name,))


@by_dtype
def test_the_rule_fails_a_gradient_spoilt_by_one_percent(monkeypatch, dtype):
    expected = prepared_gradients(CASES["T97-dense"].but(delta_values=torch.float32), dtype)
    right = cpp_cpu.sampled_product
    monkeypatch.setattr(cpp_cpu, "sampled_product", lambda *a: 1.01 * right(*a))
    ours = with_gradients(
        lambda i: ops.fused_linear(i.x, i.weight, impl="cpp_cpu", **i.options), expected.inputs
    )
    with pytest.raises(AssertionError, match="delta: rms error"):
        assert_accurate(ours, expected, ("delta",))


@by_dtype
@pytest.mark.parametrize("tokens", [1, 2, 7, 60])
@pytest.mark.parametrize("format", [DENSE, "int8"])
def test_a_delta_below_the_last_place_of_the_weight_counts(impl, tokens, format, dtype):
    """Values 1e-5 of the weights', which a sum rounded to 16 bits would lose. Each input has a
    neighbour that takes back what W makes of it, so that y is D x and nothing else."""
    x = torch.randn(tokens, 32).to(dtype)
    x = torch.stack([x, -x], dim=2).view(tokens, 64)
    if format == DENSE:
        weight = (1 + torch.rand(40, 32)) * torch.randn(40, 32).sign()
        weight = weight.repeat_interleave(2, 1).to(dtype)
    else:
        weight = random_packed("int8", 40, 64)
        codes = weight.codes.view(3, 16, 16, 4)  # a line is 4 inputs
        weight = replace(weight, codes=codes[..., [0, 0, 2, 2]].reshape(3, 16, 64).contiguous())
    delta = random_delta(40, 64, 0.2)
    delta = delta.with_values(1e-5 * decoded(weight).float().abs().mean() * delta.values)
    if format == DENSE and dtype != torch.float32:
        assert torch.equal((weight.float() + delta.dense()).to(dtype), weight), "would be seen"
    require(impl, x, weight, delta=delta)
    y = ops.fused_linear(*move([x, weight], impl.device), delta=move(delta, impl.device),
                         impl=impl.name).cpu()  # fmt: skip
    base = ops.fused_linear(x, weight, impl="reference")
    truth = x.double() @ delta.dense().double().T
    # what is left of W in float32 is far below D
    floor = 64 * torch.finfo(torch.float32).eps * decoded(weight).abs().max().item()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert base.abs().max() == 0
    assert torch.allclose(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=floor + smallest)
    assert (y != 0).double().mean() > 0.9


WIDE = {"short": 40_000, "as-wide-as-short-goes": 65_536, "long": 70_000}


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize("n_in", WIDE.values(), ids=WIDE)
def test_columns_past_15_and_16_bits(kernel_once, n_in, tokens):
    """D alone: W is nothing."""
    columns = torch.tensor([0, 255, 32_767, 32_768, 39_999, n_in - 1]).unique()
    places = torch.cat([columns, n_in * 2 + columns])
    delta = WeightDelta.from_flat(places, torch.randn(len(places)), 3, n_in)
    assert delta.columns.dtype == (torch.int32 if n_in > 65_536 else torch.int16)
    assert torch.equal(delta.places(), places)
    x, weight = torch.randn(tokens, n_in), torch.zeros(3, n_in)
    require(kernel_once, x, weight, delta=delta)
    leaves = x.requires_grad_(), delta.values.requires_grad_()
    y = ops.fused_linear(x, weight, delta=delta, impl=kernel_once.name)
    dx, dvalues = torch.autograd.grad(y, leaves, torch.ones_like(y))
    with torch.no_grad():
        expected = torch.zeros(tokens, 3)
        for n, place in enumerate(places.tolist()):
            expected[:, place // n_in] += delta.values[n] * x[:, place % n_in]
        assert torch.allclose(y, expected, atol=1e-5)
        assert torch.allclose(dvalues, x.sum(0)[places % n_in], atol=1e-4)
        assert torch.allclose(dx, delta.dense().sum(0).expand_as(dx), atol=1e-6)
        assert (dx != 0).sum() == tokens * len(columns)


def long_columns(delta: WeightDelta) -> WeightDelta:
    return replace(delta, columns=delta.wide_columns().int())


@by_dtype
@pytest.mark.parametrize("case", ["T97-dense", "T3-nf4"])
def test_long_columns_give_the_same_bits(impl, case, dtype):
    inputs = make_inputs(CASES[case], dtype)
    assert inputs.options["delta"].columns.dtype == torch.int16
    options = {**inputs.options, "delta": long_columns(inputs.options["delta"])}
    short, long = gradients(impl, inputs), gradients(impl, replace(inputs, options=options))
    for name, t in short.items():
        assert bitwise(t, dict(long.items())[name]), name


@pytest.mark.parametrize("tokens", [1, 5, 60])
@pytest.mark.parametrize("act_order", [False, True])
def test_eight_bit_activations_do_not_reach_the_delta(impl, tokens, act_order):
    case = Case(tokens, 64, 50, 3, "int8", act_order=act_order, **ALL)
    inputs = make_inputs(case, torch.float32)
    delta = random_delta(50, 64, 0.1)
    options = {**inputs.options, "int8_activations": True}
    require(impl, inputs.x, inputs.weight, delta=delta, **options)

    def output(given, **more):
        arguments = move([inputs.x, inputs.weight], impl.device)
        there = {n: move(o, impl.device) for n, o in {**options, **more}.items()}
        return ops.fused_linear(*arguments, impl=given, **there).cpu().double()

    of_delta = inputs.x.double() @ delta.dense().double().T * options["out_scale"].double()
    both = output(impl.name, delta=move(delta, impl.device))
    assert torch.allclose(both - output(impl.name), of_delta, atol=1e-4)
    assert torch.allclose(both, output("reference", delta=delta), atol=1e-4)


def rows_and_none(n_out, n_in, rows) -> WeightDelta:
    """These rows are full, the others empty."""
    places = (torch.tensor(rows, dtype=torch.int64)[:, None] * n_in + torch.arange(n_in)).flatten()
    return WeightDelta.from_flat(places, torch.randn(len(places)), n_out, n_in)


@by_dtype
@pytest.mark.parametrize("tokens", [1, 3, 60])
@pytest.mark.parametrize("rows", [[], [0], [49], [0, 1, 30, 49]], ids=str)
def test_full_rows_and_empty_ones(impl, tokens, rows, dtype):
    inputs = make_inputs(Case(tokens, 60, 50), dtype)
    delta = rows_and_none(50, 60, rows)
    with_it = replace(inputs, options={"delta": delta})
    ours, plain = gradients(impl, with_it), gradients(impl, inputs)
    empty = [o for o in range(50) if o not in rows]
    assert bitwise(ours.y[:, empty], plain.y[:, empty])
    assert ours.grads["delta"].shape == delta.values.shape
    stock = with_gradients(unfused, with_it)
    truth, terms = (with_gradients(by_reference, f(with_it)) for f in (wide, magnitudes))
    assert_accurate(ours, Prepared(with_it, stock, truth, terms))


EMPTY = {
    "no-tokens": Case(0, 40, 50, 3, **ALL, delta=0.1),
    "no-tokens-packed": Case(0, 40, 50, 3, "int4", 8, bias=True, delta=0.1),
    "no-tokens-3-D": Case(0, 40, 50, lead=(2, 0, 3), delta=0.1),
    "no-inputs": Case(20, 0, 50, 3, bias=True, delta=0.1),
    "no-outputs": Case(20, 40, 0, 3, bias=True, delta=0.1),
    "no-inputs-few": Case(2, 0, 50, delta=0.1),
    "no-outputs-few": Case(2, 40, 0, delta=0.1),
}


@by_dtype
@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_an_extent_of_nothing(impl, case, dtype):
    expected = prepared_gradients(case, dtype)
    ours = gradients(impl, expected.inputs)
    assert_accurate(ours, expected)
    assert not ours.grads["delta"].any()


# --- the same bits, rows apart, memory ---

STABLE = {
    "dense": Case(150, 130, 290, 9, bias=True, delta=0.2),
    "nf4": Case(150, 130, 290, 0, "nf4", 32, "nested", act_order=True, delta=0.2),
    "few": Case(5, 300, 330, 9, "uint4", 64, offsets=True, bias=True, delta=0.2),
    "one": Case(1, 300, 330, 0, "int8", delta=0.4),
    "many-tokens": Case(1100, 40, 60, 4, "int4", 8, delta=0.2),
}
by_case = pytest.mark.parametrize("case", STABLE.values(), ids=STABLE)


@by_dtype
@by_case
def test_any_number_of_threads_gives_the_same_bits(kernel, case, dtype):
    inputs = make_inputs(case, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(kernel, inputs)
        for n in (2, 3, 5):
            torch.set_num_threads(n)
            again = dict(gradients(kernel, inputs).items())
            for name, t in alone.items():
                assert name in OF_TORCH or bitwise(t, again[name]), (name, n)
    finally:
        torch.set_num_threads(before)


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["T97-dense", "act-order", "T5-nf4"])
def test_strided_inputs_and_dy_give_the_same_bits(impl, case, layout, dtype):
    inputs = make_inputs(CASES[case], dtype)
    plain = dict(gradients(impl, inputs).items())
    weight = layout(inputs.weight) if CASES[case].format == DENSE else inputs.weight
    delta = inputs.options["delta"]
    apart = replace(delta, columns=delta.columns.repeat_interleave(2)[::2],
                    values=delta.values.repeat_interleave(2)[::2])  # fmt: skip
    views = replace(inputs, x=layout(inputs.x), weight=weight,
                    options={**inputs.options, "delta": apart})  # fmt: skip
    for name, t in gradients(impl, views, dy=layout(inputs.dy).to(impl.device)).items():
        assert name in OF_TORCH or bitwise(t, plain[name]), name


@by_dtype
@pytest.mark.parametrize("axes", ["all", "tokens"])
def test_an_expanded_upstream_gradient(impl, axes, dtype):
    inputs = make_inputs(CASES["T97-nf4"], dtype)
    narrow = {"all": inputs.dy[:1, :1], "tokens": inputs.dy[:1]}[axes]
    wide_dy = narrow.expand_as(inputs.dy).to(impl.device)
    ours, copied = (gradients(impl, inputs, dy=dy) for dy in (wide_dy, wide_dy.contiguous()))
    for name, t in ours.items():
        assert bitwise(t, dict(copied.items())[name]), name


@by_dtype
@pytest.mark.parametrize("case", ["dense", "nf4", "few", "many-tokens"])
def test_a_wild_activation_stays_in_its_row(kernel, case, dtype):
    inputs = make_inputs(STABLE[case], dtype)
    before = gradients(kernel, inputs, ("x",))
    x = inputs.x.clone()
    x[3, 11] = float("inf")
    after = gradients(kernel, replace(inputs, x=x), ("x",))
    rest = torch.arange(len(x)) != 3
    assert not after.y[3].isfinite().any()
    assert bitwise(after.y[rest], before.y[rest])
    assert bitwise(after.grads["x"][rest], before.grads["x"][rest])


@by_dtype
@pytest.mark.parametrize("case", ["dense", "nf4"])
def test_other_tokens_do_not_matter(kernel, case, dtype):
    inputs = make_inputs(STABLE[case], dtype)
    whole = gradients(kernel, inputs, ("x",))
    for rows in (slice(0, 33), slice(3, 60), [149, 0, 77] * 11):
        part = replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows])
        some = gradients(kernel, part, ("x",))
        assert bitwise(some.y, whole.y[rows])
        assert bitwise(some.grads["x"], whole.grads["x"][rows])


@by_dtype
@pytest.mark.parametrize("format", [DENSE, "nf4"])
def test_nothing_of_the_weights_size_is_allocated(kernel_once, format, dtype):
    if kernel_once.device != "cpu":
        pytest.skip("reads the profiler's record of the CPU's allocator")
    group = 64 * (format != DENSE)
    inputs = make_inputs(Case(40, 512, 768, 0, format, group, delta=0.01), dtype)
    gradients(kernel_once, inputs, ("x", "delta"))
    blocks = allocations(lambda: gradients(kernel_once, inputs, ("x", "delta")))
    assert sum(blocks) > inputs.x.nbytes + inputs.dy.nbytes, "the profiler saw nothing"
    assert max(blocks) <= 4 * inputs.dy.numel() < 512 * 768


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_training_takes_little_beside_the_tokens(kernel_once):
    """All memory, the kernels' own as well: of a weight whose gradient would take 64 MiB in
    float32, a training step of 1 % of it takes less than a quarter of that beside what it returns:
    tokens turned, D's entries, and a panel for each thread."""
    if kernel_once.device != "cpu":
        pytest.skip("measured by the allocator in the test above")
    x = torch.randn(64, 4096).bfloat16().requires_grad_()
    weight, delta = random_packed("nf4", 4096, 4096, 64), random_delta(4096, 4096, 0.01)
    delta.values.requires_grad_()
    delta.expect_whole("test")
    results = []

    def train(weight=weight, delta=delta):
        y = ops.fused_linear(x, weight, delta=delta, impl=kernel_once.name)
        results.append((y, *torch.autograd.grad(y, (x, delta.values), torch.ones_like(y))))

    small = random_delta(16, 4096, 0.01)
    small.values.requires_grad_()
    train(random_packed("nf4", 16, 4096, 64), small)  # code is in memory, threads are there
    results.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        growth = peak_growth_bytes(train)
    finally:
        torch.set_num_threads(before)
    returned = sum(t.nbytes for t in results[0])
    assert growth - returned < 0.25 * 4 * 4096 * 4096, f"{growth / 2**20:.1f} MiB"


@pytest.mark.parametrize("trained", [("x",), ("x", "delta")])
def test_x_is_kept_for_trained_values_alone(kernel_once, trained):
    inputs = make_inputs(Case(40, 64, 96, 0, "nf4", 64, delta=0.1), torch.float32)
    saved = []

    def keep(t):
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with_gradients(lambda i: run(kernel_once, i), inputs, trained)
    assert (inputs.x.data_ptr() in saved) == ("delta" in trained)


@pytest.mark.parametrize("batch", range(4))
def test_random_calls_of_whole_numbers(impl, batch):
    """Those of test_linear_fuzz.py, and a delta: the truth rounded once, forward and backward."""
    for seed in range(batch * 10, batch * 10 + 10):
        case, inputs = call(seed)
        if "downs" in inputs.options:
            continue
        pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        dense = sparse(generator, case.n_out, case.n_in, share=pick.choice((0.0, 0.02, 0.2)))
        places = dense.flatten().nonzero()[:, 0]
        kind = pick.choice((torch.float32, torch.bfloat16))
        delta = WeightDelta.from_flat(places, dense.flatten()[places].to(kind), *dense.shape)
        if pick.random() < 0.3:
            delta = long_columns(delta)
        inputs = replace(inputs, options={**inputs.options, "delta": delta})
        low = inputs.x.dtype != torch.float32
        names = [n for n in GRADIENTS if n in inputs.named and not (low and n == "out_scale")]
        exact = replace(
            inputs, x=inputs.x.double(), weight=decoded(inputs.weight).double(),
            options={**inputs.options, "delta": delta.with_values(delta.values.double())},
        )  # fmt: skip
        truth = dict(with_gradients(by_reference, exact, names).items())
        for name, result in gradients(impl, inputs, names).items():
            rounded = truth[name].to(result.dtype)
            assert torch.equal(result.cpu(), rounded), f"call({seed}): {name}, {case}, {delta.nnz}"


def test_the_reference_passes_gradcheck():
    inputs = make_inputs(Case(5, 6, 4, 3, **ALL, delta=0.3), torch.float32)
    delta = inputs.options["delta"]
    names = list(inputs.named)

    def layer(*tensors):
        given = dict(zip(names, tensors, strict=True))
        x, weight, values = (given.pop(n) for n in ("x", "weight", "delta"))
        options = {**inputs.options, **given, "delta": delta.with_values(values)}
        return ops.fused_linear(x, weight, impl="reference", **options)

    leaves = [t.detach().double().requires_grad_() for t in inputs.named.values()]
    assert torch.autograd.gradcheck(layer, leaves)


# --- sampled products by themselves ---


@by_dtype
@pytest.mark.parametrize("tokens", [0, 1, 31, 64, 65, 300, 1030])
def test_sampled_products(impl, tokens, dtype):
    dy, x = torch.randn(2, tokens, 60).to(dtype), torch.randn(2, tokens, 70).to(dtype)
    delta = random_delta(60, 70, 0.2)
    places = delta.rows(), delta.wide_columns()
    there = move([dy, x], impl.device), move(delta, impl.device)
    impl.require("sampled_product", *there[0], there[1])
    found = ops.sampled_product(*there[0], there[1], impl=impl.name).cpu()
    flat = dy.flatten(0, 1), x.flatten(0, 1)
    truth = reference.sampled_product(*flat, *places)
    terms = reference.sampled_product(*(t.abs() for t in flat), *places)
    stock = (flat[0].float().T @ flat[1].float())[places]
    assert found.dtype == torch.float32
    assert_errs_at_most_twice_stock("products", found, stock, truth, terms)
    if tokens:
        with pytest.raises(AssertionError, match="rms error"):
            assert_errs_at_most_twice_stock("products", 1.01 * found, stock, truth, terms)


# --- the registered operators ---


@pytest.fixture
def compiler(clean_memory):
    """Without what other tests have compiled, which counts towards a function's limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("case", ["everything-packed", "T5-nf4", "T97-dense"])
def test_compiles_into_one_graph_with_the_same_bits(case):
    inputs = make_inputs(CASES[case], torch.float32)

    def layer(i):
        return ops.fused_linear(i.x, i.weight, **i.options)

    def compiled(i):
        return torch.compile(ops.fused_linear, fullgraph=True, backend="aot_eager")(
            i.x, i.weight, **i.options
        )

    eager, traced = with_gradients(layer, inputs), with_gradients(compiled, inputs)
    for name, t in eager.items():
        assert bitwise(t, dict(traced.items())[name]), name


@pytest.mark.usefixtures("clean_memory")
def test_opcheck():
    inputs = make_inputs(Case(20, 24, 30, delta=0.2), torch.float32)
    d = inputs.options["delta"]
    torch.library.opcheck(
        torch.ops.tilewright.sampled_product.default,
        (inputs.dy, inputs.x, d.row_offsets, d.columns, "auto"),
    )


@pytest.mark.usefixtures("compiler")
def test_a_traced_call_looks_at_the_places_before_it_reads():
    """Where a graph compiler hid the values from the first look."""
    x, weight, delta = torch.zeros(5, 16), torch.zeros(8, 16), random_delta(8, 16, 0.1)
    compiled = torch.compile(ops.fused_linear, fullgraph=True, backend="aot_eager")
    compiled(x, weight, delta=delta)
    stray = replace(delta, columns=torch.full_like(delta.columns, 16))
    with pytest.raises(ValueError, match="delta has column 16, need 0 <= column < I = 16"):
        compiled(x, weight, delta=stray)


def test_explain_and_doctor_know_the_operator():
    for label, problem in choose.OPERATORS["sampled_product"].sample().items():
        assert choose.explain_problem("sampled_product", problem).chosen is not None, label
