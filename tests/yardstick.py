"""How wrong a result may be: at most twice as wrong as stock torch in the same dtype."""

import torch


def rms(t: torch.Tensor) -> float:
    """Root mean square; 0 for an empty tensor."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def largest(t: torch.Tensor) -> float:
    """The largest magnitude; 0 for an empty tensor."""
    return t.double().abs().max().item() if t.numel() else 0.0


def assert_errs_at_most_twice_stock(name, ours, stock, truth, dtype=None):
    """The error-ratio rule, by root mean square and for the single largest element.

    ours, stock   results in the dtype under test
    truth         float64, or the same with infinities, which must then be met exactly
    dtype         whose rounding is allowed in any case; default ours.dtype

    The floor by root mean square is one last rounding, eps / 2; for the largest element it is eps.
    """
    ours, stock, truth = (t.detach().cpu() for t in (ours, stock, truth))
    assert ours.shape == truth.shape == stock.shape, f"{name}: {ours.shape}, need {truth.shape}"
    eps = torch.finfo(dtype or ours.dtype).eps
    infinite = truth.isinf()
    assert torch.equal(ours[infinite].double(), truth[infinite]), f"{name}: wrong infinities"
    ours, stock, truth = (t[~infinite].double() for t in (ours, stock, truth))
    assert bool(ours.isfinite().all()), f"{name}: {(~ours.isfinite()).sum()} elements not finite"

    error, stock_error = rms(ours - truth), rms(stock - truth)
    budget = max(2 * stock_error, eps / 2 * rms(truth))
    assert error <= budget, (
        f"{name}: rms error {error:.3e}, stock torch has {stock_error:.3e}, budget {budget:.3e}"
    )
    error, stock_error = largest(ours - truth), largest(stock - truth)
    budget = 2 * stock_error + eps * largest(truth)
    assert error <= budget, (
        f"{name}: largest error {error:.3e}, stock torch has {stock_error:.3e}, budget {budget:.3e}"
    )
