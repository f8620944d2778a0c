"""The Triton kernel of the loss room against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself.
"""

import loss_cases
import pytest
import torch
from loss_cases import CASES, Case, both_ways, exact, make, normal
from yardstick import assert_errs_at_most_twice_stock, largest

from tilewright import ops, settings
from tilewright.ops.loss import triton_gpu


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def check(name, case, dtype):
    tensors = make(case, dtype)
    results = both_ways(loss_cases.ours, case, tensors, impl="triton_gpu")
    stock = both_ways(loss_cases.stock, case, tensors)
    truth = both_ways(loss_cases.truth, case, exact(tensors))
    for part, true in truth.items():
        assert results[part].dtype == stock[part].dtype
        terms = loss_cases.terms_of(case, tensors, part, true, dtype)
        rest = f"{name}: {part}", results[part], stock[part], true, terms
        assert_errs_at_most_twice_stock(*rest)
        is_gradient = part in ("dh", "dweight", "dbias")
        if is_gradient and case.size < 5 and terms is None and largest(true) > 0:
            spoilt = results[part] * (1.01 if dtype == torch.float32 else 1.04)
            with pytest.raises(AssertionError):
                assert_errs_at_most_twice_stock(part, spoilt, *rest[2:])


@pytest.mark.parametrize("name", [n for n in CASES if n != "several blocks"])
def test_results_and_gradients(name):
    check(name, CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["plain", "odd extents", "confident", "all at once, each"])
def test_float16(name):
    check(name, CASES[name], torch.float16)


@pytest.mark.parametrize("name", ["all at once", "all at once, each", "odd extents"])
def test_rows_wider_than_a_tile(name, monkeypatch):
    monkeypatch.setattr(triton_gpu, "COLUMNS", 32)
    check(name, CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["all at once", "all at once, each", "all ignored", "z"])
def test_tokens_without_labels_that_are_not_left_out(name, monkeypatch):
    """As on a GPU."""
    run = triton_gpu.blocks.run
    monkeypatch.setattr(triton_gpu.blocks, "run", lambda *a: run(*a[:-1], False))
    check(name, CASES[name], torch.float32)


def test_soft_targets():
    leaves, ids = [normal(9, 8), normal(40, 8, seed=1), normal(9, 5, seed=2).softmax(-1)], None
    ids = torch.randint(40, (9, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 4] = ids[:, 0]
    ids[::3, 3] = -1
    h, weight, probs = (t.requires_grad_() for t in leaves)
    found = [
        ops.linear_cross_entropy(
            h, weight, torch.arange(9), soft_ids=ids, soft_probs=probs, soft_weight=0.4, impl=impl
        )
        for impl in ("triton_gpu", "reference")
    ]
    grads = [torch.autograd.grad(loss, leaves) for loss in found]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="129 labels and soft targets of a token, need at most"):
        many = torch.zeros(9, 129, dtype=torch.long)
        ops.linear_cross_entropy(
            h, weight, soft_ids=many, soft_probs=many.float(), impl="triton_gpu"
        )


def test_log_probabilities_and_strays():
    h, weight = normal(4, 8).requires_grad_(), normal(20, 8, seed=1)
    labels = torch.tensor([3, -100, 19, 0])
    got = ops.linear_log_probs(h, weight, labels, impl="triton_gpu", softcap=3.0)
    want = ops.linear_log_probs(h, weight, labels, impl="reference", softcap=3.0)
    torch.testing.assert_close(got, want)
    upstream = normal(4, seed=3)
    grads = [torch.autograd.grad(y, h, upstream)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_an_offset_of_all_logits():
    case = Case(9, 8, 60, reduction="sum", options={"label_smoothing": 0.1})
    tensors = make(case, torch.float32)
    tensors["bias"] = torch.full((60,), 1e4)
    results = both_ways(loss_cases.ours, case, tensors, impl="triton_gpu")
    stock = both_ways(loss_cases.stock, case, tensors)
    truth = both_ways(loss_cases.truth, case, exact(tensors))
    for part, true in truth.items():
        assert_errs_at_most_twice_stock(part, results[part], stock[part], true)
