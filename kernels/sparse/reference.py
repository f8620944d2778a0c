"""The meaning of the sparse room over dense matrices, in float64 and without thrift."""

import torch


def largest_gradients(dy, x, k):
    """The k largest entries of |dy^T x| (O, I), of equal ones the first: flat places, ascending."""
    sizes = (dy.double().T @ x.double()).abs().flatten()
    # NaN is of no size
    order = torch.where(sizes.isnan(), -1.0, sizes).sort(descending=True, stable=True).indices[:k]
    return order[~sizes[order].isnan()].sort().values


def regrow(values, active, scores, count):
    """One exchange of SpIEL over dense (O I,) tensors.

    values   of the delta, where active
    active   whether a place has a value
    scores   of the places that may come in, NaN for those that may not
    count    values that give way, at most

    Returns values and active afterwards, and which places are new. Of the `count` smallest values
    those stay that are among the `count` best scores as well; the others leave for the best new
    places, smallest first, as long as there are any.
    """
    places = active.nonzero()[:, 0]
    smallest = places[values[places].abs().sort(stable=True).indices[:count]]
    may_come = ~scores.isnan() & ~active
    may_come[smallest] = ~scores[smallest].isnan()
    come = may_come.nonzero()[:, 0]
    best = come[scores[come].sort(descending=True, stable=True).indices[:count]]
    new = [p for p in best.tolist() if p not in set(smallest.tolist())]
    leave = [p for p in smallest.tolist() if p not in set(best.tolist())][: len(new)]
    values, active = values.clone(), active.clone()
    values[leave], active[leave] = 0.0, False
    values[new], active[new] = 0.0, True
    is_new = torch.zeros_like(active)
    is_new[new] = True
    return values, active, is_new


def extreme_scores(row_extremes, column_extremes, active):
    """(O I,) products of the extremes, NaN where they are 0 or the place has a value already."""
    products = row_extremes.double()[:, None] * column_extremes.double()
    return torch.where(active.view(products.shape) | (products == 0), float("nan"), products)
