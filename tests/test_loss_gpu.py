"""The Triton kernel of the loss room on a GPU: every case, large vocabularies, no waiting."""

import loss_cases
import pytest
import torch
from loss_cases import CASES, Case, both_ways, exact, make, normal
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
LARGE = {
    "128k": Case(3000, 64, 128256, ignored=9),
    "128k, each": Case(1500, 64, 128257, reduction="none", options={"softcap": 5.0}),
    "smoothing": Case(5000, 128, 32000, parts=("bias",), options={"label_smoothing": 0.1}),
}


def on_gpu(tensors):
    return {name: t.cuda() for name, t in tensors.items()}


@by_dtype
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_results_and_gradients(name, dtype):
    case = {**CASES, **LARGE}[name]
    tensors = make(case, dtype)
    results = both_ways(loss_cases.ours, case, on_gpu(tensors), impl="triton_gpu")
    stock = both_ways(loss_cases.stock, case, on_gpu(tensors))
    truth = both_ways(loss_cases.truth, case, on_gpu(exact(tensors)))
    for part, true in truth.items():
        terms = loss_cases.terms_of(case, tensors, part, true, dtype)
        terms = None if terms is None else terms.to(true)
        assert results[part].dtype == stock[part].dtype
        rest = f"{name}: {part}", results[part], stock[part], true, terms
        assert_errs_at_most_twice_stock(*rest)


@pytest.mark.parametrize("name", LARGE)
def test_runs_agree_bit_by_bit(name):
    tensors = on_gpu(make(LARGE[name], torch.bfloat16))
    runs = [both_ways(loss_cases.ours, LARGE[name], tensors) for _ in range(10)]
    for run in runs[1:]:
        assert all(torch.equal(run[part], runs[0][part]) for part in run)


def test_labels_out_of_range_become_nan():
    h, weight = normal(4, 64).cuda(), normal(50, 64, seed=1).cuda()
    y = ops.linear_log_probs(h, weight, torch.tensor([1, 50, -1, -100], device="cuda"))
    assert y.isnan().tolist() == [False, True, True, False] and y[3] == 0


def test_memory_is_that_of_a_block():
    """Of a frozen head: logits of 64k tokens would take 4 GiB."""
    h = normal(65536, 64, dtype=torch.bfloat16).cuda().requires_grad_()
    weight = normal(32000, 64, seed=1, dtype=torch.bfloat16).cuda()
    labels = torch.zeros(65536, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_cross_entropy(h, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 0.4e9


def test_no_call_waits_for_the_gpu():
    case = CASES["all at once"]
    tensors = on_gpu(make(case, torch.bfloat16))
    for _ in range(2):  # the first time the kernel is compiled
        both_ways(loss_cases.ours, case, tensors)
    leaves = {n: t.requires_grad_(n in loss_cases.LEAVES) if t.is_floating_point() else t
              for n, t in tensors.items()}  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_cases.ours(case, leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
