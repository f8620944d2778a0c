"""How wrong a result may be: at most twice as wrong as stock torch in the same dtype."""

import torch


def rms(t: torch.Tensor) -> float:
    """Root mean square; 0 for an empty tensor."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def largest(t: torch.Tensor) -> float:
    """The largest magnitude; 0 for an empty tensor."""
    return t.double().abs().max().item() if t.numel() else 0.0


def assert_errs_at_most_twice_stock(name, ours, stock, truth, terms=None):
    """The error-ratio rule, by root mean square and for the single largest element.

    ours, stock   results in the dtype under test
    truth         float64, or the same with infinities, which must then be met exactly
    terms         the sum of the magnitudes of what is summed up in float32; default none

    The floors are eps / 2 by root mean square and eps for the largest element: of the truth in the
    dtype under test, and of the terms in float32.
    """
    terms = torch.zeros_like(truth) if terms is None else terms
    # A float32 sum of n terms of either sign, one after the other, errs by about 0.2 eps of the sum
    # of their magnitudes whatever n: partial sums grow as sqrt(k). A result chains a few sums.
    ours, stock, truth, terms = (t.detach().cpu() for t in (ours, stock, truth, terms))
    assert ours.shape == truth.shape == stock.shape, f"{name}: {ours.shape}, need {truth.shape}"
    eps, eps32 = torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps
    infinite = truth.isinf()
    assert torch.equal(ours[infinite].double(), truth[infinite]), f"{name}: wrong infinities"
    if infinite.any():
        ours, stock, truth, terms = (t[~infinite] for t in (ours, stock, truth, terms))
    ours, stock, truth, terms = (t.double() for t in (ours, stock, truth, terms))
    assert bool(ours.isfinite().all()), f"{name}: {(~ours.isfinite()).sum()} elements not finite"

    error, stock_error = rms(ours - truth), rms(stock - truth)
    budget = max(2 * stock_error, eps / 2 * rms(truth), eps32 / 2 * rms(terms))
    assert error <= budget, (
        f"{name}: rms error {error:.3e}, stock torch has {stock_error:.3e}, budget {budget:.3e}"
    )
    error, stock_error = largest(ours - truth), largest(stock - truth)
    budget = 2 * stock_error + max(eps * largest(truth), eps32 * largest(terms))
    assert error <= budget, (
        f"{name}: largest error {error:.3e}, stock torch has {stock_error:.3e}, budget {budget:.3e}"
    )
