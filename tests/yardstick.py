"""How wrong a result may be: at most twice as wrong as stock torch in the same dtype."""

import torch


def rms(t: torch.Tensor) -> float:
    """Root mean square; 0 for an empty tensor."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def largest(t: torch.Tensor) -> float:
    """The largest magnitude; 0 for an empty tensor."""
    return t.double().abs().max().item() if t.numel() else 0.0


def assert_errs_at_most_twice_stock(name, ours, stock, truth, terms=None, cancelled=None):
    """The error-ratio rule, by root mean square and for the single largest element.

    ours, stock   results in the dtype under test
    truth         float64, or the same with infinities, which must then be met exactly
    terms         the sum of the magnitudes of what is summed up in float32; default |truth|
    cancelled     the part of it whose sums truly cancel to 0; default none

    The floors are one rounding: eps / 2 by root mean square and eps for the largest element, of the
    truth in the dtype under test, or of the cancelled terms (for the largest: of the terms) in
    float32.
    """
    terms = truth.abs() if terms is None else terms
    cancelled = torch.zeros_like(truth) if cancelled is None else cancelled
    parts = [t.detach().cpu() for t in (ours, stock, truth, terms, cancelled)]
    ours, stock, truth, *_ = parts
    assert ours.shape == truth.shape == stock.shape, f"{name}: {ours.shape}, need {truth.shape}"
    eps, eps32 = torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps
    infinite = truth.isinf()
    assert torch.equal(ours[infinite].double(), truth[infinite]), f"{name}: wrong infinities"
    ours, stock, truth, terms, cancelled = (t[~infinite].double() for t in parts)
    assert bool(ours.isfinite().all()), f"{name}: {(~ours.isfinite()).sum()} elements not finite"

    error, stock_error = rms(ours - truth), rms(stock - truth)
    budget = max(2 * stock_error, eps / 2 * rms(truth), eps32 / 2 * rms(cancelled))
    assert error <= budget, (
        f"{name}: rms error {error:.3e}, stock torch has {stock_error:.3e}, budget {budget:.3e}"
    )
    error, stock_error = largest(ours - truth), largest(stock - truth)
    budget = 2 * stock_error + max(eps * largest(truth), eps32 * largest(terms))
    assert error <= budget, (
        f"{name}: largest error {error:.3e}, stock torch has {stock_error:.3e}, budget {budget:.3e}"
    )
