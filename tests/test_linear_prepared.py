"""Inference over a packed weight takes a shorter way; nobody sees it but the clock."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from linear_inputs import bitwise, random_packed

from tilewright import choose, ops
from tilewright.ops.common.packed import FORMATS
from tilewright.ops.linear import cpp_cpu, group, op, prepared
from tilewright.ops.linear.problem import Problem

PROBLEM = Problem("cpu", torch.bfloat16, 1, 64, 40, format="int4", group_size=32)

pytestmark = pytest.mark.skipif(
    cpp_cpu.why_not(PROBLEM) is not None
    or choose.choose("fused_linear", "auto", PROBLEM) != "cpp_cpu",
    reason="plain calls take another implementation here",
)


def a_weight(format="int4", n_out=40, n_in=64, scales=torch.float32, offsets=False, order=False):
    generator = torch.Generator().manual_seed(5)
    return random_packed(format, n_out, n_in, 32, scales, offsets, order, generator)


def an_x(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)


def warm(x, weight, **options):
    """The first call, which takes the long way."""
    ops.fused_linear(x, weight, **options)


@pytest.fixture
def long_way(monkeypatch):
    """How many calls took the long way."""
    calls = []
    usual = op.call_fused_linear

    def counting(*a):
        calls.append(a)
        return usual(*a)

    monkeypatch.setattr(op, "call_fused_linear", counting)
    return calls


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scales", (torch.float32, torch.bfloat16, "nested"), ids=str)
@pytest.mark.parametrize("shape", ((64,), (1, 64), (3, 64), (2, 5, 64), (70, 64)), ids=str)
def test_gives_the_same_bits(long_way, format, scales, shape):
    weight = a_weight(format, scales=scales, offsets=format == "uint4" and scales != "nested")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = an_x(*shape, dtype=dtype)
        warm(x, weight)
        long_way.clear()
        for bias in (None, an_x(40, dtype=dtype), an_x(40, dtype=torch.float32)):
            y = ops.fused_linear(x, weight, bias)
            assert not long_way
            assert bitwise(y, ops.fused_linear(x, weight, bias, impl="cpp_cpu"))
            long_way.clear()


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "fp8"])
def test_gives_the_same_bits_with_eight_bit_activations(long_way, format):
    x, weight = an_x(3, 64), a_weight(format)
    warm(x, weight, int8_activations=True)
    assert len(long_way) == 1
    y = ops.quantized_linear(x, weight, int8_activations=True)
    assert len(long_way) == 1
    assert bitwise(y, ops.quantized_linear(x, weight, int8_activations=True, impl="cpp_cpu"))
    assert not bitwise(y, ops.quantized_linear(x, weight))


def test_sees_values_change_and_tensors_move(long_way):
    x, weight = an_x(2, 64), a_weight()
    bias = an_x(40)
    warm(x, weight)
    long_way.clear()
    before = ops.fused_linear(x, weight, bias)
    weight.scales.mul_(2)
    bias.add_(1)
    changed = ops.fused_linear(x, weight, bias)
    assert not long_way
    assert not bitwise(before, changed)
    assert bitwise(changed, ops.fused_linear(x, weight, bias, impl="cpp_cpu"))
    old = weight.codes.data
    weight.codes.data = old.roll(1, dims=0).clone()
    old.fill_(0)
    moved = ops.fused_linear(x, weight, bias)
    assert not bitwise(changed, moved)
    assert bitwise(moved, ops.fused_linear(x, weight, bias, impl="cpp_cpu"))


def test_copies_have_calls_of_their_own_and_the_dead_have_none():
    x, weight = an_x(2, 64), a_weight()
    warm(x, weight)
    y = ops.fused_linear(x, weight)
    twin = copy.deepcopy(weight)
    twin.scales.mul_(2)
    warm(x, twin)
    assert bitwise(ops.fused_linear(x, twin), ops.fused_linear(x, twin, impl="cpp_cpu"))
    assert bitwise(ops.fused_linear(x, weight), y)
    gc.collect()  # of what other tests left
    known = len(prepared._known)
    del twin
    gc.collect()
    assert len(prepared._known) == known - 1


def with_gaps(weight):
    return replace(weight, codes=weight.codes.repeat_interleave(2, 0)[::2])


REFUSED = {
    "gradient-of-x": lambda x, w: (x.requires_grad_(), w, None),
    "gradient-of-bias": lambda x, w: (x, w, an_x(40).requires_grad_()),
    "strided-x": lambda x, w: (an_x(64, 3).T, w, None),
    "no-tokens": lambda x, w: (x[:0], w, None),
    "act-order": lambda x, w: (x, a_weight(order=True), None),
    "codes-with-gaps": lambda x, w: (x, with_gaps(w), None),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_leaves_to_the_long_way(long_way, what):
    x, weight, bias = REFUSED[what](an_x(3, 64), a_weight())
    with torch.no_grad():
        warm(an_x(3, 64), weight)
    y = ops.fused_linear(x, weight, bias)
    assert len(long_way) == 2
    assert bitwise(y.detach(), ops.fused_linear(x, weight, bias, impl="cpp_cpu").detach())
    with torch.no_grad():
        again = ops.fused_linear(x, weight, bias)
    assert bitwise(y.detach(), again)


def test_settings_and_autocast_are_heard(long_way, monkeypatch):
    x, weight = an_x(3, 64, dtype=torch.float32), a_weight()
    warm(x, weight)
    warm(x.bfloat16(), weight)
    long_way.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.fused_linear(x, weight).dtype == torch.bfloat16
    assert len(long_way) == 1
    monkeypatch.setenv("TILEWRIGHT_IMPL", "reference")
    y = ops.fused_linear(x, weight)
    assert len(long_way) == 2
    assert bitwise(y, ops.fused_linear(x, weight, impl="reference"))


def test_what_is_wrong_is_still_said():
    x, weight = an_x(3, 64), a_weight()
    warm(x, weight)
    with pytest.raises(ValueError, match=r"x has shape \(3, 63\), need a last axis of I = 64"):
        ops.fused_linear(x[:, :63].contiguous(), weight)
    with pytest.raises(ValueError, match=r"bias has shape \(41,\), need \(40,\)"):
        ops.fused_linear(x, weight, an_x(41))
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        ops.fused_linear(x[0, 0], weight)
    with pytest.raises(ValueError, match=r"x (has dtype|is)"):
        ops.fused_linear(x.int(), weight)
    fp8 = a_weight("fp8")
    warm(x, fp8)
    with pytest.raises(ValueError, match="int8_activations needs a packed weight"):
        ops.fused_linear(x, fp8, int8_activations=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(activation="gelu"), "no activation 'gelu'"),
        (dict(dropout_p=0.5), "dropout_p is 0.5 without down and up"),
        (dict(scale=float("nan")), "scale is nan"),
    ],
    ids=["activation", "dropout", "scale"],
)
def test_options_are_checked_after_the_first_call_as_well(options, message):
    x, weight = torch.randn(2, 64), ops.quantize_weight(torch.randn(16, 64), ops.NF4(64))
    ops.fused_linear(x, weight)
    with pytest.raises(ValueError, match=message):
        ops.fused_linear(x, weight, **options)


# --- several layers over one x ---


@pytest.fixture
def groups_the_long_way(monkeypatch):
    calls, usual = [], group._described

    def counting(*a):
        calls.append(a)
        return usual(*a)

    monkeypatch.setattr(group, "_described", counting)
    return calls


def layers_of(*weights, bias=None):
    return [ops.LinearLayer(w, None if n else bias) for n, w in enumerate(weights)]


@pytest.mark.parametrize("others", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 17, 70])
def test_groups_give_the_bits_of_separate_calls(groups_the_long_way, tokens, others):
    weights = [a_weight("nf4"), a_weight(others, 24), a_weight(others, 0), a_weight(others, 50)]
    layers = layers_of(*weights, bias=an_x(40))
    layers[1] = replace(layers[1], scale=2.0)  # of an update that is not there
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = an_x(2, tokens, 64, dtype=dtype)
        ops.linear_group(x, layers)
        groups_the_long_way.clear()
        ys = ops.linear_group(x, layers)
        assert not groups_the_long_way
        for y, i in zip(ys, layers, strict=True):
            assert bitwise(y, ops.fused_linear(x, i.weight, i.bias, impl="cpp_cpu"))


LONG_GROUPS = {
    "gradient of x": lambda: (an_x(3, 64).requires_grad_(), layers_of(a_weight(), a_weight())),
    "gradient of a bias": lambda: (
        an_x(3, 64),
        layers_of(a_weight(), a_weight(), bias=torch.zeros(40, requires_grad=True)),
    ),
    "strided x": lambda: (an_x(3, 128)[:, ::2], layers_of(a_weight(), a_weight())),
    "no tokens": lambda: (an_x(0, 64), layers_of(a_weight(), a_weight())),
    "order": lambda: (an_x(3, 64), layers_of(a_weight(), a_weight(order=True))),
    "many": lambda: (an_x(3, 64), layers_of(*[a_weight(n_out=n) for n in range(1, 10)])),
    "an activation": lambda: (
        an_x(3, 64),
        [*layers_of(a_weight()), ops.LinearLayer(a_weight(), activation="relu")],
    ),
    "dense": lambda: (
        an_x(3, 64),
        [*layers_of(a_weight()), ops.LinearLayer(torch.ones(7, 64).bfloat16())],
    ),
}


@pytest.mark.parametrize("what", LONG_GROUPS)
def test_groups_that_go_the_long_way(groups_the_long_way, what):
    x, layers = LONG_GROUPS[what]()
    for _ in range(2):
        ys = ops.linear_group(x, layers)
        for y, i in zip(ys, layers, strict=True):
            assert bitwise(y, ops.fused_linear(x, i.weight, i.bias, impl="cpp_cpu"))
    assert len(groups_the_long_way) == 2


def test_a_group_whose_x_or_bias_does_not_fit_is_refused():
    layers = layers_of(a_weight(), a_weight())
    ops.linear_group(an_x(3, 64), layers)
    with pytest.raises(ValueError, match=r"linear_group: x has shape \(3, 32\), need a last axis"):
        ops.linear_group(an_x(3, 32), layers)
    with pytest.raises(ValueError, match=r"layers\[0\]: bias has shape \(39,\), need \(40,\)"):
        ops.linear_group(an_x(3, 64), layers_of(a_weight(), bias=torch.zeros(39)))


def test_groups_under_autocast_go_the_long_way(groups_the_long_way):
    x, layers = an_x(3, 64, dtype=torch.float32), layers_of(a_weight(), a_weight())
    ops.linear_group(x, layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = ops.linear_group(x, layers)
    assert len(groups_the_long_way) == 2 and ys[0].dtype == torch.bfloat16
