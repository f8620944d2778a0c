"""torch tensors -> pointers and extents of the C++ kernels (csrc/loss)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NUMBERS, why_not_on_cpu
from tilewright.ops.loss import blocks
from tilewright.ops.loss.problem import Found, Head, Problem, Upstream


def why_not(p: Problem) -> str | None:
    return why_not_on_cpu(p.device, p.dtype)


def _floats(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def over_block(
    head: Head, logits: torch.Tensor, upstream: Upstream | None, found: Found, is_backward: bool
) -> None:
    """What blocks.run asks of an implementation."""
    n_rows, n_classes = logits.shape
    weight_sum = float(n_classes)
    if head.class_weight is not None:
        weight_sum = float(head.class_weight.sum(dtype=torch.float64))
    ids = head.ids.contiguous()
    up = (None,) * 4 if upstream is None else tuple(_floats(t) for t in upstream)
    at_ids = None if upstream is None else found.log_probs.new_empty(ids.shape)
    native().head_rows(
        NUMBERS[logits.dtype], n_rows, n_classes, ids.shape[1], logits.data_ptr(),
        logits.stride(0), _address(head.bias), _address(head.class_weight), weight_sum,
        head.scale, head.softcap, ids.data_ptr(), is_backward, found.stats[0].data_ptr(),
        found.stats[1].data_ptr(), found.log_probs.data_ptr(), _address(found.total),
        upstream is not None, _address(at_ids), *map(_address, up), torch.get_num_threads(),
    )  # fmt: skip
    if not is_backward:
        torch.add(found.stats[0], found.stats[1].log(), out=found.lse)


def run(
    head: Head,
    upstream: Upstream | None = None,
    stats: torch.Tensor | None = None,
    wants: tuple[bool, bool, bool] = (False, False, False),
    wants_total: bool = False,
) -> Found:
    wide = head._replace(bias=_floats(head.bias), class_weight=_floats(head.class_weight))
    found = blocks.run(over_block, wide, upstream, stats, wants, wants_total)
    if found.dbias is None or head.bias is None:
        return found
    return found._replace(dbias=found.dbias.to(head.bias.dtype))
