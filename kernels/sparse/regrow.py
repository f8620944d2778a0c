"""Which values of a sparse delta give way, and what comes in their place."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.ops.common.sparse_delta import WeightDelta, as_columns, offsets_of_rows


class Regrowth(NamedTuple):
    """A delta after an exchange of values.

    delta      as many values as before, in order; those that stayed have the same bits, new ones
               are 0
    source     (N,) int64: where each value stood before, -1 for a new one
    candidate  (N,) int64: which candidate a new value is, -1 for one that stayed
    """

    delta: WeightDelta
    source: torch.Tensor
    candidate: torch.Tensor

    @property
    def is_new(self) -> torch.Tensor:
        """(N,) bool"""
        return self.source < 0

    def carry(self, state: torch.Tensor, fresh: torch.Tensor | float = 0.0) -> torch.Tensor:
        """What an optimizer holds for each value, moved with the values.

        state   (N,)
        fresh   (C,) for each candidate, or a number: what a new value begins with
        """
        moved = state[self.source.clamp_min(0)]
        if isinstance(fresh, torch.Tensor):
            begin = fresh.to(state.dtype)[self.candidate.clamp_min(0)] if len(fresh) else moved
        else:
            begin = torch.full_like(moved, fresh)
        return torch.where(self.is_new, begin, moved)


def exchange(delta: WeightDelta, candidates: torch.Tensor, scores: torch.Tensor, count: int):
    """`regrow_by_gradient` after its checks.

    candidates   (C,) int64 places, ascending
    scores       (C,), not negative
    """
    places = delta.places()
    values = delta.values.detach()
    smallest = values.abs().sort(stable=True).indices[:count]
    stays = torch.ones(len(places), dtype=torch.bool, device=places.device)
    stays[smallest] = False
    where, is_active = find(places, candidates)
    may_come = ~(is_active & stays[where]) if len(places) else ~is_active
    come = may_come.nonzero()[:, 0]
    best = come[scores[come].sort(descending=True, stable=True).indices[:count]]
    # a value that was to leave and is wanted at once stays as it is
    again = best[is_active[best]]
    stays[where[again]] = True
    fresh = best[~is_active[best]]
    leaving = smallest[~stays[smallest]]
    stays[leaving[len(fresh) :]] = True
    kept = stays.nonzero()[:, 0]
    return _assemble(delta, kept, fresh, candidates[fresh])


def find(places: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of the wanted stands among ascending places, and whether it is there at all."""
    if not len(places):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    where = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
    return where, places[where] == wanted


def _assemble(delta, kept, fresh, fresh_places) -> Regrowth:
    """Values that stay and new ones, in order again."""
    places = torch.cat([delta.places()[kept], fresh_places])
    source = torch.cat([kept, torch.full_like(fresh, -1)])
    candidate = torch.cat([torch.full_like(kept, -1), fresh])
    values = torch.cat([delta.values.detach()[kept], delta.values.new_zeros(len(fresh))])
    places, order = places.sort()
    n_in = delta.in_features
    rows = places.div(max(n_in, 1), rounding_mode="floor")
    regrown = WeightDelta(
        delta.out_features, n_in, offsets_of_rows(rows, delta.out_features),
        as_columns(places - rows * n_in, n_in), values[order],
    )  # fmt: skip
    return Regrowth(regrown, source[order], candidate[order])


class _Products:
    """The products of two lists of magnitudes, of which none is ever laid out.

    Both are float64 and come from float32, so that products are exact; how many are above a bound
    is found by bisection in every row at once.
    """

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor):
        self.rows = rows.double()
        self.columns, self.order = columns.double().sort(descending=True, stable=True)

    def count_above(self, bound: float, *, or_equal: bool) -> torch.Tensor:
        """(O,) how many products of each row are above the bound, or equal to it as well."""
        low = torch.zeros(len(self.rows), dtype=torch.int64, device=self.rows.device)
        high = torch.full_like(low, len(self.columns))
        while bool((low < high).any()):
            middle = (low + high) // 2
            product = self.rows * self.columns[middle.clamp_max(len(self.columns) - 1)]
            is_above = (product >= bound) if or_equal else (product > bound)
            is_above &= middle < high
            low = torch.where(is_above, middle + 1, low)
            high = torch.where(is_above, high, torch.where(low < high, middle, high))
        return low

    def places(self, counts: torch.Tensor, begin: torch.Tensor | None = None) -> torch.Tensor:
        """Flat places of the products from `begin` up to `counts` in each row, unsorted."""
        begin = torch.zeros_like(counts) if begin is None else begin
        lengths = counts - begin
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(lengths)
        starts = lengths.cumsum(0) - lengths
        within = torch.arange(len(rows), device=counts.device) - starts[rows] + begin[rows]
        return rows * len(self.columns) + self.order[within]


_ROWS_OF_TIES = 256  # looked through at once: equal products may be as many as the weight's entries


def best_products(
    rows: torch.Tensor, columns: torch.Tensor, active: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat places, ascending, and products of the `count` largest rows[o] columns[i] > 0 that are
    not active; of equal ones the first.

    active   (N,) int64 flat places, ascending
    """
    products = _Products(rows, columns)
    n_in = len(products.columns)
    of_active = products.rows[active // max(n_in, 1)] * columns.double()[active % max(n_in, 1)]

    def free(bound: float, or_equal: bool) -> int:
        taken = (of_active >= bound) if or_equal else (of_active > bound)
        return int(products.count_above(bound, or_equal=or_equal).sum()) - int(taken.sum())

    count = min(count, free(0.0, False)) if n_in and len(rows) else 0
    if count == 0:
        return active[:0], of_active[:0]
    # the bits of positive float64 numbers are in the order of the numbers: bisect on them
    low = 0  # the bound of which `count` products or more are not below
    high = _bits(float("inf"))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if free(_number(middle), True) >= count else (low, middle)
    bound = _number(low)
    above = products.count_above(bound, or_equal=False)
    best = products.places(above)
    best = best[~find(active, best)[1]]
    ties = _first_ties(products, above, bound, active, count - len(best))
    best = torch.cat([best, ties]).sort().values
    return best, products.rows[best // n_in] * columns.double()[best % n_in]


def _first_ties(products, above, bound, active, count) -> torch.Tensor:
    """The first `count` places whose product is the bound itself, without active ones."""
    until = products.count_above(bound, or_equal=True)
    found = [active[:0]]
    for row in range(0, len(until), _ROWS_OF_TIES):
        if count <= 0:
            break
        chunk = slice(row, row + _ROWS_OF_TIES)
        counts, begin = torch.zeros_like(until), torch.zeros_like(until)
        counts[chunk], begin[chunk] = until[chunk], above[chunk]
        ties = products.places(counts, begin).sort().values
        ties = ties[~find(active, ties)[1]][:count]
        found.append(ties)
        count -= len(ties)
    return torch.cat(found)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64).view(torch.int64))


def _number(bits: int) -> float:
    return float(torch.tensor(bits).view(torch.float64))
