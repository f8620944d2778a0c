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
# a GPU's products want more of everything
GPU_BLOCK_BYTES, GPU_FEWEST, GPU_MOST, GPU_SLICE_BYTES = 512 << 20, 1024, 4096, 256 << 20

# (head, logits, upstream, found, wants_gradient): fills what found holds of the block, and puts the
# gradient with respect to the logits in their place
Pass = Callable[[Head, torch.Tensor, "Upstream | None", Found, bool], None]


def block_tokens(
    n_tokens: int, n_classes: int, itemsize: int, summed_width: int = 0, on_gpu: bool = False
) -> int:
    """Tokens of a block: a matter of shapes alone.

    summed_width   N where dweight is summed up over blocks in a float32 copy, else 0. The copy
                   takes as much memory as 16-bit logits of 2 N tokens and is read and written for
                   each block: up to there one block is smaller and quicker, and beyond it blocks
                   are long
    """
    n_bytes, fewest, most = BLOCK_BYTES, FEWEST, MOST
    if on_gpu:
        n_bytes, fewest, most = GPU_BLOCK_BYTES, GPU_FEWEST, GPU_MOST
    by_memory = n_bytes // (n_classes * itemsize)
    wanted = max(fewest, min(most, by_memory, -(-n_tokens // BLOCKS)) // 64 * 64)
    if summed_width:
        if n_tokens <= 2 * summed_width + wanted:
            return n_tokens
        wanted = max(wanted, summed_width)
    return min(n_tokens, wanted)


class _WeightGradient:
    """The sum over blocks of dlogits^T h, in float32, rounded once to the weight's dtype."""

    def __init__(self, weight: torch.Tensor, n_blocks: int):
        self.left = n_blocks
        self.result = weight.new_empty(weight.shape)
        is_wide = weight.dtype == torch.float32
        self.sums = self.result if is_wide else None
        if not is_wide and n_blocks > 1:
            self.sums = weight.new_empty(weight.shape, dtype=torch.float32)
        self.is_first = True  # and of no blocks at all the sum is 0

    def rounded(self) -> torch.Tensor:
        return self.result.zero_() if self.is_first else self.result

    def add(self, dlogits: torch.Tensor, h: torch.Tensor) -> None:
        self.left -= 1
        if self.sums is self.result or self.sums is None:
            if self.is_first:
                torch.mm(dlogits.t(), h, out=self.result)
            else:
                self.result.addmm_(dlogits.t(), h)
        else:
            n_bytes = GPU_SLICE_BYTES if h.device.type == "cuda" else SLICE_BYTES
            rows = max(1, n_bytes // (h.shape[1] * h.element_size()))
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


def _first_of(kept: torch.Tensor | None) -> int | None:
    """Where the kept tokens begin if they stand in a row, as all but the last of a document do:
    then they need not be gathered. None: they do not."""
    if kept is None:
        return 0
    n = len(kept)
    return int(kept[0]) if n and int(kept[-1]) - int(kept[0]) == n - 1 else None


def _run(over_block, head: Head, upstream, stats, wants, wants_total, skips) -> Found:
    h, weight = head.h, head.weight
    asked = (head.ids >= 0).any(1)
    kept = None if not skips or bool(asked.all()) else asked.nonzero()[:, 0]
    first = _first_of(kept)
    ids, is_backward = head.ids, stats is not None
    if kept is not None:
        ids = ids[kept]
        upstream = None if upstream is None else upstream.rows(kept)
        stats = None if stats is None else stats[:, kept]
    elif upstream is not None and not skips:
        upstream = upstream.mapped(lambda t: t * asked if t.dim() == 1 else t)
    n_kept, n_classes = ids.shape[0], weight.shape[0]

    def floats(*shape):
        return torch.empty(shape, dtype=torch.float32, device=h.device)

    total = floats(n_kept) if wants_total else None
    stats = floats(2, n_kept) if stats is None else stats
    found = Found(floats(*ids.shape), floats(n_kept), total, stats)
    dh = None
    if wants[0]:
        dh = h.new_zeros(h.shape) if first is None else h.new_empty(h.shape)
        if first is not None:
            dh[:first].zero_()
            dh[first + n_kept :].zero_()
    is_summed_apart = wants[1] and weight.dtype in (torch.bfloat16, torch.float16)
    width = h.shape[1] if is_summed_apart else 0
    on_gpu = h.device.type == "cuda"
    n_block = max(1, block_tokens(n_kept, n_classes, h.element_size(), width, on_gpu))
    sums = _WeightGradient(weight, -(-n_kept // n_block)) if wants[1] else None
    dbias = torch.zeros(n_classes, device=h.device) if wants[2] else None
    logits = h.new_empty(min(n_block, n_kept), n_classes)
    for begin in range(0, n_kept, n_block):
        block = slice(begin, min(n_kept, begin + n_block))
        place: torch.Tensor | slice = block if kept is None else kept[block]
        if first is not None:
            place = slice(first + block.start, first + block.stop)
        h_block, of_block = h[place], logits[: block.stop - begin]
        torch.mm(h_block, weight.t(), out=of_block)
        of_upstream = None if upstream is None else upstream.rows(block)
        of_head = head._replace(h=h_block, ids=ids[block])
        over_block(of_head, of_block, of_upstream, found.rows(block), is_backward)
        if dh is not None and first is not None:
            torch.mm(of_block, weight, out=dh[place])
        elif dh is not None:
            dh[place] = torch.mm(of_block, weight)
        if sums is not None:
            sums.add(of_block, h_block)
        if dbias is not None:
            dbias += of_block.sum(0, dtype=torch.float32)
    if kept is not None:
        found = found.spread(kept, h.shape[0])
    elif not skips and not is_backward:
        found.lse.masked_fill_(~asked, 0.0)
        if found.total is not None:
            found.total.masked_fill_(~asked, 0.0)
    return found._replace(dh=dh, dweight=None if sums is None else sums.rounded(), dbias=dbias)
