"""The same bits every time, for any number of threads, in any company; and no memory to spare."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import (
    DTYPES,
    Case,
    attend,
    bitwise,
    dtype_name,
    gradients,
    int32,
    make_inputs,
    move,
)
from memory_probes import allocations, peak_growth_bytes

import tilewright
from tilewright import ShiftedSegments, native

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

CASES = {
    "gqa-causal": Case(77, 77, 8, 2, head_dim=40, is_causal=True, batch=2),
    "window": Case(130, 130, 4, 4, head_dim=32, window=(33, 17)),
    "shifted-odd-kv": Case(100, 100, 6, 3, is_causal=True, segments=ShiftedSegments(32)),
    "packed": Case(documents=((33, 33), (0, 0), (1, 1), (70, 90)), heads=4, is_causal=True),
    "many-keys-one-head": Case(5, 900, 1, 1, head_dim=64),
    "sinks-softcap": Case(90, 90, 4, 1, head_dim=24, softcap=4.0, sinks=True, is_causal=True),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@by_dtype
@by_case
def test_fifty_runs_give_the_same_bits(kernel_once, case, dtype):
    q, k, v, dout, options = make_inputs(case, dtype)
    first = gradients(kernel_once, q, k, v, dout, **options)
    for n in range(49):
        assert bitwise(first, gradients(kernel_once, q, k, v, dout, **options)), f"run {n + 2}"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@by_dtype
@by_case
def test_any_number_of_threads_gives_the_same_bits(kernel, threads, case, dtype):
    q, k, v, dout, options = make_inputs(case, dtype)
    threads(1)
    alone = gradients(kernel, q, k, v, dout, **options)
    for n in (2, 3, 5):
        threads(n)
        assert bitwise(alone, gradients(kernel, q, k, v, dout, **options)), f"{n} threads"


def test_the_gradient_of_one_sink_for_any_number_of_threads(kernel_once, threads):
    """One number out of 50,000 rows: a reduction that torch itself would split by threads."""
    case = Case(50_000, 2, 1, 1, head_dim=4, window=(None, 60_000), sinks=True)
    q, k, v, dout, options = make_inputs(case, torch.float32)
    threads(1)
    alone = gradients(kernel_once, q, k, v, dout, **options)
    for n in (2, 3):
        threads(n)
        assert bitwise(alone.dsinks, gradients(kernel_once, q, k, v, dout, **options).dsinks)


def test_race_hunt(kernel_once, threads):
    """Many short rows of odd length over more threads than processors, again and again."""
    case = Case(19, 23, 3, 1, head_dim=8, is_causal=True, batch=60)
    q, k, v, dout, options = make_inputs(case, torch.bfloat16)
    threads(7)
    first = gradients(kernel_once, q, k, v, dout, **options)
    for n in range(249):
        assert bitwise(first, gradients(kernel_once, q, k, v, dout, **options)), f"run {n + 2}"


@by_dtype
@pytest.mark.parametrize("segments", [None, ShiftedSegments(24)], ids=["dense", "shifted"])
def test_other_batch_rows_do_not_matter(kernel, segments, dtype):
    case = Case(75, 75, 6, 2, head_dim=40, batch=4, is_causal=True, segments=segments)
    q, k, v, dout, options = make_inputs(case, dtype)
    everyone = gradients(kernel, q, k, v, dout, **options)
    for rows in ([2], [3, 1], [1, 2, 3, 0], [0, 0, 0, 0, 0, 0, 2]):
        some = gradients(kernel, *(t[rows] for t in (q, k, v, dout)), **options)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert bitwise(getattr(everyone, name)[rows], getattr(some, name)), (name, rows)


@by_dtype
def test_other_heads_do_not_matter(kernel, dtype):
    q, k, v, dout, options = make_inputs(Case(60, 60, 6, 2, head_dim=32, is_causal=True), dtype)
    everyone = gradients(kernel, q, k, v, dout, **options)
    for group in range(2):
        heads, kv = slice(3 * group, 3 * group + 3), slice(group, group + 1)
        alone = gradients(
            kernel, q[:, :, heads], k[:, :, kv], v[:, :, kv], dout[:, :, heads], **options
        )
        assert bitwise(alone.out, everyone.out[:, :, heads])
        assert bitwise(alone.dq, everyone.dq[:, :, heads])
        assert bitwise(alone.dk, everyone.dk[:, :, kv])
        assert bitwise(alone.dv, everyone.dv[:, :, kv])


@by_dtype
@pytest.mark.parametrize("segments", [None, ShiftedSegments(24)], ids=["dense", "shifted"])
def test_other_documents_do_not_matter(kernel, segments, dtype):
    """A document keeps its bits when others are edited, permuted, added, or hold NaN."""
    lengths = (40, 75, 1, 33)
    case = Case(documents=tuple((n, n) for n in lengths), heads=4, kv_heads=2, head_dim=24,
                is_causal=True, segments=segments)  # fmt: skip
    q, k, v, dout, options = make_inputs(case, dtype)
    before = gradients(kernel, q, k, v, dout, **options)
    second = slice(40, 115)
    for spoil in (lambda t: t * 2, lambda t: t.fill_(float("nan"))):
        changed = [t.clone() for t in (q, k, v, dout)]
        for t in changed:
            for part in (slice(0, 40), slice(115, None)):
                t[part] = spoil(t[part])
        after = gradients(kernel, *changed, **options)
        for name in ("out", "dq", "dk", "dv"):
            assert bitwise(getattr(after, name)[second], getattr(before, name)[second]), name
        assert bitwise(after.lse[:, second], before.lse[:, second])
    alone = [t[second] for t in (q, k, v, dout)]
    options = options | {"cu_seqlens": int32([0, 75]), "cu_seqlens_k": int32([0, 75])}
    by_itself = gradients(kernel, *alone, **options)
    for name in ("out", "dq", "dk", "dv"):
        assert bitwise(getattr(by_itself, name), getattr(before, name)[second]), name


@by_dtype
@by_case
def test_what_fresh_memory_held_does_not_matter(impl, monkeypatch, case, dtype):
    """NaN in fresh memory (conftest.py) against ones: the same bits, and all of them written."""
    q, k, v, dout, options = make_inputs(case, dtype)
    poisoned = gradients(impl, q, k, v, dout, **options)
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(poisoned, name).isfinite().all(), name
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        nan_filled = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=nan_filled, **o: _f(*a, **o).nan_to_num(1.0))
    assert bitwise(poisoned, gradients(impl, q, k, v, dout, **options))


HEAP_SCRIPT = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from attention_inputs import DTYPES, make_inputs, with_gradients
from test_attention_stability import CASES
import tilewright
digest = hashlib.sha256()
for case in CASES.values():
    for dtype in DTYPES:
        q, k, v, dout, options = make_inputs(case, dtype)
        r = with_gradients(
            lambda *a, **o: tilewright.flash_attention(*a, impl="cpp_cpu", **o),
            q, k, v, dout, **options)
        for t in (r.out, r.lse, r.dq, r.dk, r.dv):
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    lengths = torch.tensor([70, 3], dtype=torch.int32)
    q, cache = torch.ones(2, 1, 4, 16), torch.linspace(-1, 1, 2 * 80 * 2 * 16).view(2, 80, 2, 16)
    out = tilewright.flash_decode(q, cache, cache, key_lengths=lengths, impl="cpp_cpu")
    digest.update(out.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_what_the_heap_held_does_not_matter():
    """The C++ kernels' own scratch: glibc fills fresh and freed heap memory with a byte."""
    q = torch.zeros(1, 4, 2, 8)
    explanation = tilewright.explain("flash_attention", q, q, q)
    if explanation.chosen != "cpp_cpu":
        pytest.skip(f"cpp_cpu: {explanation.reasons['cpp_cpu']}")
    digests = set()
    for byte in ("0", "1", "128"):  # 128: fresh 0x7f bytes are 3.4e38, freed 0x80 ones tiny
        environment = os.environ | {"MALLOC_PERTURB_": byte, "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(
            [sys.executable, "-P", "-c", HEAP_SCRIPT, str(Path(__file__).parent)],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_the_profiler_counts_what_torch_allocates():
    assert sum(allocations(lambda: torch.ones(1000).clone())) == 2 * 4000


MEMORY_CASES = {
    "dense": Case(512, 512, 8, 8, head_dim=64, is_causal=True),
    "shifted": Case(512, 512, 8, 8, head_dim=64, is_causal=True, segments=ShiftedSegments(128)),
    "shifted-gqa": Case(512, 512, 8, 2, head_dim=64, is_causal=True, segments=ShiftedSegments(64)),
    "packed": Case(documents=((300, 300), (212, 212)), heads=8, kv_heads=8, is_causal=True),
}


@by_dtype
@pytest.mark.parametrize("case", MEMORY_CASES.values(), ids=MEMORY_CASES)
def test_forward_allocates_out_and_lse_alone(kernel_once, case, dtype):
    q, k, v, _, options = make_inputs(case, dtype)
    options = move(options, kernel_once.device)
    q, k, v = (t.to(kernel_once.device) for t in (q, k, v))
    attend(kernel_once, q, k, v, **options)
    if kernel_once.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = attend(kernel_once, q, k, v, return_lse=True, **options)
        torch.cuda.synchronize()
        allocated = torch.cuda.max_memory_allocated() - before
    else:
        out, lse = attend(kernel_once, q, k, v, return_lse=True, **options)
        allocated = sum(allocations(lambda: attend(kernel_once, q, k, v, **options)))
    results = out.numel() * out.element_size() + lse.numel() * lse.element_size()
    assert results <= allocated < results + 16384, (results, allocated)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("segments", [None, ShiftedSegments(256)], ids=["dense", "shifted"])
def test_scratch_packs_as_many_heads_as_threads(kernel_once, threads, segments, dtype):
    """The C++ kernels' own memory, which torch does not see: no L x L, and K and V packed in the
    compute dtype (float32 for float16) for one key/value head a thread, not for all of them; with
    segments only the keys of a stretch of queries, in waves of 8 MiB whatever the length."""
    if kernel_once.device != "cpu":
        pytest.skip("measured by the allocator in the test above")
    threads(2)
    n_keys, heads = 32768, 8
    n_queries = n_keys if segments else 128
    q = torch.randn(1, n_queries, heads, 64).to(dtype)
    k = torch.randn(1, n_keys, heads, 64).to(dtype)
    options = {"is_causal": True, "segments": segments, "return_lse": True}
    kept = [attend(kernel_once, q[:, :64], k[:, :64], k[:, :64], **options)]
    growth = peak_growth_bytes(lambda: kept.append(attend(kernel_once, q, k, k, **options)))
    results = sum(t.numel() * t.element_size() for t in kept[1])
    stays_bf16 = dtype == torch.bfloat16 and native.native().isa() in ("avx512_bf16", "amx")
    packed_size = 2 if stays_bf16 else 4
    packed = 2 * 2 * n_keys * 64 * packed_size  # K and V, two threads
    scratch = growth - results
    most = 12 * 2**20 if segments else 1.25 * packed  # a wave, and the threads' own tiles
    assert scratch < most, f"{scratch / 2**20:.1f} MiB, need {most / 2**20:.1f} MiB"


def test_nothing_is_kept_for_the_backward_but_the_inputs_and_the_results(kernel_once):
    q, k, v, _, _ = make_inputs(Case(128, 128, 4, 2), torch.float32)
    leaves = [t.to(kernel_once.device).requires_grad_() for t in (q, k, v)]
    saved = []

    def keep(t):
        saved.append((t.data_ptr(), t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out, lse = attend(kernel_once, *leaves, is_causal=True, return_lse=True)
    known = {t.data_ptr() for t in (*leaves, out, lse)}
    assert {pointer for pointer, _ in saved} <= known
