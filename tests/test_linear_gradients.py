"""Gradients of the linear room: accuracy, layouts, dropout drawn again, what is wanted."""

from dataclasses import replace

import pytest
import torch
from linear_inputs import (
    DENSE,
    DTYPES,
    SEED,
    Case,
    assert_accurate,
    bitwise,
    dtype_name,
    gradients,
    make_inputs,
    prepared_gradients,
    random_packed,
    require,
    run,
    unfused,
    wide,
    with_dtypes,
    with_gradients,
)

from tilewright import ops
from tilewright.ops.common.packed import FORMATS
from tilewright.ops.linear import cpp_cpu, reference

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

ALL = dict(bias=True, out_scale=True)
CASES, IN_TURN = {}, {}
# blocks of 48 or 32 tokens, up to 16 slabs of blocks, items of 512, 1024 packed ahead
for tokens in (1, 2, 5, 16, 17, 31, 32, 33, 47, 48, 49, 97):
    CASES[f"T{tokens}-dense"] = Case(tokens, 60, 70, 5, **ALL)
    CASES[f"T{tokens}-nf4"] = Case(tokens, 60, 70, 5, "nf4", 8, bias=True)
for tokens in (511, 513, 800, 1025):
    CASES[f"T{tokens}-dense"] = Case(tokens, 24, 30, 3, bias=True)
    CASES[f"T{tokens}-int4"] = Case(tokens, 24, 30, 3, "int4", 8, bias=True)
for n, n_out in enumerate((1, 2, 15, 16, 17, 83, 255, 257, 513, 1030)):  # the depth of dx
    IN_TURN[f"O{n_out}-dense"] = Case(90, 20, n_out, 4 * (n % 2), bias=True)
    IN_TURN[f"O{n_out}-int8"] = Case(90, 20, n_out, 4 * (n % 2), "int8", 8)
for n, n_in in enumerate((1, 7, 8, 9, 130, 255, 257, 511, 513)):  # the lanes of dx
    IN_TURN[f"I{n_in}-dense"] = Case(90, n_in, 30, 4 * (n % 2))
    IN_TURN[f"I{n_in}-uint4"] = Case(90, n_in, 30, 4 * (n % 2), "uint4", 32, offsets=True)
for rank in (1, 3, 8, 12, 16, 64, 256, 600):
    IN_TURN[f"R{rank}-dense"] = Case(70, 30, 40, rank)
    IN_TURN[f"R{rank}-fp4"] = Case(70, 30, 40, rank, "fp4")
for n, format in enumerate(FORMATS):
    for m, (n_in, group) in enumerate(((40, 8), (128, 64), (77, 32), (60, 0))):
        scales = (torch.float32, torch.float16, torch.bfloat16, "nested")[(n + m) % 4]
        IN_TURN[f"{format}-I{n_in}-g{group}"] = Case(
            50, n_in, 45, 3, format, group, scales, format == "uint4" or m == 1, (n + m) % 3 == 0
        )
CASES |= {
    "everything-dense": Case(60, 60, 50, 8, **ALL, activation="relu", dropout_p=0.3),
    "everything-packed": Case(60, 60, 50, 8, "nf4", 8, "nested", True, True, **ALL,
                              activation="relu", dropout_p=0.3),
    "everything-few": Case(4, 200, 150, 8, "nf4", 8, "nested", True, True, **ALL,
                           activation="relu"),
    "relu": Case(60, 60, 50, 8, activation="relu"),
    "dropout": Case(60, 130, 40, 5, dropout_p=0.5),
    "dropout-past-a-chunk": Case(50, 1030, 40, 5, dropout_p=0.1, scale=-1.0),
    "dropout-over-packed": Case(50, 130, 100, 5, "int4", 32, act_order=True, dropout_p=0.5),
    "dropout-many-tokens": Case(1030, 20, 24, 4, "fp8", dropout_p=0.5),
    "no-update": Case(60, 50, 40, bias=True),
    "no-update-packed": Case(60, 50, 40, 0, "int4", 32, bias=True),
    "3-D": Case(84, 40, 50, 4, lead=(6, 2, 7), **ALL),
    "float32-adapter": Case(60, 60, 50, 8, adapter=torch.float32),
    "float32-adapter-few": Case(4, 160, 150, 8, "nf4", 8, adapter=torch.float32),
}  # fmt: skip


@with_dtypes(CASES, IN_TURN)
def test_errs_at_most_twice_stock_torch(impl, case, dtype):
    expected = prepared_gradients(case, dtype)
    ours = gradients(impl, expected.inputs)
    for name, tensor in expected.inputs.named.items():
        assert ours.grads[name].shape == tensor.shape and ours.grads[name].dtype == tensor.dtype
    assert_accurate(ours, expected)


SPOILT = ("x", "bias", "down", "up")


@by_dtype
@pytest.mark.parametrize("what", range(4), ids=SPOILT)
@pytest.mark.parametrize("case", ["T97-dense", "T97-nf4", "dropout", "relu"])
def test_the_rule_fails_a_kernel_spoilt_by_one_percent(monkeypatch, case, what, dtype):
    case = CASES[case].but(bias=True, out_scale=False)
    expected = prepared_gradients(case, dtype)
    right = cpp_cpu.backward

    def spoilt(*args):
        found = list(right(*args))
        found[what] = found[what] * 1.01
        return tuple(found)

    monkeypatch.setattr(cpp_cpu, "backward", spoilt)
    wanted = SPOILT if case.format != DENSE else (*SPOILT, "weight")
    ours = with_gradients(
        lambda i: ops.fused_linear(i.x, i.weight, impl="cpp_cpu", **i.options),
        expected.inputs, wanted,
    )  # fmt: skip
    assert_accurate(ours, expected, set(wanted) - {SPOILT[what]})
    with pytest.raises(AssertionError, match=f"{SPOILT[what]}: rms error"):
        assert_accurate(ours, expected, (SPOILT[what],))


GRADCHECK = {
    "dense": Case(5, 6, 4, 3, **ALL),
    "relu": Case(5, 6, 4, 3, activation="relu"),
    "dropout": Case(5, 6, 4, 3, dropout_p=0.4),
    "packed": Case(5, 16, 4, 3, "nf4", 8, **ALL, act_order=True),
    "adapters": Case(6, 5, 4, adapters=(2, 1, 3), bias=True),
}


@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK)
def test_the_reference_passes_gradcheck(case):
    inputs = make_inputs(case, torch.float32)
    inputs = replace(
        wide(inputs), weight=inputs.weight.double() if case.format == DENSE else inputs.weight
    )
    names = list(inputs.named)

    def layer(*tensors):
        given = dict(zip(names, tensors, strict=True))
        x, weight = given.pop("x"), given.pop("weight", inputs.weight)
        options = {**inputs.options, **given}
        function = ops.multi_lora_linear if case.adapters else ops.fused_linear
        return function(x, weight, impl="reference", **options)

    leaves = [t.detach().requires_grad_() for t in inputs.named.values()]
    assert torch.autograd.gradcheck(layer, leaves)


# --- layouts ---


def padded(t):
    """The same values within wider rows, NaN around."""
    room = t.new_full((t.shape[0] + 2, t.shape[1] + 5), float("nan"))
    view = room[1:-1, 2:-3]
    view.copy_(t)
    return view


def every_second(t):
    room = t.new_full((t.shape[0], 2 * t.shape[1]), float("nan"))
    view = room[:, ::2]
    view.copy_(t)
    return view


def transposed(t):
    return t.T.contiguous().T


OF_TORCH = ("weight", "out_scale")  # gradients that are torch's own products and sums
LAYOUTS = (padded, every_second, transposed)
STRIDED = {"dense": CASES["T97-dense"], "packed": CASES["dropout-over-packed"]}


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", STRIDED.values(), ids=STRIDED)
def test_strided_inputs_and_dy_give_the_same_bits(impl, case, layout, dtype):
    inputs = make_inputs(case, dtype)
    plain = gradients(impl, inputs)
    options = {n: layout(o) if n in ("down", "up") else o for n, o in inputs.options.items()}
    weight = layout(inputs.weight) if case.format == DENSE else inputs.weight
    views = replace(inputs, x=layout(inputs.x), weight=weight, options=options)
    ours = gradients(impl, views, dy=layout(inputs.dy).to(impl.device))
    for name, result in ours.items():
        if name not in OF_TORCH:
            assert bitwise(result, dict(plain.items())[name]), name


@by_dtype
@pytest.mark.parametrize("axes", ["all", "tokens", "outs"])
@pytest.mark.parametrize("case", STRIDED.values(), ids=STRIDED)
def test_an_expanded_upstream_gradient(impl, case, axes, dtype):
    """dy with stride 0, as .sum() and .mean() hand it down."""
    inputs = make_inputs(case, dtype)
    narrow = {"all": inputs.dy[:1, :1], "tokens": inputs.dy[:1], "outs": inputs.dy[:, :1]}[axes]
    wide_dy = narrow.expand_as(inputs.dy).to(impl.device)
    if impl.device == "cpu":
        assert 0 in wide_dy.stride()
    ours, copied = (gradients(impl, inputs, dy=dy) for dy in (wide_dy, wide_dy.contiguous()))
    for name, result in ours.items():
        if name not in OF_TORCH:
            assert bitwise(result, dict(copied.items())[name]), name


# --- dropout ---


@by_dtype
def test_the_backward_drops_what_the_forward_dropped(impl, dtype):
    """With W = 0, down and up of ones and one output, y and dx tell which elements were kept."""
    x = torch.ones(40, 36, dtype=dtype, device=impl.device, requires_grad=True)
    weight = torch.zeros(1, 36, dtype=dtype, device=impl.device)
    down = torch.ones(1, 36, dtype=dtype, device=impl.device, requires_grad=True)
    up = torch.ones(1, 1, dtype=dtype, device=impl.device)
    options = dict(scale=1.0, dropout_p=0.5, dropout_seed=torch.tensor([SEED]))
    require(impl, x, weight, down=down, up=up, **options)
    y = ops.lora_linear(x, weight, down, up, impl=impl.name, **options)
    dx, ddown = torch.autograd.grad(y.sum(), (x, down))
    factors = reference.dropout_factors(SEED, 40, 36, 0.5)
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dx.cpu().double(), factors)
    assert torch.equal(y.detach().cpu().double()[:, 0], factors.sum(1))
    assert torch.equal(ddown.cpu().double()[0], factors.sum(0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_what_is_dropped(p):
    kept = reference.dropout_factors(SEED, 300, 333, p) > 0
    share, n = kept.double().mean().item(), kept.numel()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    other = reference.dropout_factors(SEED + (1 << 32), 300, 333, p) > 0
    both = (kept & other).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 6 * ((1 - p) ** 2 / n) ** 0.5, "seeds are not independent"


def test_a_negative_seed_and_one_without_a_high_word(impl):
    inputs = make_inputs(Case(30, 50, 20, 4, dropout_p=0.5), torch.float32)
    for seed in (-5, 5, 2**62, -(2**63)):
        options = {**inputs.options, "dropout_seed": torch.tensor([seed])}
        factors = reference.dropout_factors(seed, 30, 50, 0.5)
        seeded = replace(inputs, options=options, factors=factors)
        truth = with_gradients(unfused, wide(seeded))
        ours = gradients(impl, seeded)
        for name, result in ours.items():
            true = dict(truth.items())[name]
            assert torch.allclose(result.cpu().double(), true, atol=1e-4, rtol=1e-4), (name, seed)


def test_the_default_seed_comes_from_torch():
    inputs = make_inputs(Case(30, 50, 20, 4, dropout_p=0.5), torch.float32)
    options = {n: o for n, o in inputs.options.items() if n != "dropout_seed"}

    def draw(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return ops.fused_linear(inputs.x, inputs.weight, **options)

    first = draw(7)
    assert not bitwise(first, draw()), "drawn twice"
    assert bitwise(first, draw(7)) and not bitwise(first, draw(8))


# --- what is wanted, and how often ---


@by_dtype
@pytest.mark.parametrize("case", ["everything-dense", "everything-packed", "T5-nf4"])
def test_a_second_backward_is_the_same_and_inputs_stay(impl, case, dtype):
    inputs = make_inputs(CASES[case], dtype)
    before = [t.clone() for t in inputs.named.values()]
    packed = inputs.weight.tensors() if CASES[case].format != DENSE else {}
    packed_before = {n: t.clone() for n, t in packed.items()}
    leaves = {n: t.to(impl.device).requires_grad_() for n, t in inputs.named.items()}
    rest = {n: t for n, t in leaves.items() if n not in ("x", "weight")}
    live = replace(inputs, x=leaves["x"], weight=leaves.get("weight", inputs.weight),
                   options={**inputs.options, **rest})  # fmt: skip
    y = run(impl, live)
    dy = inputs.dy.to(impl.device)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(bitwise(a, b) for a, b in zip(first, second, strict=True))
    assert all(bitwise(a, b) for a, b in zip(before, leaves.values(), strict=True))
    assert all(bitwise(t, packed_before[n]) for n, t in packed.items())


WANTED = {
    "x": ("x",),
    "bias": ("bias",),
    "down": ("down",),
    "up": ("up",),
    "frozen-x": ("bias", "down", "up"),
    "x-and-up": ("x", "up"),
    "adapter": ("down", "up"),
}


@by_dtype
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("case", ["T97-nf4", "dropout", "everything-few"])
def test_some_gradients_alone_equal_those_of_all(impl, case, wanted, dtype):
    inputs = make_inputs(CASES[case].but(bias=True, out_scale=False), dtype)
    everything = gradients(impl, inputs, ("x", "bias", "down", "up"))
    some = gradients(impl, inputs, wanted)
    assert set(some.grads) == set(wanted) and bitwise(some.y, everything.y)
    for name in wanted:
        assert bitwise(some.grads[name], everything.grads[name]), name


def test_only_what_is_wanted_is_computed(monkeypatch):
    inputs = make_inputs(CASES["T97-nf4"], torch.float32)
    right, asked = cpp_cpu.backward, []

    def recorded(dy, x, hidden, o, p, wants):
        found = right(dy, x, hidden, o, p, wants)
        asked.append([(bool(w), g.numel() > 0) for w, g in zip(wants, found, strict=True)])
        return found

    monkeypatch.setattr(cpp_cpu, "backward", recorded)
    for wanted in WANTED.values():
        with_gradients(
            lambda i: ops.fused_linear(i.x, i.weight, impl="cpp_cpu", **i.options),
            inputs, wanted,
        )  # fmt: skip
        assert asked.pop() == [(n in wanted, n in wanted) for n in ("x", "bias", "down", "up")]


def test_a_packed_weight_gets_no_gradient_and_no_graph():
    weight = random_packed("nf4", 20, 40, 8)
    y = ops.quantized_linear(torch.randn(3, 40), weight)
    assert not y.requires_grad


EMPTY = {
    "no-tokens": Case(0, 40, 50, 3, **ALL),
    "no-tokens-packed": Case(0, 40, 50, 3, "int4", 8, bias=True),
    "no-tokens-3-D": Case(0, 40, 50, 3, lead=(2, 0, 3)),
    "no-inputs": Case(20, 0, 50, 3, bias=True),
    "no-outputs": Case(20, 40, 0, 3, bias=True),
}


@by_dtype
@pytest.mark.parametrize("wanted", [("x",), None], ids=["x-alone", "all"])
@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_an_extent_of_nothing(impl, case, wanted, dtype):
    expected = prepared_gradients(case, dtype)
    ours = gradients(impl, expected.inputs, wanted or tuple(expected.inputs.named))
    for name, gradient in ours.grads.items():
        assert gradient.shape == expected.inputs.named[name].shape
    assert_accurate(ours, expected)


def test_gradients_over_a_packed_base_are_those_of_the_decoded_one(impl):
    """QLoRA in float32: within 1e-5 of the largest, 4 bits and 8."""
    for format in ("nf4", "int8"):
        case = Case(70, 128, 96, 8, format, 64)
        expected = prepared_gradients(case, torch.float32)
        ours = gradients(impl, make_inputs(case, torch.float32))
        for name, result in ours.grads.items():
            true = expected.truth.grads[name]
            assert (result.cpu().double() - true).abs().max() < 1e-5 * true.abs().max(), name


def test_results_have_no_graph_under_no_grad(impl_once):
    inputs = make_inputs(CASES["T97-dense"], torch.float32)
    inputs.x.requires_grad_()
    with torch.no_grad():
        assert not run(impl_once, inputs).requires_grad
    with torch.inference_mode():
        y = run(impl_once, inputs)
    assert bitwise(y, run(impl_once, inputs))


def test_no_gradient_of_the_gradient():
    """Refused, not wrong."""
    inputs = make_inputs(CASES["T5-nf4"], torch.float32)
    x = inputs.x.requires_grad_()
    y = ops.fused_linear(x, inputs.weight, **inputs.options)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)
