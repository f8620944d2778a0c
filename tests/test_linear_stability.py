"""The same bits every time and for any number of threads; rows apart; no memory to spare."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from linear_inputs import (
    DENSE,
    DTYPES,
    Case,
    Inputs,
    bitwise,
    dtype_name,
    gradients,
    make_inputs,
    random_packed,
    run,
    with_gradients,
    with_row_scale,
)
from memory_probes import allocations, peak_growth_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright
from tilewright import ops

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# large enough for more than one thread (2e5 operations, 3e4 weights), odd in every extent
CASES = {
    "dense": Case(150, 130, 290, 9, bias=True),
    "nf4": Case(150, 130, 290, 9, "nf4", 32, "nested", bias=True),
    "few": Case(5, 300, 330, 9, "uint4", 64, offsets=True, bias=True),
    "few-int8": Case(1, 300, 330, 3, "int8", 0),
    "dropout": Case(200, 70, 90, 5, "fp8", 8, dropout_p=0.3, activation="relu", act_order=True),
    "many-tokens": Case(1100, 40, 60, 4, "int4", 8, bias=True),
    "adapters": Case(120, 90, 130, adapters=(3, 8, 1), bias=True),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def kernels_own(results) -> dict:
    """y and the gradients that our kernels make: a dense weight's is torch's own product."""
    return {n: t for n, t in results.items() if n != "weight"}


def same_bits(a, b) -> list:
    """The names of what differs."""
    b = dict(b.items())
    return [n for n, t in kernels_own(a).items() if not bitwise(t, b[n])]


@by_dtype
@by_case
def test_any_number_of_threads_gives_the_same_bits(kernel, threads, case, dtype):
    inputs = make_inputs(case, dtype)
    threads(1)
    alone = gradients(kernel, inputs)
    for n in (2, 3):
        threads(n)
        assert same_bits(alone, gradients(kernel, inputs)) == [], f"{n} threads"


@by_case
def test_twenty_runs_give_the_same_bits(kernel_once, threads, case):
    """On more threads than there are processors: what is dealt out changes hands every time."""
    inputs = make_inputs(case, torch.bfloat16)
    threads(5)
    first = gradients(kernel_once, inputs)
    for n in range(19):
        assert same_bits(first, gradients(kernel_once, inputs)) == [], f"run {n + 2}"


@pytest.mark.parametrize("case", ["few", "nf4"])
def test_calls_from_several_threads_at_once(kernel_once, case):
    """The C++ kernels let go of Python's lock; each caller has scratch of its own."""
    inputs = make_inputs(CASES[case], torch.bfloat16)
    expected = gradients(kernel_once, inputs)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: gradients(kernel_once, inputs), range(12)))
    assert [same_bits(expected, f) for f in found] == [[]] * 12


@pytest.mark.parametrize("case", ["few", "dropout"])
def test_race_hunt(kernel_once, threads, case):
    inputs = make_inputs(CASES[case], torch.bfloat16)
    threads(7)
    first = run(kernel_once, inputs)
    for n in range(150):
        assert bitwise(first, run(kernel_once, inputs)), f"run {n + 2}"


# --- rows apart ---


@by_dtype
@pytest.mark.parametrize("wild", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("case", ["dense", "nf4", "few", "dropout", "many-tokens"])
def test_a_wild_activation_stays_in_its_row(kernel, case, wild, dtype):
    inputs = make_inputs(CASES[case], dtype)
    inputs.x[3 % len(inputs.x), 11] = 0.5
    before = gradients(kernel, inputs, ("x",))
    row = 3 % len(inputs.x)
    x = inputs.x.clone()
    x[row, 11] = wild
    after = gradients(kernel, replace(inputs, x=x), ("x",))
    rest = torch.arange(len(x)) != row
    assert not after.y[row].isfinite().any()
    assert bitwise(after.y[rest], before.y[rest])
    assert bitwise(after.grads["x"][rest], before.grads["x"][rest])


@by_dtype
@pytest.mark.parametrize("case", ["dense", "nf4", "dropout"])
def test_a_wild_upstream_gradient_stays_in_its_row_of_dx(kernel, case, dtype):
    inputs = make_inputs(CASES[case], dtype)
    before = gradients(kernel, inputs, ("x",))
    dy = inputs.dy.clone()
    dy[7, 5] = float("nan")
    after = gradients(kernel, replace(inputs, dy=dy), ("x",))
    rest = torch.arange(len(dy)) != 7
    assert after.grads["x"][7].isnan().all()
    assert bitwise(after.grads["x"][rest], before.grads["x"][rest])


@by_dtype
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("row", [0, 15, 37, 49])
def test_a_nan_scale_stays_in_its_output(kernel, tokens, row, dtype):
    inputs = make_inputs(Case(tokens, 77, 50, 3, "nf4", 32, offsets=True), dtype)
    before = run(kernel, inputs)
    after = run(kernel, replace(inputs, weight=with_row_scale(inputs.weight, row, float("nan"))))
    rest = torch.arange(50) != row
    assert after[:, row].isnan().all() and bitwise(after[:, rest], before[:, rest])


@by_dtype
@pytest.mark.parametrize("scales", [torch.float32, "nested"], ids=["float32", "nested"])
def test_a_nan_scale_stays_in_its_group_of_dx(kernel, scales, dtype):
    """The last row's last group; nested, rows past the last have no scales to take."""
    weight = random_packed("nf4", 37, 64, 16, scales)
    if scales == "nested":
        nested = weight.nested
        alone = nested.absmax.repeat_interleave(nested.block)[: 37 * 4].clone()
        alone[-1] = float("nan")
        weight = replace(weight, nested=nested._replace(absmax=alone, block=1))
    else:
        weight.scales[2, 3, 4] = float("nan")
    x, dy = torch.randn(20, 64).to(dtype), torch.randn(20, 37).to(dtype)
    ours = gradients(kernel, Inputs(x, weight, dy, {}), ("x",))
    assert ours.grads["x"][:, 48:].isnan().all()
    assert ours.grads["x"][:, :48].isfinite().all()


@by_dtype
@pytest.mark.parametrize("case", ["dense", "nf4"])
def test_other_tokens_do_not_matter(kernel, case, dtype):
    """A row keeps its bits in other company, as long as the same kernel takes all of them."""
    inputs = make_inputs(CASES[case], dtype)
    whole = gradients(kernel, inputs, ("x",))
    for rows in (slice(0, 33), slice(3, 60), slice(40, 150), [149, 0, 77] * 11):
        part = replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows])
        some = gradients(kernel, part, ("x",))
        assert bitwise(some.y, whole.y[rows])
        assert bitwise(some.grads["x"], whole.grads["x"][rows])


@by_dtype
@pytest.mark.parametrize("case", ["dense", "nf4"])
def test_other_tokens_do_not_matter_where_there_are_few(kernel, case, dtype):
    inputs = make_inputs(CASES[case], dtype)
    four = run(kernel, replace(inputs, x=inputs.x[:4]))
    for rows in (slice(0, 1), slice(1, 3), slice(1, 4), [3, 0]):
        assert bitwise(run(kernel, replace(inputs, x=inputs.x[rows])), four[rows])


# --- memory that nobody wrote ---


@by_case
def test_what_fresh_memory_held_does_not_matter(impl, monkeypatch, case):
    """NaN in fresh memory (conftest.py) against ones: the same bits, and all of them written."""
    inputs = make_inputs(case, torch.bfloat16)
    poisoned = gradients(impl, inputs)
    for name, result in poisoned.items():
        assert result.isfinite().all(), name
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        nan_filled = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=nan_filled, **o: _f(*a, **o).nan_to_num(1.0))
    assert same_bits(poisoned, gradients(impl, inputs)) == []


HEAP_SCRIPT = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from linear_group_inputs import GROUPS, make_group, results as of_group, together
from linear_inputs import DTYPES, make_inputs, with_gradients
from test_linear_stability import CASES
from tilewright import ops
digest = hashlib.sha256()
for case in CASES.values():
    for dtype in DTYPES:
        function = ops.multi_lora_linear if case.adapters else ops.fused_linear
        results = with_gradients(
            lambda i: function(i.x, i.weight, impl="cpp_cpu", **i.options),
            make_inputs(case, dtype))
        for name, t in results.items():
            if name != "weight":
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
for group in GROUPS.values():
    for tokens in (3, 40):
        for name, t in of_group(together, make_group(group, tokens, torch.bfloat16)).items():
            if "weight" not in name:
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_what_the_heap_held_does_not_matter():
    """The C++ kernels' own scratch: glibc fills fresh and freed heap memory with a byte."""
    explanation = tilewright.explain("fused_linear", torch.zeros(1, 8), torch.zeros(8, 8))
    if explanation.chosen != "cpp_cpu":
        pytest.skip(f"cpp_cpu: {explanation.reasons['cpp_cpu']}")
    digests = set()
    for byte in ("0", "1", "128"):  # 128: fresh 0x7f bytes are 3.4e38, freed 0x80 ones tiny
        environment = os.environ | {"MALLOC_PERTURB_": byte, "PYTHONDONTWRITEBYTECODE": "1"}
        script = subprocess.run(
            [sys.executable, "-P", "-c", HEAP_SCRIPT, str(Path(__file__).parent)],
            env=environment, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert script.returncode == 0, script.stderr
        digests.add(script.stdout.strip())
    assert len(digests) == 1


# --- memory that is not needed ---


LEAN = {
    "dense": Case(40, 512, 768, 4, bias=True),
    "nf4": Case(40, 512, 768, 4, "nf4", 64, bias=True),
    "nf4-few": Case(3, 512, 768, 4, "nf4", 64, bias=True),
    "uint4-offsets": Case(40, 512, 768, 4, "uint4", 64, torch.bfloat16, offsets=True),
    "int8": Case(40, 512, 768, 4, "int8"),
}
by_lean = pytest.mark.parametrize("case", LEAN.values(), ids=LEAN)


@by_dtype
@by_lean
def test_nothing_of_the_weights_size_is_allocated(kernel_once, case, dtype):
    """Forward and backward: results, hidden values and float copies of small ones; no weight."""
    if kernel_once.device != "cpu":
        pytest.skip("reads the profiler's record of the CPU's allocator")
    inputs = make_inputs(case, dtype)
    wanted = ("x", "bias", "down", "up")
    gradients(kernel_once, inputs, wanted)
    blocks = allocations(lambda: gradients(kernel_once, inputs, wanted))
    results = (inputs.x, inputs.dy, *(t for n, t in inputs.named.items() if n in wanted[1:]))
    assert sum(blocks) > inputs.x.nbytes + inputs.dy.nbytes, "the profiler saw nothing"
    assert max(blocks) <= max(4 * t.numel() for t in results) < case.n_in * case.n_out // 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("tokens", [8, 64])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_scratch_is_panels_and_not_the_weight(kernel_once, threads, format, tokens):
    """The C++ kernels' own memory, which torch does not see: a weight whose decoded form would
    take 128 MiB in bfloat16 is decoded within a few MiB a thread, forward and backward."""
    if kernel_once.device != "cpu":
        pytest.skip("measured by the allocator in the test above")
    threads(2)
    n_out, n_in = 8192, 8192
    small = random_packed(format, 16, n_in, 64)
    weight = replace(small, out_features=n_out, codes=small.codes.repeat(n_out // 16, 1, 1),
                     scales=small.scales.repeat(n_out // 16, 1, 1))  # fmt: skip
    x = torch.randn(tokens, n_in).bfloat16().requires_grad_()
    kept = []

    def train():
        y = ops.quantized_linear(x, weight, impl=kernel_once.name)
        kept.append(torch.autograd.grad(y.sum(), x))

    ops.quantized_linear(x.detach(), random_packed(format, 16, n_in, 64), impl=kernel_once.name)
    growth = peak_growth_bytes(train)
    assert growth < 32 * 2**20, f"{growth / 2**20:.1f} MiB"


SAVED = {
    "base-alone": (Case(40, 64, 96, 0, "nf4", 64), ("x",), set()),
    "frozen-adapter": (Case(40, 64, 96, 4, "nf4", 64), ("x",), {"x", "hidden"}),
    "adapter": (Case(40, 64, 96, 4, "nf4", 64), ("x", "down", "up"), {"x", "hidden"}),
    "frozen-dense": (Case(40, 64, 96, 0), ("x",), set()),
    "bias-alone": (Case(40, 64, 96, 0, bias=True), ("bias",), set()),
    "trained-dense": (Case(40, 64, 96, 0), ("x", "weight"), {"x"}),
}


class PassingOn(TorchDispatchMode):
    """Changes nothing: under it calls go through the registered operator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "registered"])
@pytest.mark.parametrize("case, trained, more", SAVED.values(), ids=SAVED)
def test_what_is_kept_for_the_backward(kernel_once, case, trained, more, direct, clean_memory):
    """Parameters, which are there anyway, and of the activations what a gradient needs."""
    inputs = make_inputs(case, torch.float32)
    parameters = [t for n, t in inputs.named.items() if n != "x"]
    if case.format != DENSE:
        parameters += inputs.weight.tensors().values()
    known = {t.data_ptr() for t in parameters}
    saved = []

    def keep(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with contextlib.nullcontext() if direct else PassingOn():
            with_gradients(lambda i: run(kernel_once, i), inputs, trained)
    activations = {
        "x" if t.data_ptr() == inputs.x.data_ptr() else "hidden" if t.shape == (40, case.rank)
        else f"{tuple(t.shape)}"
        for t in saved if t.numel() and t.data_ptr() not in known
    }  # fmt: skip
    assert activations <= more, f"kept {activations}, need {more}"
