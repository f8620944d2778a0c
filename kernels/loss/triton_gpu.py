"""Launcher of the Triton kernel of the loss room: tensors -> kernel arguments."""

from __future__ import annotations

import torch

from tilewright.ops.common.triton_launch import Launch, why_not_triton
from tilewright.ops.loss import blocks
from tilewright.ops.loss.problem import Found, Head, Problem, Upstream
from tilewright.ops.loss.triton_rows import head_rows_kernel

COLUMNS = 4096  # of a row at a time
MOST_IDS = 128  # of a token: each is compared with each


def why_not(p: Problem) -> str | None:
    """None if the Triton kernel can run this problem here, else the reason."""
    return why_not_triton(p.device, p.dtype)


def _floats(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def over_block(
    head: Head, logits: torch.Tensor, upstream: Upstream | None, found: Found, is_backward: bool
) -> None:
    """What blocks.run asks of an implementation."""
    head_rows_launch(head, logits, upstream, found, is_backward).run()


def head_rows_launch(head, logits, upstream, found, is_backward) -> Launch:
    n_rows, n_classes = logits.shape
    n_ids = head.ids.shape[1]
    columns = max(16, min(COLUMNS, _power_of_2(n_classes)))
    weight_sum = None if head.class_weight is None else head.class_weight.sum().view(1)
    up = (None,) * 4 if upstream is None else tuple(_floats(t) for t in upstream)
    arguments = {
        "logits_ptr": logits, "bias_ptr": head.bias, "class_weight_ptr": head.class_weight,
        "weight_sum_ptr": weight_sum, "ids_ptr": head.ids.contiguous(),
        "largest_ptr": found.stats[0], "mass_ptr": found.stats[1],
        "log_probs_ptr": found.log_probs, "lse_ptr": found.lse, "total_ptr": found.total,
        "for_ids_ptr": up[0], "for_total_ptr": up[1], "for_lse_ptr": up[2],
        "for_square_ptr": up[3], "row_stride": logits.stride(0), "n_rows": n_rows,
        "n_classes": n_classes, "n_ids": n_ids, "scale": float(head.scale),
        "cap": float(head.softcap), "CAPPED": head.softcap > 0, "HAS_STATS": is_backward,
        "HAS_GRADIENT": upstream is not None, "IDS": _power_of_2(n_ids), "COLUMNS": columns,
    }  # fmt: skip
    return Launch(
        head_rows_kernel, n_rows, arguments, 8 if columns >= 2048 else 4, device=logits.device
    )


def run(
    head: Head,
    upstream: Upstream | None = None,
    stats: torch.Tensor | None = None,
    wants: tuple[bool, bool, bool] = (False, False, False),
    wants_total: bool = False,
) -> Found:
    if head.ids.shape[1] > MOST_IDS:
        raise ValueError(
            f"triton_gpu: {head.ids.shape[1]} labels and soft targets of a token, need at most "
            f"{MOST_IDS}"
        )
    wide = head._replace(bias=_floats(head.bias), class_weight=_floats(head.class_weight))
    # to leave tokens out the number of the others would have to be waited for
    skips = head.h.device.type == "cpu"
    found = blocks.run(over_block, wide, upstream, stats, wants, wants_total, skips)
    if found.dbias is None or head.bias is None:
        return found
    return found._replace(dbias=found.dbias.to(head.bias.dtype))
