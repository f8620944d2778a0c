"""moe_mlp: forward and gradients of every implementation against float64, and what it promises."""

import mmap

import pytest
import torch
from attention_inputs import bitwise
from moe_inputs import DTYPES, GRADIENTS, Case, judge, loop, make_inputs, ours, prepared, run

PLAIN = Case(37, 2, 5, 40, 24)
CASES = {
    "one-of-everything-but-tokens": Case(64, 1, 1, 1, 1),
    "nothing-divides-a-tile": Case(7, 3, 7, 97, 47),
    "as-many-slots-as-experts": Case(5, 3, 3, 40, 24),
    "more-rows-than-an-item": Case(700, 2, 3, 33, 20),
    "wider-than-a-panel": Case(60, 2, 3, 530, 550),
    "deeper-than-a-chunk": Case(9, 1, 2, 1050, 530),
    "many-experts-few-tokens": Case(6, 2, 64, 64, 32),
    "decode": Case(1, 4, 8, 160, 96),
    "all-to-one": PLAIN.but(routing="one"),
    "repeated-in-a-token": PLAIN.but(routing="repeated", slots=4),
    "some-go-nowhere": PLAIN.but(routing="nowhere", slots=3),
    "experts-without-tokens": PLAIN.but(routing="sparse", experts=12),
}
LAYOUTS = {
    f"{'interleaved' if interleaved else 'halves'}-{'transposed' if transposed else 'rows'}"
    f"{'-bias' if bias else ''}-{tokens}": Case(
        tokens, 2, 4, 48, 48, interleaved=interleaved, transposed=transposed, bias=bias
    )  # square, so that a wrong orientation passes the checks of shapes
    for interleaved in (False, True)
    for transposed in (False, True)
    for bias in (False, True)
    for tokens in (3, 50)
}
RULES = {
    "geglu": PLAIN.but(activation="geglu"),
    "geglu-tanh": PLAIN.but(activation="geglu_tanh"),
    "clamped": PLAIN.but(activation="clamped_swiglu", bias=True),
    "clamped-as-gpt-oss": PLAIN.but(
        activation="clamped_swiglu", bias=True, interleaved=True, transposed=True
    ),
    "scaled-input": PLAIN.but(scale_input=True, bias=True),
    "scaled-input-decode": PLAIN.but(scale_input=True, bias=True, tokens=12, slots=1, experts=24),
    "reglu": PLAIN.but(activation="reglu", bias=True),
    "gelu-alone": Case(60, 2, 3, 72, 330, activation="gelu", bias=True),
    "gelu-tanh-alone-transposed": PLAIN.but(activation="gelu_tanh", transposed=True, bias=True),
    "silu-alone-scaled-input": PLAIN.but(activation="silu", scale_input=True),
    "relu-alone-decode": PLAIN.but(activation="relu", bias=True, tokens=12, slots=1, experts=24),
    "int32-ids-bf16-gates": PLAIN.but(ids_dtype=torch.int32, gates_dtype=torch.bfloat16),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def in_turn(cases: dict):
    pairs = {
        f"{n}-{str(DTYPES[i % 3]).removeprefix('torch.')}": (c, DTYPES[i % 3])
        for i, (n, c) in enumerate(cases.items())
    }
    return pytest.mark.parametrize("case, dtype", pairs.values(), ids=pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_case
def test_errs_at_most_twice_the_loop(case, dtype, impl):
    p = prepared(case, dtype)
    judge(str(impl), run(impl, case, p.inputs, GRADIENTS[:4]), p)


@in_turn(LAYOUTS | RULES)
def test_layouts_and_activations(case, dtype, impl):
    p = prepared(case, dtype)
    wanted = [n for n in GRADIENTS if n in p.inputs]
    judge(str(impl), run(impl, case, p.inputs, wanted), p)


@pytest.mark.parametrize("case", [PLAIN, CASES["decode"], LAYOUTS["interleaved-transposed-3"]],
                         ids=["many", "decode", "transposed"])  # fmt: skip
def test_forward_alone_is_that_of_training(case, kernel):
    inputs = make_inputs(case, torch.bfloat16)
    alone = run(kernel, case, inputs)["y"]
    assert bitwise(alone, run(kernel, case, inputs, ("x",))["y"])


@pytest.mark.parametrize("wanted", [(n,) for n in GRADIENTS], ids=GRADIENTS)
def test_a_gradient_alone_is_that_among_all(wanted, kernel_once):
    case = PLAIN.but(bias=True)
    inputs = make_inputs(case, torch.bfloat16)
    everything = run(kernel_once, case, inputs, GRADIENTS)
    alone = run(kernel_once, case, inputs, wanted)
    assert all(bitwise(alone[n], everything[n]) for n in alone)


@pytest.mark.parametrize("tokens", [3, 200], ids=["few", "many"])
def test_threads_and_repetition_change_no_bit(tokens, kernel_once):
    case = Case(tokens, 2, 5, 72, 40, bias=True, routing="repeated")
    inputs = make_inputs(case, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append(run(kernel_once, case, inputs, GRADIENTS))
    finally:
        torch.set_num_threads(before)
    assert all(bitwise(r[n], results[0][n]) for r in results for n in r)


def test_a_token_does_not_depend_on_the_others(kernel_once):
    case = Case(120, 2, 3, 72, 40)
    inputs = make_inputs(case, torch.bfloat16)
    y = run(kernel_once, case, inputs)["y"]
    other = {n: t.clone() for n, t in inputs.items()}
    other["x"][60:] = torch.randn(60, 72).bfloat16()
    other["ids"][60:] = (other["ids"][60:] + 1) % 3
    assert bitwise(run(kernel_once, case, other)["y"][:60], y[:60])


def test_permuting_tokens_permutes_outputs(kernel_once):
    case = Case(90, 2, 5, 72, 40)
    inputs = make_inputs(case, torch.float32)
    y = run(kernel_once, case, inputs)["y"]
    order = torch.randperm(90)
    shuffled = {n: t[order] if n in ("x", "ids", "gates") else t for n, t in inputs.items()}
    assert bitwise(run(kernel_once, case, shuffled)["y"], y[order])


def test_a_wrong_route_is_seen(impl_once):
    """The yardstick itself: one token's wrong expert must not pass."""
    p = prepared(PLAIN, torch.bfloat16)
    wrong = {n: t.clone() for n, t in p.inputs.items()}
    wrong["ids"][11, 1] = (wrong["ids"][11, 1] + 1) % 5
    got = run(impl_once, PLAIN, wrong)
    with pytest.raises(AssertionError, match="rms error"):
        judge("a wrong route", got, p)


@pytest.mark.parametrize("part", ["y", *GRADIENTS[:4]])
def test_one_percent_is_seen(part):
    p = prepared(PLAIN, torch.bfloat16)
    got = ours(PLAIN)(**{n: t for n, t in p.inputs.items() if n != "dy"}) if part == "y" else None
    good = {part: p.stock[part] if got is None else got}
    judge("as it is", good, p)
    with pytest.raises(AssertionError, match="rms error"):
        judge("spoilt", {part: good[part] * 1.01}, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_without_tokens_get_exactly_zero(dtype, impl_once):
    case = CASES["experts-without-tokens"].but(bias=True)
    inputs = make_inputs(case, dtype)
    got = run(impl_once, case, inputs, GRADIENTS)
    empty = [e for e in range(case.experts) if not (inputs["ids"] == e).any()]
    assert len(empty) >= 5
    for name in GRADIENTS[2:]:
        assert not got[name][empty].any(), name
        assert got[name][[e for e in range(case.experts) if e not in empty]].any(), name


def test_slots_that_go_nowhere_have_no_part(impl_once):
    case = CASES["some-go-nowhere"]
    inputs = make_inputs(case, torch.float32)
    nowhere = (inputs["ids"] < 0) | (inputs["ids"] >= case.experts)
    inputs["gates"][nowhere] = float("nan")
    got = run(impl_once, case, inputs, GRADIENTS[:4])
    assert all(t.isfinite().all() for t in got.values())
    assert not got["gates"][nowhere].any()
    assert not got["y"][0].any() and not got["x"][0].any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens, impl_once):
    case = Case(tokens, 2, 3, 24, 16, bias=True)
    inputs = make_inputs(case, torch.float32)
    got = run(impl_once, case, inputs, GRADIENTS)
    assert got["y"].shape == got["x"].shape == (tokens, 24)
    for name in GRADIENTS[2:]:
        assert got[name].shape == inputs[name].shape
        assert got[name].any() == bool(tokens)


def test_gradients_of_stride_zero_and_views(impl_once):
    case = Case(20, 2, 3, 24, 16)
    inputs = make_inputs(case, torch.float32)
    wide = torch.zeros(20, 60)
    wide[:, 30:54] = inputs["x"]
    views = dict(inputs, x=wide[:, 30:54], gates=inputs["gates"].T.contiguous().T,
                 ids=inputs["ids"].T.contiguous().T,
                 gate_up=torch.stack([inputs["gate_up"]] * 2, -1)[..., 0])  # fmt: skip
    views["dy"] = torch.ones(()).expand(20, 24)
    plain = dict(inputs, dy=torch.ones(20, 24))
    got, need = (run(impl_once, case, t, GRADIENTS[:4]) for t in (views, plain))
    assert all(bitwise(got[n], need[n]) for n in need)


def test_identical_experts_and_normalised_gates_give_the_dense_layer(impl_once):
    case = Case(30, 3, 6, 48, 32)
    inputs = make_inputs(case, torch.float32)
    for name in ("gate_up", "down"):
        inputs[name] = inputs[name][:1].expand_as(inputs[name]).contiguous()
    inputs["gates"] = torch.rand(30, 3).softmax(-1)
    dense = loop(inputs["x"], torch.zeros(30, 1), torch.ones(30, 1), inputs["gate_up"],
                 inputs["down"], case=case)  # fmt: skip
    assert (run(impl_once, case, inputs)["y"] - dense).abs().max() < 1e-5


def test_leading_axes_one_slot_and_gates_of_one(impl_once):
    case = Case(24, 1, 4, 32, 16)
    inputs = make_inputs(case, torch.float32)
    inputs["gates"] = torch.ones(24, 1)
    need = run(impl_once, case, inputs)["y"]
    forced = dict(inputs, x=inputs["x"].view(4, 6, 32), ids=inputs["ids"].view(4, 6), gates=None)
    assert bitwise(run(impl_once, case, forced)["y"], need.view(4, 6, 32))


def test_what_is_kept_for_the_backward(kernel_once):
    case = Case(50, 2, 4, 32, 16)
    inputs = make_inputs(case, torch.bfloat16)
    inputs = {n: t.to(kernel_once.device) for n, t in inputs.items()}
    kept = []

    def pack(t):
        kept.append(t)
        return t

    for name in ("x", "gates"):
        inputs[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(kernel_once, case, inputs)["y"]
    assert y.requires_grad
    own = {inputs[n].data_ptr() for n in ("x", "gates", "gate_up", "down")}
    new = [t for t in kept if t.data_ptr() not in own]
    # z in bf16, the order of rows in int32, E + 1 starts
    assert sum(t.nbytes for t in new) == 100 * 32 * 2 + 100 * 4 + 5 * 8


@pytest.mark.parametrize("tokens", [2, 12], ids=["few", "many"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_strides_past_two_to_the_31(tokens, transposed, kernel_once):
    """Weights of experts 2**31 elements apart: addresses alone, hardly any memory is touched."""
    if kernel_once.device != "cpu":
        pytest.skip("test_moe_gpu.py has strides of its own")
    case = Case(tokens, 2, 2, 24, 16, transposed=transposed)
    inputs = make_inputs(case, torch.bfloat16)
    need = run(kernel_once, case, inputs, GRADIENTS[:4])
    far = dict(inputs)
    for name in ("gate_up", "down"):
        near = inputs[name]
        step = 2**31 + 64
        memory = mmap.mmap(-1, 2 * (step + near[0].numel()))  # a page exists once it is touched
        memory = torch.frombuffer(memory, dtype=torch.bfloat16)
        far[name] = memory.as_strided(near.shape, (step, near.shape[2], 1))
        far[name].copy_(near)
    call = {n: t for n, t in far.items() if n not in ("dy", "x")}
    x = far["x"].clone().requires_grad_()
    y = ours(case, kernel_once.name)(x=x, **call)
    (dx,) = torch.autograd.grad(y, x, far["dy"])
    assert bitwise(y.detach(), need["y"]) and bitwise(dx, need["x"])
