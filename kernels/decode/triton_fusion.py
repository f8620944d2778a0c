"""Fusion of logits on a GPU: a row's divergences and its root, a row a program, in float64."""

import triton
import triton.language as tl

from tilewright.ops.decode.fusion import MOST_PASSES, NOTHING, TOLERANCE

ROUNDING = tl.constexpr(NOTHING)
NEAR = tl.constexpr(TOLERANCE)
PASSES = tl.constexpr(MOST_PASSES)
SIZES = ("n_experts",)  # a new number of them compiles nothing


@triton.jit
def at(
    z_ptr, tables_ptr, base_ptr, a_ptr, columns, row, z_stride, base_stride, s, n_experts,
    vocabulary,
):  # fmt: skip
    """x = z + d and d = s sum over t of a[row, t] (tuned[t] - base); x is -inf outside of the row

    tables   (T, 2) int64: where an expert's first row is, and its stride
    """
    inside = columns < vocabulary
    base = tl.load(base_ptr + row * base_stride + columns, mask=inside, other=0.0).to(tl.float64)
    d = tl.zeros_like(base)
    for t in tl.range(0, n_experts):
        a = tl.load(a_ptr + row * n_experts + t) * s
        tuned_ptr = tl.load(tables_ptr + 2 * t).to(base_ptr.dtype)
        stride = tl.load(tables_ptr + 2 * t + 1)
        tuned = tl.load(tuned_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float64)
        d += tl.where(a == 0.0, 0.0, a * (tuned - base))
    z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=float("-inf"))
    return z.to(tl.float64) + d, d


@triton.jit
def sums_of_row(
    z_ptr, tables_ptr, base_ptr, a_ptr, row, z_stride, base_stride, s, n_experts, vocabulary,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """log of the sum of exp(x), mean and variance of d: float64."""
    tops = tl.full((COLUMNS,), float("-inf"), tl.float64)
    for begin in tl.range(0, vocabulary, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        x, _ = at(
            z_ptr, tables_ptr, base_ptr, a_ptr, columns, row, z_stride, base_stride, s, n_experts,
            vocabulary,
        )  # fmt: skip
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops, 0)
    mass = tl.zeros((COLUMNS,), tl.float64)
    first = tl.zeros((COLUMNS,), tl.float64)
    second = tl.zeros((COLUMNS,), tl.float64)
    for begin in tl.range(0, vocabulary, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        x, d = at(
            z_ptr, tables_ptr, base_ptr, a_ptr, columns, row, z_stride, base_stride, s, n_experts,
            vocabulary,
        )  # fmt: skip
        weight = tl.exp(x - top)
        mass += weight
        first += weight * d
        second += weight * d * d
    total = tl.sum(mass, 0)
    mean = tl.sum(first, 0) / total
    return top + tl.log(total), mean, tl.sum(second, 0) / total - mean * mean


@triton.jit(do_not_specialize=SIZES)
def tilt_kernel(
    z_ptr, tables_ptr, base_ptr, a_ptr, sums_ptr, z_stride, base_stride, n_experts, vocabulary,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (B, 3) float64 as in csrc/decode/decode.h   a (B, T) float64"""
    row = tl.program_id(0).to(tl.int64)
    one = tl.load(a_ptr + row * n_experts) * 0.0 + 1.0
    log_sum, mean, variance = sums_of_row(
        z_ptr, tables_ptr, base_ptr, a_ptr, row, z_stride, base_stride, one, n_experts, vocabulary,
        COLUMNS,
    )  # fmt: skip
    tl.store(sums_ptr + 3 * row, log_sum)
    tl.store(sums_ptr + 3 * row + 1, mean)
    tl.store(sums_ptr + 3 * row + 2, variance)


@triton.jit(do_not_specialize=SIZES)
def root_kernel(
    z_ptr, tables_ptr, base_ptr, direction_ptr, wanted_ptr, most_ptr, found_ptr, z_stride,
    base_stride, n_experts, vocabulary, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`fusion.root_by_sums` of a row: found (B,) float64, NaN where a divergence is not finite

    direction (B, T), wanted and most (B,): float64
    """
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(wanted_ptr + row)
    most = tl.load(most_ptr + row)
    unchanged, _, _ = sums_of_row(
        z_ptr, tables_ptr, base_ptr, direction_ptr, row, z_stride, base_stride, 0.0 * most,
        n_experts, vocabulary, COLUMNS,
    )  # fmt: skip
    low = 0.0 * most
    high = most
    s = tl.minimum(1.0 + low, most)
    passes = 0
    is_done = wanted <= ROUNDING
    s = tl.where(is_done, 0.0, s)
    while (passes < PASSES) & (is_done == 0):
        log_sum, mean, variance = sums_of_row(
            z_ptr, tables_ptr, base_ptr, direction_ptr, row, z_stride, base_stride, s, n_experts,
            vocabulary, COLUMNS,
        )  # fmt: skip
        value = mean - (log_sum - unchanged)
        by_log = tl.where(variance < 0.0, 0.0, variance)
        is_strange = value != value
        value = tl.where(value < 0.0, 0.0, value)
        is_below = value < wanted
        low = tl.where(is_below, s, low)
        high = tl.where(is_below, high, s)
        is_done = (tl.abs(value - wanted) <= NEAR) | (is_below & (s >= most))
        is_done = is_done | (high - low <= 1e-15 * most) | is_strange
        root = tl.sqrt(value)
        following = s + (tl.sqrt(wanted) - root) * 2.0 * root * s / by_log
        # out of the bracket above, its end is tried: the divergence may never get there
        following = tl.where((following >= high) & (high == most), most, following)
        is_inside = (following > low) & ((following < high) | (following == most))
        following = tl.where(is_inside, following, (low + high) / 2.0)
        s = tl.where(is_done, s, following)
        s = tl.where(is_strange, float("nan"), s)
        passes += 1
    tl.store(found_ptr + row, s)
