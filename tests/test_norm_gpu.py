"""The Triton kernels of the norm room on a GPU: every case, wide rows, order, large offsets."""

import norm_cases
import pytest
import torch
from norm_cases import CASES, both_ways, exact, module_forward, normal
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
LARGE = {
    "rms, 4096": norm_cases.rms(500, 4096, residual=True),
    "rms, 50000": norm_cases.rms(9, 50000),
    "layer, 16384": norm_cases.layer(40, 16384),
    "layer, 20000": norm_cases.layer(9, 20000, residual=True),
    "rope, 32 heads": norm_cases.rotary(2, 700, 32, 128, heads_first=True),
    "swiglu, 11008": norm_cases.gated(300, 11008),
    "embedding, 32000": norm_cases.looked_up(32000, 512, 3000),
}


def on_gpu(tensors):
    return {name: t.cuda() for name, t in tensors.items()}


@by_dtype
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_results_and_gradients(name, dtype):
    case = {**CASES, **LARGE}[name]
    tensors = case.make(dtype)
    ours = both_ways(case.ours, on_gpu(tensors), case.leaves, impl="triton_gpu")
    stock = both_ways(case.stock, on_gpu(tensors), case.leaves)
    truth = both_ways(case.ours, exact(tensors), case.leaves, impl="reference")
    for part, true in truth.items():
        terms = torch.full_like(true, 10.0) if part in ("dweight", "dbias") else None
        assert ours[part].dtype == stock[part].dtype
        assert_errs_at_most_twice_stock(part, ours[part], stock[part], true, terms)


@pytest.mark.parametrize("name", LARGE)
def test_runs_agree_bit_by_bit(name):
    tensors = on_gpu(LARGE[name].make(torch.bfloat16))
    runs = [both_ways(LARGE[name].ours, tensors, LARGE[name].leaves) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(run[part], runs[0][part]) for part in run)


def test_bfloat16_is_nearly_always_bitwise_that_of_transformers():
    x, weight = (normal(*s, dtype=torch.bfloat16).cuda() for s in ((300, 4096), (4096,)))
    want = module_forward(LlamaRMSNorm, x, weight, 1e-6)
    assert (ops.rms_norm(x, weight) != want).float().mean() < 1e-3


def test_offsets_past_32_bits():
    n_rows = 2**31 // 4096 + 3
    x = torch.empty(n_rows, 4096, dtype=torch.bfloat16, device="cuda").fill_(1.0)
    x[-1, :2048] = 3.0
    y = ops.rms_norm(x)
    assert (y[-1, 0] / y[-1, -1] - 3).abs() < 0.05 and (y[-2] - 1).abs().max() < 0.01


def test_ids_out_of_range_become_nan():
    y = ops.embedding(torch.tensor([1, 5, -1], device="cuda"), normal(5, 8).cuda())
    assert y[0].isfinite().all() and y[1:].isnan().all()


def test_no_call_waits_for_the_gpu():
    tensors = {name: on_gpu(case.make(torch.bfloat16)) for name, case in LARGE.items()}
    for _ in range(2):  # the first time kernels are compiled
        for name, case in LARGE.items():
            both_ways(case.ours, tensors[name], case.leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in ("rms, 4096", "rope, 32 heads", "swiglu, 11008"):
            case = LARGE[name]
            case.ours(**tensors[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")
