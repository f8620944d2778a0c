"""The sparse room's public functions: docstrings, checks, and the call into what does the work."""

from __future__ import annotations

import math

import torch

from tilewright import choose
from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.sparse import op, regrow
from tilewright.ops.sparse.regrow import Regrowth
from tilewright.shapes import expect_device, expect_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCHEDULES = ("linear", "cosine")


def largest_gradients(
    dy: torch.Tensor, x: torch.Tensor, k: int, *, impl: str = "auto"
) -> torch.Tensor:
    """Where a linear layer's weight gradient is largest, without the gradient in memory.

        the k places of the largest |G[o, i]|,   G[o, i] = sum_t dy[t, o] x[t, i]

    dy     (T, O) or (..., O)
    x      (T, I) or (..., I), in the dtype of dy; T may be 0
    k      how many, 0 <= k <= O I
    impl   "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns (k,) int64 flat places o I + i, ascending. Of equal entries those come first whose
    place does, so that the set is one and the same for any number of threads. Entries are
    float32 sums (float64 of float64); a tile of them is made, looked through and forgotten.
    ValueError: a shape, dtype or k outside the above; fewer than k entries are numbers.
    RuntimeError: `impl` was named and cannot run here.

    Source: Ansell et al., Scaling sparse fine-tuning to large language models, arXiv 2401.16405,
    section 3.
    """
    _, dy, x = _describe(dy, x, k)
    return op.largest_gradients(dy, x, k, impl)


def _describe(dy, x, k):
    name = "largest_gradients"
    expect_dtype(name, DTYPES, dy=dy, x=x)
    expect_device(name, dy=dy, x=x)
    if dy.dim() < 2 or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{name}: dy has shape {tuple(dy.shape)} and x {tuple(x.shape)}, need (..., O) and "
            "(..., I) with the same leading axes, at least one"
        )
    size = dy.shape[-1] * x.shape[-1]
    if not isinstance(k, int) or not 0 <= k <= size:
        raise ValueError(f"{name}: k is {k}, need a whole number, 0 <= k <= O I = {size}")
    tokens = math.prod(x.shape[:-1])
    dy, x = (t.detach().reshape(tokens, t.shape[-1]) for t in (dy, x))
    return op.problem_of(dy, x, k), dy, x


def regrow_by_gradient(
    delta: WeightDelta, candidates: torch.Tensor, scores: torch.Tensor, count: int
) -> Regrowth:
    """One exchange of SpIEL-AG: the smallest values give way to the candidates of largest gradient.

    delta        N values at places of (O, I)
    candidates   (C,) int64 flat places, ascending, such as `largest_gradients` returns; places that
                 have a value already may be among them
    scores       (C,) of each candidate: its summed gradient; the magnitude counts
    count        how many values give way, at most N; `share_to_regrow` says how many

    Of the `count` smallest |values|, those stay as they are that are among the `count` best
    candidates; candidates at surviving places are passed over. For each new place one value
    leaves, the smallest first; fewer do if there are fewer candidates. So N stays the same.
    Equal ones: the first place wins.
    ValueError: tensors that do not fit, candidates not ascending, a NaN among values or scores.

    Source: Ansell et al., arXiv 2401.16405, section 3.1.
    """
    name = "regrow_by_gradient"
    delta.expect_whole(name)
    _expect_count(name, delta, count)
    _expect_numbers(name, values=delta.values, scores=scores)
    size = delta.out_features * delta.in_features
    if candidates.dtype != torch.int64 or candidates.shape != scores.shape or scores.dim() != 1:
        raise ValueError(
            f"{name}: candidates are {candidates.dtype} of shape {tuple(candidates.shape)} and "
            f"scores of {tuple(scores.shape)}, need int64 of (C,) and as many scores"
        )
    if len(candidates):
        if not bool((candidates.diff() > 0).all()):
            raise ValueError(f"{name}: candidates do not ascend, need each place once and in order")
        if int(candidates[0]) < 0 or int(candidates[-1]) >= size:
            stray = int(candidates[0]) if int(candidates[0]) < 0 else int(candidates[-1])
            raise ValueError(f"{name}: candidate {stray}, need 0 <= place < O I = {size}")
    return regrow.exchange(delta, candidates, scores.abs(), count)


def regrow_by_extremes(
    delta: WeightDelta, row_extremes: torch.Tensor, column_extremes: torch.Tensor, count: int
) -> Regrowth:
    """One exchange of SpIEL-MA: the smallest values give way to the places that SM3 thinks largest.

        score[o, i] = row_extremes[o] column_extremes[i],   at places without a value

    delta            N values at places of (O, I)
    row_extremes     (O,) float32, not negative: SM3's largest squared gradient of each row
    column_extremes  (I,) of each column
    count            how many values give way, at most N

    Places of score 0 never come, so that fewer than `count` values may leave. The outer product is
    not laid out: a bound on it is found by bisection. Of equal scores the first place wins.
    ValueError: tensors that do not fit, a NaN or a negative extreme.

    Source: Ansell et al., arXiv 2401.16405, section 3.2; Anil et al., Memory-efficient adaptive
    optimization, arXiv 1901.11150.
    """
    name = "regrow_by_extremes"
    delta.expect_whole(name)
    _expect_count(name, delta, count)
    _expect_numbers(
        name, values=delta.values, row_extremes=row_extremes, column_extremes=column_extremes
    )
    for argument, t, axis, n in (
        ("row_extremes", row_extremes, "O", delta.out_features),
        ("column_extremes", column_extremes, "I", delta.in_features),
    ):
        if t.shape != (n,) or t.dtype != torch.float32:
            raise ValueError(
                f"{name}: {argument} is {t.dtype} of shape {tuple(t.shape)}, need float32 of "
                f"({n},): {axis} as in delta"
            )
        if bool((t < 0).any()):
            raise ValueError(f"{name}: {argument} holds {float(t.min())}, need none negative")
    places, scores = regrow.best_products(row_extremes, column_extremes, delta.places(), count)
    return regrow.exchange(delta, places, scores, min(count, len(places)))


def share_to_regrow(
    step: int, last_step: int, *, schedule: str = "linear", share: float = 0.2,
    is_first: bool = False,
) -> float:  # fmt: skip
    """The share of a delta's values that give way in an exchange of SpIEL.

        linear   1 the first time, then share (1 - step / last_step)
        cosine   share (1 + cos(pi step / last_step)) / 2

    step        optimizer steps done, 0 <= step
    last_step   after which nothing is exchanged
    schedule    "linear" or "cosine"
    share       at step 0, 0 <= share <= 1
    is_first    whether this is the first exchange of the training

    Returns a number from 0 to 1; of a delta's (N,) values floor(N times it) give way.
    ValueError: an argument outside the above.

    Source: Ansell et al., arXiv 2401.16405, section 3, and its published implementation.
    """
    name = "share_to_regrow"
    if schedule not in SCHEDULES:
        raise ValueError(f"{name}: no schedule {schedule!r}. Known: {', '.join(SCHEDULES)}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name}: share is {share}, need 0 <= share <= 1")
    if step < 0 or last_step < 1:
        raise ValueError(f"{name}: step is {step} of {last_step}, need 0 or more of at least 1")
    if step > last_step:
        return 0.0
    if schedule == "cosine":
        return share * (1 + math.cos(math.pi * step / last_step)) / 2
    return 1.0 if is_first else share * (1 - step / last_step)


@torch.no_grad()
def merge_delta(weight: torch.Tensor, delta: WeightDelta) -> torch.Tensor:
    """Add a sparse delta to a dense weight in place, and return what it overwrote.

        weight[o, i] = round(weight[o, i] + value)   at the places of delta

    weight   (O, I) of any floating dtype; the sum is rounded to it once, from float32 or better
    delta    N values; a value far below the weight's last place is lost in it

    Returns (N,) in the weight's dtype, which `unmerge_delta` puts back to the last bit.
    ValueError: a packed weight, which cannot hold such a change; another shape or device.

    Source: Ansell et al., arXiv 2401.16405.
    """
    flat, places = _places_in("merge_delta", weight, delta)
    kept = flat[places]
    wide = torch.promote_types(torch.float32, weight.dtype)
    flat[places] = (kept.to(wide) + delta.values.to(wide)).to(weight.dtype)
    return kept


@torch.no_grad()
def unmerge_delta(weight: torch.Tensor, delta: WeightDelta, kept: torch.Tensor) -> None:
    """Put back, in place, what `merge_delta` overwrote: the weight has its old bits again.

    weight   (O, I), the one that was merged into
    delta    the one that was merged; its values are not read
    kept     (N,) what `merge_delta` returned

    ValueError: a packed weight; another shape, dtype or device.

    Source: Ansell et al., arXiv 2401.16405.
    """
    flat, places = _places_in("unmerge_delta", weight, delta)
    if kept.shape != places.shape or kept.dtype != weight.dtype:
        raise ValueError(
            f"unmerge_delta: kept is {kept.dtype} of shape {tuple(kept.shape)}, need "
            f"{weight.dtype} of ({delta.nnz},) as merge_delta returned it"
        )
    flat[places] = kept


def _places_in(name: str, weight: torch.Tensor, delta: WeightDelta):
    """The weight as one row, a view of it, and the places of the delta in it."""
    if isinstance(weight, PackedWeight):
        raise ValueError(
            f"{name}: weight is packed in {weight.format}, need a dense one; dequantize it first, "
            "or leave the delta beside it"
        )
    if tuple(weight.shape) != delta.shape:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, need {delta.shape}")
    expect_device(name, weight=weight, **{"delta's columns": delta.columns})
    delta.expect_whole(name)
    if not weight.is_contiguous():
        raise ValueError(f"{name}: weight is not contiguous, need rows one after the other")
    return weight.detach().view(-1), delta.places()


def _expect_count(name: str, delta: WeightDelta, count: int) -> None:
    if not isinstance(count, int) or not 0 <= count <= delta.nnz:
        raise ValueError(f"{name}: count is {count}, need a whole number, 0 <= count <= N = "
                         f"{delta.nnz}")  # fmt: skip


def _expect_numbers(name: str, **tensors: torch.Tensor) -> None:
    for argument, t in tensors.items():
        if bool(t.isnan().any()):
            raise ValueError(f"{name}: {argument} holds NaN, need numbers")


def _sample_problems() -> dict[str, object]:
    """What `doctor` asks about: a usual training shape."""
    return {
        label: op.Problem(
            device, dtype, tokens=512, in_features=4096, out_features=4096, k=4096 * 4096 // 100
        )
        for label, device, dtype in choose.usual_types()
    }


choose.register(
    choose.Operator(
        "largest_gradients",
        (
            choose.implementation_of("sparse", "triton_gpu"),
            choose.implementation_of("sparse", "cpp_cpu"),
            choose.REFERENCE,
        ),
        lambda dy, x, k, impl="auto": _describe(dy, x, k)[0],
        _sample_problems,
    )
)
