"""Mixture of low-rank experts beside a linear layer: plain torch, products of its own libraries."""

from __future__ import annotations

import torch

from tilewright.shapes import expect_device, expect_shapes

NAME = "lora_mixture"
DENSE_RANK = 1024  # up to here all experts' ranks together are one narrow product


def lora_mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """What the low-rank experts of each token add to the output of a linear layer.

        y[t] = scale sum_k g[t, k] b[e] a[e] x[t],  e = ids[t, k]

    x       (T, H) or (..., H) activations
    ids     (T, K) or (..., K) int32 or int64; slots outside 0 to E - 1 add nothing
    gates   like ids, of any floating dtype
    a       (E, R, H) in x.dtype
    b       (E, O, R) in x.dtype
    scale   alpha / R, already divided

    Returns (..., O) in x.dtype, float32, bfloat16, float16 or float64; gradients reach x, gates, a
    and b. With E R up to 1024 all experts are two dense products, else each takes its own tokens,
    which on a GPU waits for the choice. An expert without tokens gets gradients of exactly 0.
    ValueError: a shape or dtype outside the above.

    Source: Zadouri et al., Mixture of LoRA experts (MoLoRA), arXiv 2309.05444.
    """
    lead = x.shape[:-1]
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{NAME}: ids is {ids.dtype}, need int32 or int64")
    if ids.shape[:-1] != lead or gates.shape != ids.shape:
        raise ValueError(
            f"{NAME}: ids has shape {tuple(ids.shape)} and gates {tuple(gates.shape)}, "
            f"need {tuple(lead)} + (K,): x without its last axis, then slots"
        )
    rows = x.reshape(-1, x.shape[-1])
    size = expect_shapes(NAME, x=(rows, "TH"), a=(a, "ERH"), b=(b, "EOR"))
    expect_device(NAME, x=x, ids=ids, gates=gates, a=a, b=b)
    for argument, t in (("a", a), ("b", b)):
        if t.dtype != x.dtype:
            raise ValueError(f"{NAME}: {argument} is {t.dtype}, need {x.dtype} as x")
    n_experts = size["E"]
    ids, gates = ids.reshape(-1, ids.shape[-1]), gates.reshape(-1, ids.shape[-1])
    outside = (ids < 0) | (ids >= n_experts)
    wide = torch.promote_types(gates.dtype, torch.float32)
    factors = gates.new_zeros(rows.shape[0], n_experts + 1, dtype=wide)
    at = ids.masked_fill(outside, n_experts).long()
    factors = factors.scatter_add(1, at, gates.to(wide).masked_fill(outside, 0.0))[:, :-1] * scale
    if n_experts * size["R"] <= DENSE_RANK:
        low = (rows @ a.flatten(0, 1).T).unflatten(1, (n_experts, size["R"]))
        low = (low * factors[..., None]).to(x.dtype).flatten(1)
        y = low @ b.permute(0, 2, 1).flatten(0, 1)
    else:
        y = x.new_zeros(rows.shape[0], size["O"], dtype=torch.promote_types(x.dtype, torch.float32))
        chosen = torch.zeros(rows.shape[0], n_experts + 1, dtype=torch.bool, device=x.device)
        chosen = chosen.scatter_(1, at, True)[:, :-1]
        for e in chosen.any(0).nonzero()[:, 0].tolist():
            token = chosen[:, e].nonzero()[:, 0]
            low = rows[token] @ a[e].T * factors[token, e, None]
            # a token stands once in `token`: nothing is added in an order of its own
            y = y.index_add(0, token, (low.to(x.dtype) @ b[e].T).to(y.dtype))
        y = y.to(x.dtype)
    return y.view(*lead, size["O"])
