"""A head, a block of tokens at a time: its logits, what is asked of them, their gradients.

The products are torch's; what an implementation brings is the pass over the logits of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.ops.loss.problem import Found, Head, Upstream

BLOCK_BYTES = 128 << 20  # of a block's logits, which come from torch's product and go into the next
FEWEST, MOST = 256, 1024  # tokens in a block: below, reading the weight shows; above, only memory
BLOCKS = 8  # at least, of a long call, so that its logits stay a small part of all
SLICE_BYTES = 4 << 20  # of a block's part of dweight, before it is added up in float32

# (head, logits, upstream, found, wants_gradient): fills what found holds of the block, and puts the
# gradient with respect to the logits in their place
Pass = Callable[[Head, torch.Tensor, "Upstream | None", Found, bool], None]


def block_tokens(n_tokens: int, n_classes: int, itemsize: int) -> int:
    """Tokens of a block: a matter of shapes alone."""
    by_memory = BLOCK_BYTES // (n_classes * itemsize)
    wanted = min(MOST, by_memory, -(-n_tokens // BLOCKS))
    return min(n_tokens, max(FEWEST, wanted // 64 * 64))


class _WeightGradient:
    """The sum over blocks of dlogits^T h, in float32, rounded once to the weight's dtype."""

    def __init__(self, weight: torch.Tensor, n_blocks: int):
        self.left = n_blocks
        self.result = weight.new_empty(weight.shape)
        is_wide = weight.dtype == torch.float32
        self.sums = self.result if is_wide else None
        if not is_wide and n_blocks > 1:
            self.sums = weight.new_empty(weight.shape, dtype=torch.float32)
        self.is_first = True

    def add(self, dlogits: torch.Tensor, h: torch.Tensor) -> None:
        self.left -= 1
        if self.sums is self.result or self.sums is None:
            if self.is_first:
                torch.mm(dlogits.t(), h, out=self.result)
            else:
                self.result.addmm_(dlogits.t(), h)
        else:
            rows = max(1, SLICE_BYTES // (h.shape[1] * h.element_size()))
            for begin in range(0, self.result.shape[0], rows):
                part = slice(begin, begin + rows)
                product = torch.mm(dlogits[:, part].t(), h)
                if self.is_first:
                    self.sums[part].copy_(product)
                elif self.left:
                    self.sums[part].add_(product)
                else:
                    torch.add(self.sums[part], product, out=self.sums[part])
                    self.result[part].copy_(self.sums[part])
        self.is_first = False


def _rows_of(t: torch.Tensor | None, kept, block: slice) -> torch.Tensor | None:
    if t is None:
        return None
    return t[block] if kept is None else t[kept[block]]


def run(
    over_block: Pass,
    head: Head,
    upstream: Upstream | None = None,
    stats: torch.Tensor | None = None,
    wants: tuple[bool, bool, bool] = (False, False, False),
    wants_total: bool = False,
    skips: bool = True,
) -> Found:
    """Every token of a head.

    upstream   of the loss whose gradients are wanted
    stats      of an earlier run over the same head, which are then not found again
    wants      dh, dweight, dbias
    skips      leave out tokens that have no ids before the products; asks the device how many
    """
    with torch.autocast(head.h.device.type, enabled=False):
        return _run(over_block, head, upstream, stats, wants, wants_total, skips)


def _run(over_block, head, upstream, stats, wants, wants_total, skips) -> Found:
    h, weight, n_tokens = head.h, head.weight, head.h.shape[0]
    asked = (head.ids >= 0).any(1)
    kept = None
    if skips and not bool(asked.all()):
        kept = asked.nonzero()[:, 0]
    elif not skips and upstream is not None:
        upstream = Upstream(
            upstream.for_ids,
            *(None if t is None else torch.where(asked, t, 0.0) for t in upstream[1:]),
        )
    n_kept = n_tokens if kept is None else kept.numel()
    is_backward = stats is not None
    wide = {"dtype": torch.float32}
    new = h.new_empty if kept is None else h.new_zeros
    found = Found(
        log_probs=new(head.ids.shape, **wide),
        lse=new(n_tokens, **wide),
        total=new(n_tokens, **wide) if wants_total else None,
        stats=new(2, n_tokens, **wide) if stats is None else stats,
        dh=new(h.shape) if wants[0] else None,
    )
    if n_kept == 0 or h.numel() == 0:
        dweight = weight.new_zeros(weight.shape) if wants[1] else None
        dbias = head.bias.new_zeros(head.bias.shape) if wants[2] else None
        return found._replace(dweight=dweight, dbias=dbias)

    n_block = block_tokens(n_kept, weight.shape[0], h.element_size())
    logits = h.new_empty(n_block, weight.shape[0])
    dweight = _WeightGradient(weight, -(-n_kept // n_block)) if wants[1] else None
    dbias = torch.zeros(weight.shape[0], device=h.device, **wide) if wants[2] else None
    for begin in range(0, n_kept, n_block):
        block = slice(begin, min(n_kept, begin + n_block))
        n = block.stop - begin
        h_block, of_block = _rows_of(h, kept, block), logits[:n]
        torch.mm(h_block, weight.t(), out=of_block)
        of_found = Found(
            log_probs=found.log_probs[block],
            lse=found.lse[block],
            total=None if found.total is None else found.total[block],
            stats=found.stats[:, block],
        )
        if kept is not None:
            places = kept[block]
            of_found = Found(*(None if t is None else t.new_empty(t.shape) for t in of_found))
            if is_backward:
                of_found.stats.copy_(stats[:, places])
        of_upstream = None
        if upstream is not None:
            of_upstream = Upstream(*(_rows_of(t, kept, block) for t in upstream))
        of_head = head._replace(h=h_block, ids=_rows_of(head.ids, kept, block))
        over_block(of_head, of_block, of_upstream, of_found, is_backward)
        if kept is not None:
            found.log_probs[places] = of_found.log_probs
            found.lse[places] = of_found.lse
            if found.total is not None:
                found.total[places] = of_found.total
            if not is_backward:
                found.stats[:, places] = of_found.stats
        if found.dh is not None:
            if kept is None:
                torch.mm(of_block, weight, out=found.dh[block])
            else:
                found.dh[places] = torch.mm(of_block, weight)
        if dweight is not None:
            dweight.add(of_block, h_block)
        if dbias is not None:
            dbias += of_block.sum(0, dtype=torch.float32)
    if kept is None and not skips and not is_backward:
        for t in (found.lse, found.total):
            if t is not None:
                t.masked_fill_(~asked, 0.0)
    return found._replace(
        dweight=None if dweight is None else dweight.result,
        dbias=None if dbias is None else dbias.to(head.bias.dtype),
    )
