"""The Triton kernels of the norm room against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself.
"""

import norm_cases
import pytest
import torch
from norm_cases import CASES, both_ways, exact, normal
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops, settings
from tilewright.ops.norm import triton_gpu

DTYPES = (torch.float32, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def check(case, dtype):
    tensors = case.make(dtype)
    ours = both_ways(case.ours, tensors, case.leaves, impl="triton_gpu")
    stock = both_ways(case.stock, tensors, case.leaves)
    truth = both_ways(case.ours, exact(tensors), case.leaves, impl="reference")
    for part, true in truth.items():
        results = ours[part], stock[part], true
        assert ours[part].dtype == stock[part].dtype
        terms = torch.full_like(true, 10.0) if part in ("dweight", "dbias") else None
        assert_errs_at_most_twice_stock(part, *results, terms)
        if true.numel() and true.abs().max() > 0.5:
            spoilt = results[0] * (1.01 if dtype == torch.float32 else 1.04)
            with pytest.raises(AssertionError):
                assert_errs_at_most_twice_stock(part, spoilt, *results[1:], terms)
    return ours


@by_dtype
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("make", [norm_cases.rms, norm_cases.layer])
@pytest.mark.parametrize("residual", [False, True])
def test_rows_wider_than_a_tile(make, residual, monkeypatch):
    """Those are read again for each pass."""
    monkeypatch.setattr(triton_gpu, "_WHOLE", 64)
    monkeypatch.setattr(triton_gpu, "_LOOPED", 32)
    check(make(7, 150, residual=residual), torch.float32)


def test_sums_over_many_rows(monkeypatch):
    monkeypatch.setattr(triton_gpu, "_BLOCKS", 3)
    check(norm_cases.layer(130, 20), torch.float32)


def test_in_place_and_what_is_past_the_angles():
    joint = normal(2, 5, 3, 4, 16)
    tables = [f(norm_cases.angles(5, 6)) for f in (torch.cos, torch.sin)]
    want = ops.rope(joint[:, :, 1], *tables, impl="triton_gpu")
    kept = joint.clone()
    ops.rope(kept[:, :, 1], *tables, in_place=True, impl="triton_gpu")
    assert torch.equal(kept[:, :, 1], want) and torch.equal(kept[:, :, ::2], joint[:, :, ::2])


def test_ids_out_of_range_become_nan():
    y = ops.embedding(torch.tensor([1, 5, -1]), normal(5, 8), impl="triton_gpu")
    assert y[0].isfinite().all() and y[1:].isnan().all()
