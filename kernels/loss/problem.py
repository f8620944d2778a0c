"""What decides who can run a call of the loss room, and how a head is described.

Axes: T tokens, N the width of a hidden state, V classes (the vocabulary), K ids of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

SKIPPED = torch.iinfo(torch.int64).min  # an id that asks for nothing


class Problem(NamedTuple):
    """A call without its tensors."""

    operator: str
    device: str
    dtype: torch.dtype


class Head(NamedTuple):
    """Where logits come from: x = softcap tanh(scale (h weight^T + bias) / softcap).

    h, weight      (T, N), (V, N)
    bias           (V,) or None
    ids            (T, K) int64: the classes that a token's call asks about; SKIPPED: none
    class_weight   (V,) or None; meant by `total`, the weighted sum of all log-probabilities
    softcap        0: none
    """

    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    class_weight: torch.Tensor | None
    scale: float
    softcap: float


class Upstream(NamedTuple):
    """Of the sum of for_ids log_probs + for_total total + for_lse lse + for_square lse^2, float32.

    for_ids   (T, K), no more than zeros where the id is SKIPPED; the rest (T,) or None: 0
    """

    for_ids: torch.Tensor
    for_total: torch.Tensor | None = None
    for_lse: torch.Tensor | None = None
    for_square: torch.Tensor | None = None

    def rows(self, at) -> Upstream:
        """That of some tokens, by a slice or by their numbers."""
        return self.mapped(lambda t: t[at])

    def mapped(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Upstream:
        rest = [None if t is None else f(t) for t in self[1:]]
        return Upstream(f(self.for_ids), *rest)


class Found(NamedTuple):
    """What a head says, float32, 0 for tokens without ids; and the gradients that were wanted.

    stats   (2, T): the largest x of a token and the sum of exp(x - largest)
    """

    log_probs: torch.Tensor
    lse: torch.Tensor
    total: torch.Tensor | None
    stats: torch.Tensor
    dh: torch.Tensor | None = None
    dweight: torch.Tensor | None = None
    dbias: torch.Tensor | None = None

    def rows(self, at: slice) -> Found:
        """The statistics of some tokens, which are views."""
        total = None if self.total is None else self.total[at]
        return Found(self.log_probs[at], self.lse[at], total, self.stats[:, at])

    def spread(self, kept: torch.Tensor, n_tokens: int) -> Found:
        """What was found of the tokens `kept`, as that of all."""

        def over_all(t: torch.Tensor, axis: int = 0) -> torch.Tensor:
            shape = [n_tokens if i == axis else n for i, n in enumerate(t.shape)]
            return t.new_zeros(shape).index_copy_(axis, kept, t)

        total = None if self.total is None else over_all(self.total)
        stats = over_all(self.stats, 1)
        return Found(over_all(self.log_probs), over_all(self.lse), total, stats, *self[4:])


def expect_ids(name: str, ids: torch.Tensor, n_labels: int, n_classes: int) -> None:
    """ids on a CPU are in range, or the error says which is not."""
    stray = (ids >= n_classes) | ((ids < 0) & (ids != SKIPPED))
    if not bool(stray.any()):
        return
    t, k = stray.nonzero()[0].tolist()
    what = f"labels[{t}]" if n_labels == 1 else f"labels[{t}, {k}]"
    if k >= n_labels:
        what = f"soft_ids[{t}, {k - n_labels}]"
    raise ValueError(
        f"{name}: {what}, tokens counted through all axes, is {int(ids[t, k])}, need "
        f"0 to {n_classes - 1}, the rows of weight, or ignore_index"
    )
