"""Passes over the tiles of a gradient -> the places of its largest entries.

A bound is guessed from some rows of the gradient, and a pass collects what is not below it: as a
rule a few more than k, of which the k largest are kept. Where it was too many or too few, the next
pass has another bound. Where so many are equal that no bound will do, rows say which are first. The
sums of a tile are made in one order, so that each pass sees the same bits.
"""

from __future__ import annotations

import torch

from tilewright.ops.common.triton_launch import Launch, capability_of, why_not_triton
from tilewright.ops.sparse.triton_largest import INFINITE, sparse_tiles_kernel

SAMPLED_ROWS = 256
GUESSES = 4  # passes after which a bound is only halved


def why_not(p) -> str | None:
    return why_not_triton(p.device, p.dtype)


def room_for(k: int) -> int:
    """How many entries a pass may collect for k of them."""
    return 2 * k + 4096


def largest_gradients(dy: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    if x.shape[0] == 0 or k == 0:  # all entries are 0
        return torch.arange(k, device=x.device)
    room = room_for(k)
    guess_of, step = sample_of(dy, x)
    wanted = 1.25 * k / step
    # more than `room` sizes are from `low` on, fewer than k from `high` on
    low, high, n_from_high = -1, INFINITE.value + 1, 0
    bound = guess_of(wanted)
    for turn in range(64):
        places, sizes, n = collect(dy, x, bound, dy.shape[1], room)
        if k <= n <= room or (n < k and bound == 0):
            return best_of(places[:n], sizes[:n], k)
        if n > room:
            low = bound
        else:
            high, n_from_high = bound, n
        if high - low == 1:
            break
        wanted *= 1.25 * k / max(n, 1)
        bound = guess_of(wanted)
        if bound == low:  # ties, by the look of it
            bound = low + 1
        if turn >= GUESSES or not low < bound < high:
            bound = (low + high) // 2
    ties = ties_of_rows(dy, x, low).cumsum(0)
    last_row = int((ties < k - n_from_high).sum())
    n_in = n_from_high + int(ties[last_row])
    places, sizes, n = collect(dy, x, low, last_row, n_in)
    return best_of(places[:n], sizes[:n], k)


def sample_of(dy: torch.Tensor, x: torch.Tensor):
    """(f, step): of every step-th row of the gradient, f(n) is the size of the n-th largest."""
    step = max(dy.shape[1] // SAMPLED_ROWS, 1)
    gradient = (dy[:, ::step].T @ x).float().abs().flatten()
    sizes = torch.where(gradient.isnan(), 0.0, gradient).sort(descending=True).values

    def size(n: float) -> int:
        at = sizes[min(max(int(n), 1), len(sizes)) - 1 :][:1]
        return int(at.view(torch.int32))

    return size, step


def collect(dy, x, low: int, last_row: int, room: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Places and sizes of what is not below `low`, as many as there is room for, and the number."""
    places = torch.empty(room, dtype=torch.int64, device=x.device)
    sizes = torch.empty(room, dtype=torch.int32, device=x.device)
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    tiles_launch(dy, x, count, places, sizes, low, last_row, capability_of(x)).run()
    return places, sizes, int(count)


def ties_of_rows(dy, x, low: int) -> torch.Tensor:
    counts = torch.zeros(dy.shape[1], dtype=torch.int64, device=x.device)
    tiles_launch(dy, x, counts, None, None, low, 0, capability_of(x)).run()
    return counts


def best_of(places, sizes, k: int) -> torch.Tensor:
    """The places of the k largest, of equal ones the first, ascending."""
    places, order = places.sort()
    best = sizes[order].sort(descending=True, stable=True).indices[:k]
    return places[best].sort().values


def tiles_launch(dy, x, counts, places, sizes, low, last_row, capability) -> Launch:
    n_out, n_in = dy.shape[1], x.shape[1]
    if capability is None:
        block_o, block_i, block_t, warps, stages = 32, 64, 16, 4, 1
    elif x.dtype == torch.float32:
        block_o, block_i, block_t, warps, stages = 64, 64, 16, 8, 2
    else:  # what is collected is numbered in registers: a larger tile would not fit
        block_o, block_i, block_t, warps, stages = 64, 128, 64, 8, 3
    arguments = {
        "dy_ptr": dy, "x_ptr": x, "counts_ptr": counts, "places_ptr": places, "sizes_ptr": sizes,
        "dy_stride_t": dy.stride(0), "dy_stride_o": dy.stride(1),
        "x_stride_t": x.stride(0), "x_stride_i": x.stride(1),
        "n_tokens": x.shape[0], "n_out": n_out, "n_in": n_in, "low": low, "last_row": last_row,
        "room": 0 if places is None else len(places),
        "BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_T": block_t,
    }  # fmt: skip
    programs = -(-n_out // block_o) * -(-n_in // block_i)
    return Launch(sparse_tiles_kernel, programs, arguments, warps, stages, x.device)
