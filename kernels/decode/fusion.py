"""How strong each expert of a fusion is: root finding over sums that a kernel delivers.

A row's iteration looks at nothing but that row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

# sums(z, tuned, base, a): (B, 3), log of the sum of exp(z + d), mean and variance of d, where
# d = sum over t of a[:, t] (tuned[t] - base)
Sums = Callable[[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]
# root(z, tuned, base, wanted, direction, most): (B,), `root_by_sums` in one call
Root = Callable[..., torch.Tensor]

TOLERANCE = 1e-9  # of a divergence
NOTHING = 1e-12  # a divergence that is rounding
MOST_PASSES = 60
MOST_GRID_POINTS = 100_000


class Divergence:
    """KL(softmax(z + s d) || softmax(z)) and its slope in s, for d = sum over t of a_t delta_t."""

    def __init__(self, sums: Sums, z, tuned, base):
        self.sums, self.z, self.tuned, self.base = sums, z, tuned, base
        zero = torch.zeros(z.shape[0], len(tuned), dtype=torch.float64, device=z.device)
        self.unchanged = sums(z, tuned, base, zero)[:, 0]

    def __call__(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """At strengths a (B, T): the divergence, and its derivative by log s at s = 1."""
        log_sum, mean, variance = self.sums(self.z, self.tuned, self.base, a).unbind(1)
        return (mean - (log_sum - self.unchanged)).clamp(min=0), variance.clamp(min=0)


def strengths(
    sums: Sums, large, tuned, base, rule: str, a_max: float, points: int, root: Root | None = None
):
    """(B, T) float64 by a rule of `fuse_logits`; by `root` where an implementation has one."""
    ones = torch.ones(large.shape[0], 1, dtype=torch.float64, device=large.device)
    wanted = [Divergence(sums, base, [t], base)(ones)[0] for t in tuned]
    expect_finite(wanted)
    if rule == "grid":
        return _grid(Divergence(sums, large, tuned, base), wanted, a_max, points)

    def solve(experts, wanted, direction, most):
        if root is None:
            return root_by_sums(Divergence(sums, large, experts, base), wanted, direction, most)
        found = root(large, experts, base, wanted, direction, most)
        expect_finite([found])
        return found

    most = torch.full_like(ones[:, 0], a_max)
    a = torch.stack([solve([t], w, ones, most) for t, w in zip(tuned, wanted, strict=True)], 1)
    if len(tuned) == 1:
        return a
    largest = a.amax(1)
    mean = torch.stack(wanted, 1).mean(1)
    mean = torch.where(largest > 0, mean, 0.0)
    most = a_max / torch.where(largest > 0, largest, 1.0)
    return a * solve(tuned, mean, a, most)[:, None]


def root_by_sums(divergence: Divergence, wanted, direction, most) -> torch.Tensor:
    """(B,): the s in [0, most] where the divergence at s * direction is `wanted`, or `most`.

    Newton on the root of the divergence, which is nearly straight, inside a bracket; from s = 1.
    """
    low, high = torch.zeros_like(wanted), most.clone()
    s = torch.minimum(torch.ones_like(most), most)
    is_done = wanted <= NOTHING
    s = torch.where(is_done, 0.0, s)
    for _ in range(MOST_PASSES):
        if bool(is_done.all()):
            break
        value, by_log = divergence(s[:, None] * direction)
        expect_finite([value])
        is_below = value < wanted
        low, high = torch.where(is_below, s, low), torch.where(is_below, high, s)
        is_done = is_done | ((value - wanted).abs() <= TOLERANCE) | (is_below & (s >= most))
        is_done = is_done | (high - low <= 1e-15 * most)
        root = value.sqrt()
        step = (wanted.sqrt() - root) * 2 * root * s / by_log
        following = s + step
        # out of the bracket above, its end is tried: the divergence may never get there
        following = torch.where((following >= high) & (high == most), most, following)
        is_inside = (following > low) & ((following < high) | (following == most))
        following = torch.where(is_inside, following, (low + high) / 2)
        s = torch.where(is_done, s, following)
    return s


def _grid(divergence: Divergence, wanted, a_max: float, points: int) -> torch.Tensor:
    """The first of the grid's points with the least sum over t of (KL - K_t)^2."""
    ticks = torch.linspace(0, a_max, points, dtype=torch.float64)
    n_rows, n_experts = len(wanted[0]), len(wanted)
    best = torch.full_like(wanted[0], torch.inf)
    a = best.new_zeros(n_rows, n_experts)
    for point in itertools.product(ticks.tolist(), repeat=n_experts):
        candidate = a.new_tensor(point).expand(n_rows, -1)
        value, _ = divergence(candidate)
        expect_finite([value])
        miss = sum((value - w) ** 2 for w in wanted)
        is_better = miss < best
        best, a = torch.where(is_better, miss, best), torch.where(is_better[:, None], candidate, a)
    return a


def expect_finite(divergences) -> None:
    for each in divergences:
        if not bool(each.isfinite().all()):
            row = int((~each.isfinite()).nonzero()[0])
            raise ValueError(
                f"fuse_logits: row {row} of large, tuned or base holds NaN or infinite logits, "
                "need finite ones (-inf in large alone is allowed)"
            )
