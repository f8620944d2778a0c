"""Routes besides the largest scores: noise, thresholds, given experts, experts elsewhere."""

from __future__ import annotations

import torch

from tilewright.ops.moe.routing import TINY, Route, as_wide, best, expect_float
from tilewright.shapes import expect_device, expect_shapes

SCORES = ("softmax", "sigmoid")
BY = ("score", "mass")


def add_router_noise(
    logits: torch.Tensor, raw_noise: torch.Tensor | float, *, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with noise whose size is learned, for noisy top-k.

        l'[t, e] = l[t, e] + s[t, e] n[t, e],  s = softplus(raw_noise)

    logits      (T, E) of any floating dtype
    raw_noise   (T, E) as another router gives it; or a number, then s is that number
    noise       (T, E) n; drawn from torch's default generator if None. Hand over what was drawn
                before, and recomputation cannot drift

    Returns l' and s in float32 (float64 of float64): l' for route_tokens, whose choice and gates
    are then noisy, and both for load_loss. Gradients reach the logits and raw_noise.
    ValueError: a shape, dtype or value outside the above.

    Source: Shazeer et al., arXiv 1701.06538, equations 3 to 5.
    """
    name = "add_router_noise"
    expect_float(name, logits=logits)
    shapes: dict = dict(logits=(logits, "TE"))
    wide = as_wide(logits)
    if isinstance(raw_noise, torch.Tensor):
        expect_float(name, raw_noise=raw_noise)
        shapes["raw_noise"] = (raw_noise, "TE")
        expect_device(name, logits=logits, raw_noise=raw_noise, noise=noise)
        size = torch.nn.functional.softplus(raw_noise.to(wide.dtype))
    elif raw_noise < 0:
        raise ValueError(f"{name}: raw_noise is {raw_noise}, need a number of at least 0")
    else:
        size = torch.full_like(wide, raw_noise)
    if noise is None:
        noise = torch.randn_like(wide)
    else:
        shapes["noise"] = (noise, "TE")
    expect_shapes(name, **shapes)
    return wide + size * noise.to(wide.dtype), size


def route_by_threshold(
    logits: torch.Tensor,
    threshold: float,
    *,
    by: str = "score",
    score: str = "softmax",
    at_least: int = 1,
    at_most: int | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
) -> Route:
    """As many experts for a token as its scores ask for.

        s = softmax(l) or sigmoid(l), best first:  expert k is taken if s[k] >= threshold,
        or, by mass, if s[0] + .. + s[k - 1] < threshold

    logits        (T, E) of any floating dtype
    threshold     by "score": the least score of an expert that is taken; by "mass": the experts
                  taken are the fewest whose scores sum to it
    by            "score" or "mass"
    score         "softmax" or "sigmoid"
    at_least      experts of a token at least, 0 to E: the best ones, whatever their scores
    at_most       experts of a token at most, which is the number of slots; E if None
    renormalize   the gates of a token sum to 1, before scale
    scale         factor of all gates

    Returns a Route, best experts first; slots that are not used go nowhere. Equal scores go to the
    lowest index. ValueError: a shape, dtype or value outside the above.

    Source: Huang et al., Harder Tasks Need More Experts, arXiv 2403.07652 (by mass).
    """
    name = "route_by_threshold"
    expect_float(name, logits=logits)
    n_experts = expect_shapes(name, logits=(logits, "TE"))["E"]
    at_most = n_experts if at_most is None else at_most
    for argument, value, known in (("by", by, BY), ("score", score, SCORES)):
        if value not in known:
            raise ValueError(f"{name}: no {argument} {value!r}. Known: {', '.join(known)}")
    if not 1 <= at_most <= n_experts:
        raise ValueError(f"{name}: at_most is {at_most}, need 1 to {n_experts}: E as in logits")
    if not 0 <= at_least <= at_most:
        raise ValueError(f"{name}: at_least is {at_least}, need 0 to at_most = {at_most}")
    wide = as_wide(logits)
    scores = wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)
    ids = best(scores.detach(), at_most)
    gates = scores.gather(1, ids)
    with torch.no_grad():
        if by == "score":
            taken = gates >= threshold
        else:
            taken = gates.cumsum(-1) - gates < threshold
        taken[:, :at_least] = True
    ids, gates = ids.masked_fill(~taken, -1), gates.masked_fill(~taken, 0.0)
    if renormalize:
        gates = gates / (gates.sum(-1, keepdim=True) + TINY)
    return Route(ids, gates if scale == 1.0 else gates * scale, scores)


def route_examples(
    experts: torch.Tensor,
    *,
    length: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forced routing: all tokens of an example go to the expert that it was given.

        ids[t] = experts[b] for the tokens t of example b

    experts      (B,) int32 or int64
    length       tokens of each example, one after the other, for x of shape (B, length, H)
    cu_seqlens   (B + 1,) where packed examples begin and end, for x of shape (T, H); instead of
                 length
    mask         (B, length) bool: tokens that are padding are False, and go nowhere

    Returns ids in experts' dtype, (B, length) or (T,), for moe_mlp(x, ids, None, ..). The tokens of
    an expert are whole examples that stand together, which the kernels read where they stand.
    ValueError: a shape or dtype outside the above.

    Source: arXiv 2401.15713, which gives each sentence the expert of its domain.
    """
    name = "route_examples"
    _expect_whole(name, experts=experts)
    n_examples = expect_shapes(name, experts=(experts, "B"))["B"]
    if (length is None) == (cu_seqlens is None):
        raise ValueError(f"{name}: need one of length and cu_seqlens")
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(f"{name}: mask beside cu_seqlens, need length: packed tokens count")
        _expect_whole(name, cu_seqlens=cu_seqlens)
        if cu_seqlens.shape != (n_examples + 1,):
            raise ValueError(
                f"{name}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, "
                f"need ({n_examples + 1},): one more than experts"
            )
        return experts.repeat_interleave(cu_seqlens.diff())
    assert length is not None
    ids = experts[:, None].expand(n_examples, length)
    if mask is None:
        return ids
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise ValueError(
            f"{name}: mask is {mask.dtype} of shape {tuple(mask.shape)}, "
            f"need bool of shape {tuple(ids.shape)}"
        )
    return ids.masked_fill(~mask, -1)


def route_types(token_types: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Forced routing: each token goes to the expert of its type.

        ids[..] = experts[token_types[..]]

    token_types   (..) int32 or int64, 0 to N - 1; others go nowhere
    experts       (N,) int32 or int64, the expert of each type, -1 for nowhere

    Returns ids of token_types' shape for moe_mlp(x, ids, None, ..).
    ValueError: a shape or dtype outside the above.

    Source: arXiv 2401.15713.
    """
    _expect_whole("route_types", token_types=token_types, experts=experts)
    n_types = expect_shapes("route_types", experts=(experts, "N"))["N"]
    inside = (token_types >= 0) & (token_types < n_types)
    if n_types == 0:
        return torch.full_like(token_types, -1, dtype=experts.dtype)
    ids = experts[token_types.clamp(0, n_types - 1).long()]
    return ids.masked_fill(~inside, -1)


def keep_local(ids: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The choice as a process sees it that holds experts `first` to `first + count - 1` alone.

    ids            (T, K) or any other shape, int32 or int64, of all experts; negative ones stay
                   nowhere
    first, count   the experts held here

    Returns ids of the experts held here, 0 to count - 1, and `count` for all others: slots with
    that id take no part in moe_mlp nor in tokens_per_expert(ids, count). Outputs of all processes
    add up to that of all experts.
    ValueError: a dtype or value outside the above.

    Source: Lepikhin et al., GShard, arXiv 2006.16668.
    """
    _expect_whole("keep_local", ids=ids)
    if first < 0 or count < 0:
        raise ValueError(f"keep_local: first is {first} and count {count}, need at least 0")
    is_local = (ids >= first) & (ids < first + count)
    return (ids - first).masked_fill(~is_local, count)


def _expect_whole(name: str, **tensors: torch.Tensor) -> None:
    for argument, t in tensors.items():
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: {argument} is {t.dtype}, need int32 or int64")
