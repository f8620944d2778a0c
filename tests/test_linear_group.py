"""Several layers over one x: the bits of separate calls, and their sum of dx rounded once."""

import functools
from dataclasses import replace

import pytest
import torch
from conftest import Target
from linear_group_inputs import (
    GROUPS,
    apart,
    different,
    in_turn,
    layer_of,
    make_group,
    on,
    recorded,
    results,
    together,
)
from linear_inputs import (
    DTYPES,
    Case,
    bitwise,
    by_reference,
    dtype_name,
    magnitudes,
    unfused,
    wide,
)
from memory_probes import allocations
from yardstick import assert_errs_at_most_twice_stock, rms

from tilewright import ops
from tilewright.ops.linear import cpp_cpu

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture
def native_calls(monkeypatch):
    return recorded(monkeypatch)


# --- the bits of separate calls ---


@in_turn()
def test_all_but_dx_has_the_bits_of_separate_calls(impl, native_calls, group, tokens, dtype):
    group = on(impl, make_group(group, tokens, dtype))
    separate = results(functools.partial(apart, impl=impl.name), group)
    assert set(native_calls["forward"]) <= {1}
    native_calls["forward"].clear()
    ours = results(functools.partial(together, impl=impl.name), group)
    assert different(separate, ours, but=("x",) if len(group) > 1 else ()) == []
    for y, i in zip(together(group, impl.name), group, strict=True):
        assert y.shape == i.dy.shape and y.dtype == dtype and y.is_contiguous()
    if impl.name == "cpp_cpu":
        go_together = all(i.weight.shape[0] and i.weight.shape[1] for i in group)
        calls = [len(group)] if go_together else [1] * len(group)
        assert native_calls["forward"] == calls * 2
        assert native_calls["backward"][-len(calls) :] == calls


@by_dtype
@pytest.mark.parametrize("tokens", [5, 150])
@pytest.mark.parametrize("group", GROUPS)
def test_dx_errs_at_most_twice_stock_torch(kernel, group, tokens, dtype):
    check_dx(make_group(GROUPS[group], tokens, dtype), kernel)


def check_dx(group, target):
    """Stock: each layer unfused, and autograd's sum of what they hand back. In 16 bits separate
    calls, which round each share, are no better either."""
    dtype, live = group[0].x.dtype, on(target, group)
    ours = results(functools.partial(together, impl=target.name), live, ())["x"].cpu()
    assert ours.dtype == dtype
    stock = results(lambda g: [unfused(i) for i in g], group, ())["x"]
    truth, terms = (
        results(lambda g: [by_reference(i) for i in g], [of(i) for i in group], ())["x"]
        for of in (wide, magnitudes)
    )
    assert_errs_at_most_twice_stock("dx", ours, stock, truth, terms)
    if dtype != torch.float32:
        separate = results(functools.partial(apart, impl=target.name), live, ())["x"].cpu()
        assert rms(ours - truth) <= rms(separate - truth)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_dx_is_rounded_once(impl, dtype):
    """Within half a unit in the last place of the sum in float64, where separate calls are not."""
    if impl.name != "cpp_cpu":
        pytest.skip(f"{impl}: separate calls")
    # an update would add the rounding of its own inner product
    group = [replace(i, options={}) for i in make_group(GROUPS["qkv-dense"], 40, dtype)]
    truth = results(lambda g: [by_reference(i) for i in g], [wide(i) for i in group], ())["x"]
    units = truth.to(dtype)
    half = (torch.nextafter(units.abs(), units.abs() + 1) - units.abs()).double() / 2

    def off(function):
        dx = results(functools.partial(function, impl=impl.name), group, ())["x"]
        return ((dx.double() - truth).abs() - half).max().item()

    assert off(together) <= 1e-5 < off(apart)


SPOILT = {
    "all": lambda dys, n: [1.01 * dy for dy in dys],
    "first": lambda dys, n: [1.05 * dys[0], *dys[1:]],
    "last": lambda dys, n: [*dys[:-1], 1.05 * dys[-1]],
}


@by_dtype
@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("group", GROUPS)
def test_the_rule_fails_a_spoilt_dx(monkeypatch, group, what, dtype):
    """One percent of all of it; five of one layer's share."""
    right = cpp_cpu.backward_of_layers
    monkeypatch.setattr(
        cpp_cpu, "backward_of_layers",
        lambda dys, *rest: right(SPOILT[what](dys, len(dys)), *rest),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="dx: rms error"):
        check_dx(make_group(GROUPS[group], 150, dtype), Target("cpp_cpu"))


def test_a_result_spoilt_by_one_bit_is_seen(monkeypatch):
    group = make_group(GROUPS["qkv-nf4"], 17, torch.float32)
    separate = results(apart, group)
    right = cpp_cpu.forward_of_layers

    def spoilt(x, layers):
        found = right(x, layers)
        found[1][0].view(torch.int32)[3, 5] ^= 1
        return found

    monkeypatch.setattr(cpp_cpu, "forward_of_layers", spoilt)
    assert different(separate, results(together, group), but=("x",)) == ["y 1"]


# --- layouts, threads, what is wanted ---


def padded(t):
    """The same values within wider rows, NaN around."""
    room = t.new_full((t.shape[0] + 2, t.shape[1] + 5), float("nan"))
    view = room[1:-1, 2:-3]
    view.copy_(t)
    return view


def transposed(t):
    return t.T.contiguous().T


@by_dtype
@pytest.mark.parametrize("layout", [padded, transposed])
@pytest.mark.parametrize("tokens", [3, 97])
def test_strided_x_and_dy_give_the_same_bits(kernel_once, native_calls, tokens, layout, dtype):
    group = on(kernel_once, make_group(GROUPS["qkv-nf4"], tokens, dtype))
    function = functools.partial(together, impl=kernel_once.name)
    plain = results(function, group)
    x = layout(group[0].x)
    views = [replace(i, x=x, dy=layout(i.dy)) for i in group]
    assert not views[0].x.is_contiguous()
    with torch.no_grad():
        assert all(bitwise(y, plain[f"y {n}"]) for n, y in enumerate(function(views)))
    assert different(plain, results(function, views)) == []
    if kernel_once.device == "cpu":
        assert set(native_calls["forward"]) == {3}


def test_leading_axes_and_dy_of_stride_0():
    group = make_group(GROUPS["qkv-dense"], 30, torch.bfloat16)
    x = group[0].x.view(5, 2, 3, 72).requires_grad_()
    layers = [layer_of(i) for i in group]
    ys = ops.linear_group(x, layers)
    assert [tuple(y.shape) for y in ys] == [(5, 2, 3, n) for n in (83, 40, 24)]
    assert all(bitwise(y.view(30, -1), z) for y, z in zip(ys, together(group), strict=True))
    (dx,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    ones = [torch.ones_like(i.dy) for i in group]
    assert bitwise(dx.view(30, 72), results(together, group, (), dys=ones)["x"])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


LARGE = {
    "dense": (Case(0, 130, 290, 9, bias=True), Case(0, 130, 60), Case(0, 130, 70, 33)),
    "nf4": (Case(0, 130, 290, 9, "nf4", 32, "nested"), Case(0, 130, 60, 0, "int4", 8),
            Case(0, 130, 70, 33, "nf4", 0, dropout_p=0.3, delta=0.1)),
    "delta": (Case(0, 130, 290, delta=0.1), Case(0, 130, 60, delta=0.3), Case(0, 130, 70, 4)),
}  # fmt: skip


@by_dtype
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("group", LARGE)
def test_any_number_of_threads_gives_the_same_bits(kernel, threads, group, tokens, dtype):
    group = on(kernel, make_group(LARGE[group], tokens, dtype))
    function = functools.partial(together, impl=kernel.name)
    threads(1)
    alone = results(function, group)
    for n in (2, 5):
        threads(n)
        assert different(alone, results(function, group), but=DENSE_WEIGHTS) == [], f"{n} threads"


DENSE_WEIGHTS = tuple(f"weight {n}" for n in range(3))  # their gradients are torch's own products


@pytest.mark.parametrize("group", LARGE)
def test_race_hunt(kernel_once, threads, group):
    group = on(kernel_once, make_group(LARGE[group], 300, torch.bfloat16))
    function = functools.partial(together, impl=kernel_once.name)
    threads(7)
    first = results(function, group)
    for n in range(15):
        again = results(function, group)
        assert different(first, again, but=DENSE_WEIGHTS) == [], f"run {n + 2}"


WANTED = {
    "x": (True, ()),
    "adapters": (True, ("down", "up")),
    "frozen-x": (False, ("bias", "down", "up")),
    "down": (False, ("down",)),
    "weight": (False, ("weight",)),
    "delta": (False, ("delta",)),
}


@by_dtype
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("group", GROUPS)
def test_some_gradients_alone_equal_those_of_all(kernel_once, group, wanted, dtype):
    group = on(kernel_once, make_group(GROUPS[group], 33, dtype))
    wants_dx, names = wanted
    if not wants_dx and not any(n in names for i in group for n in i.named):
        pytest.skip("none of the layers has one")
    function = functools.partial(together, impl=kernel_once.name)
    everything = results(function, group)
    some = results(function, group, names, wants_dx)
    assert different({n: everything[n] for n in some}, some) == []


@pytest.mark.parametrize("unused", [(0,), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("group", ["qkv-dense", "qkv-nf4", "everything-dense"])
def test_a_result_that_nobody_uses(native_calls, group, unused):
    group = make_group(GROUPS[group], 33, torch.bfloat16)
    dys = [None if n in unused else i.dy for n, i in enumerate(group)]
    separate = results(apart, group, dys=dys)
    ours = results(together, group, dys=dys)
    alone = len(group) - len(unused) == 1
    assert different(separate, ours, but=() if alone else ("x",)) == []
    assert native_calls["backward"][-1] == len(group) - len(unused)
    zeros = [torch.zeros_like(i.dy) if n in unused else i.dy for n, i in enumerate(group)]
    assert bitwise(results(together, group, dys=zeros)["x"], ours["x"])


def test_x_and_everything_else_stays_as_it_is():
    group = make_group(GROUPS["everything-dense"], 60, torch.bfloat16)
    tensors = [group[0].x, *[t for i in group for t in (i.dy, *i.named.values())]]
    before = [t.clone() for t in tensors]
    results(together, group)
    assert all(bitwise(a, b) for a, b in zip(before, tensors, strict=True))


def test_a_second_backward_is_the_same_and_results_may_be_overwritten():
    group = make_group(GROUPS["qkv-nf4"], 60, torch.bfloat16)
    x = group[0].x.clone().requires_grad_()
    ys = ops.linear_group(x, [layer_of(i) for i in group])
    dys = [i.dy for i in group]
    first = torch.autograd.grad(ys, x, dys, retain_graph=True)
    ys[0].mul_(2.0)
    second = torch.autograd.grad(ys, x, [0.5 * dys[0], *dys[1:]])
    assert bitwise(first[0], second[0])


def test_inference_has_no_graph():
    group = make_group(GROUPS["qkv-nf4"], 3, torch.bfloat16)
    expected = apart(group)
    x = group[0].x.clone().requires_grad_()
    with torch.no_grad():
        ys = together([replace(i, x=x) for i in group])
    assert not any(y.requires_grad for y in ys)
    with torch.inference_mode():
        assert all(bitwise(a, b) for a, b in zip(together(group), expected, strict=True))


def test_a_default_seed_is_drawn_for_each_layer_in_turn():
    group = [
        replace(i, options={n: o for n, o in i.options.items() if n != "dropout_seed"})
        for i in make_group(GROUPS["everything-dense"], 20, torch.float32)
    ]
    for function in (lambda: together(group), lambda: results(together, group).values()):
        torch.manual_seed(3)
        expected = apart(group)
        torch.manual_seed(3)
        assert all(bitwise(a, b) for a, b in zip(expected, function(), strict=False))


# --- memory ---

LEAN = (Case(0, 512, 768, 4, "nf4", 64, bias=True), Case(0, 512, 700, 0, "int4", 64))


@by_dtype
@pytest.mark.parametrize("tokens", [3, 40])
def test_nothing_of_a_weights_size_is_allocated_or_kept(tokens, dtype, clean_memory):
    group = make_group(LEAN, tokens, dtype)
    wanted = ("bias", "down", "up")
    results(together, group, wanted)
    blocks = allocations(lambda: results(together, group, wanted))
    largest = max(4 * t.numel() for i in group for t in (i.x, i.dy, *i.named.values()))
    assert sum(blocks) > group[0].x.nbytes, "the profiler saw nothing"
    assert max(blocks) <= largest < 512 * 700 // 2

    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        results(together, group, wanted)
    known = {t.data_ptr() for i in group for t in i.weight.tensors().values()}
    known |= {t.data_ptr() for i in group for n, t in i.named.items() if n != "x"}
    more = sum(t.numel() for t in kept if t.data_ptr() not in known)
    assert more <= group[0].x.numel() + 4 * tokens, "more than x and hidden"


def test_a_frozen_base_keeps_no_x(clean_memory):
    group = make_group((Case(0, 64, 96, 0, "nf4", 64), Case(0, 64, 40)), 40, torch.float32)
    group += make_group((Case(0, 64, 96, 0, "nf4", 64),), 40, torch.float32)
    for members in ([group[0], group[2]], [group[1], group[1]]):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t), lambda t: t):
            x = members[0].x.clone().requires_grad_()
            ops.linear_group(x, [layer_of(i) for i in members])
        assert x.data_ptr() not in {t.data_ptr() for t in kept}
