"""Soft mixture of experts: dense products around the experts, nothing is chosen or dropped."""

from __future__ import annotations

import torch

from tilewright.ops.moe.api import moe_mlp

NAME = "soft_moe"


def soft_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Each expert sees a few mixtures of a sequence's tokens, and each token a mixture of outputs.

        s[e, p] = sum_t softmax_t(l)[t, e, p] x[t]
        y[t]    = sum_ep softmax_ep(l)[t, e, p] f_e(s[e, p])

    x          (..., T, H) activations of sequences of T tokens
    logits     (..., T, E, P) for P mixtures of each of E experts; the paper takes x times a
               parameter (H, E, P), both normalized
    gate_up    (E, 2 I, H), and down (E, H, I), of the experts f_e: as in moe_mlp, packed ones too
    down       see gate_up
    mask       (..., T) bool: tokens that are padding are False; no mixture holds them, and their
               outputs are 0
    options    further ones of moe_mlp: biases, activation, layout, impl

    Returns (..., T, H) in x.dtype. Softmaxes are float32. A token's output depends on the whole
    sequence, so this is not for causal models.
    ValueError: a shape outside the above.

    Source: Puigcerver et al., From Sparse to Soft Mixtures of Experts, arXiv 2308.00951.
    """
    if x.dim() < 2 or logits.dim() != x.dim() + 1 or logits.shape[:-2] != x.shape[:-1]:
        raise ValueError(
            f"{NAME}: logits has shape {tuple(logits.shape)}, need {tuple(x.shape[:-1])} + (E, P): "
            "x without its last axis, then experts and mixtures"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(
            f"{NAME}: mask is {mask.dtype} of shape {tuple(mask.shape)}, "
            f"need bool of shape {tuple(x.shape[:-1])}"
        )
    experts, mixtures = logits.shape[-2:]
    flat = logits.flatten(-2).to(torch.promote_types(logits.dtype, torch.float32))
    combine = flat.softmax(-1)
    if mask is not None:
        # the lowest finite number: a sequence of padding alone stays free of NaN
        flat = flat.masked_fill(~mask[..., None], torch.finfo(flat.dtype).min)
        combine = combine * mask[..., None]
    dispatch = flat.softmax(-2)
    slots = dispatch.to(x.dtype).mT @ x  # (..., E P, H)
    ids = torch.arange(experts, device=x.device).repeat_interleave(mixtures)
    out = moe_mlp(slots, ids.expand(slots.shape[:-1]), None, gate_up, down, **options)
    return combine.to(x.dtype) @ out
