"""Which experts a token goes to, and with which weight: plain torch, in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.shapes import expect_device, expect_shapes

SCORES = ("softmax", "softmax_of_chosen", "sigmoid")
ORDERS = ("arrival", "score", "random")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TINY = 1e-20  # keeps a sum of gates that are all 0 from dividing by 0


class Route(NamedTuple):
    """Where the tokens go.

    ids      (T, K) int64, the experts of each token; -1 where a slot goes nowhere
    gates    (T, K) float32 factors of their outputs, 0 where a slot goes nowhere
    scores   (T, E) float32: softmax or sigmoid of all logits, for the balance loss
    """

    ids: torch.Tensor
    gates: torch.Tensor
    scores: torch.Tensor


class _Logits(torch.autograd.Function):
    """x W^T in float32 of x in any dtype: the float32 copy of x is made again in the backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return as_wide(x) @ as_wide(weight).T

    @staticmethod
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            (d @ as_wide(weight)).to(x.dtype) if needs_x else None,
            (d.T @ as_wide(x)).to(weight.dtype) if needs_weight else None,
        )


def router_logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A router's logits in float32, whatever the dtype of the activations.

        l[t, e] = sum_h x[t, h] weight[e, h] + bias[e]

    x        (T, H) activations
    weight   (E, H)
    bias     (E,)

    Returns (T, E) float32 (float64 of float64). Of x only x itself is kept for the backward.
    ValueError: a shape or dtype outside the above.

    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, section 2.4.
    """
    name = "router_logits"
    expect_float(name, x=x, weight=weight)
    expect_shapes(name, x=(x, "TH"), weight=(weight, "EH"))
    expect_device(name, x=x, weight=weight, bias=bias)
    logits = _Logits.apply(x, weight)
    if bias is None:
        return logits
    expect_shapes(name, weight=(weight, "EH"), bias=(bias, "E"))
    return logits + as_wide(bias)


def route_tokens(
    logits: torch.Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    selection_bias: torch.Tensor | None = None,
    n_groups: int = 1,
    kept_groups: int = 1,
    capacity: int | None = None,
    capacity_order: str = "arrival",
    ids: torch.Tensor | None = None,
) -> Route:
    """The experts of each token and the factors of their outputs, from a router's logits.

        s = softmax(l), or sigmoid(l)       e = the top_k largest of s (or l) + selection_bias
        g = s[e]  (/ (sum of them + 1e-20) if renormalize)  times scale

    logits           (T, E) of any floating dtype; T may be 0
    top_k            experts of a token, 1 <= top_k <= E
    score            "softmax"; "softmax_of_chosen": the largest logits, softmax over them; equals
                     "softmax" with renormalize; "sigmoid"
    renormalize      the gates of a token sum to 1, before scale
    scale            factor of all gates
    selection_bias   (E,) added to the scores for the choice alone; gets no gradient
    n_groups         E is cut into so many groups of neighbours
    kept_groups      of them a token chooses from so many, those with the largest sum of their two
                     best biased scores (their best one, if a group is a single expert)
    capacity         tokens that an expert takes at most; the slots beyond go nowhere. A capacity
                     factor c stands for ceil(c T / E)
    capacity_order   which come first: "arrival", first choices before second ones; "score", the
                     largest gates; "random", drawn from torch's default generator
    ids              (T, top_k), a choice made before, -1 for nowhere: nothing is chosen, so that
                     recomputation cannot drift; capacity must then be None

    Returns a Route. Scores and gates are float32 (float64 of float64 logits); the gradient reaches
    the logits through gates and scores. Equal scores go to the lowest index.
    ValueError: a shape, dtype or value outside the above.

    Source: Shazeer et al., arXiv 1701.06538; Fedus et al., Switch Transformers, arXiv 2101.03961;
    DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    name = "route_tokens"
    expect_float(name, logits=logits)
    size = expect_shapes(name, logits=(logits, "TE"))
    n_experts = size["E"]
    _check_choice(name, n_experts, top_k, score, n_groups, kept_groups, capacity, capacity_order)
    wide = as_wide(logits)
    scores = wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)
    if ids is None:
        with torch.no_grad():
            by = wide if score == "softmax_of_chosen" else scores
            if selection_bias is not None:
                expect_shapes(name, logits=(logits, "TE"), selection_bias=(selection_bias, "E"))
                expect_device(name, logits=logits, selection_bias=selection_bias)
                by = by + selection_bias
            if kept_groups < n_groups:
                by = _in_best_groups(by, n_groups, kept_groups)
            chosen = best(by, top_k)
    else:
        chosen = _expect_ids(name, ids, logits, top_k, capacity)
    at = chosen.clamp(min=0)
    if score == "softmax_of_chosen":
        picked = wide.gather(1, at).masked_fill(chosen < 0, float("-inf"))
        # a token that goes nowhere has no softmax
        gates = picked.masked_fill((chosen < 0).all(1, keepdim=True), 0.0).softmax(-1)
    else:
        gates = scores.gather(1, at)
    gates = gates.masked_fill(chosen < 0, 0.0)
    if renormalize:
        gates = gates / (gates.sum(-1, keepdim=True) + TINY)
    if scale != 1.0:
        gates = gates * scale
    if capacity is not None:
        dropped = over_capacity(chosen, gates.detach(), n_experts, capacity, capacity_order)
        chosen, gates = chosen.masked_fill(dropped, -1), gates.masked_fill(dropped, 0.0)
    return Route(chosen, gates, scores)


def choose_tokens(logits: torch.Tensor, capacity: int) -> Route:
    """Expert choice: each expert takes the tokens that score best with it.

        s = softmax(l) over experts       expert e takes the `capacity` largest s[:, e]

    logits     (T, E) of any floating dtype
    capacity   tokens of each expert, 0 <= capacity <= T; the paper's is ceil(c T / E) for a
               capacity factor c

    Returns a Route of E slots: slot e of a token is e where expert e takes it, else -1. A token may
    go to all experts or to none; the choice looks at the whole batch, so it is not causal.
    ValueError: a shape, dtype or value outside the above.

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368.
    """
    name = "choose_tokens"
    expect_float(name, logits=logits)
    size = expect_shapes(name, logits=(logits, "TE"))
    n_tokens, n_experts = size["T"], size["E"]
    if not 0 <= capacity <= n_tokens:
        raise ValueError(f"{name}: capacity is {capacity}, need 0 to {n_tokens}: T as in logits")
    scores = as_wide(logits).softmax(-1)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    taken.scatter_(0, best(scores.detach().T, capacity).T, True)
    experts = torch.arange(n_experts, device=logits.device).expand(n_tokens, n_experts)
    return Route(experts.masked_fill(~taken, -1), scores.masked_fill(~taken, 0.0), scores)


def tokens_per_expert(ids: torch.Tensor, n_experts: int) -> torch.Tensor:
    """How many slots go to each expert.

    ids         (T, K) or any other shape of experts; others than 0 to n_experts - 1 do not count
    n_experts   E

    Returns (E,) int64. ValueError: ids are not whole numbers.

    Source: DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens_per_expert: ids is {ids.dtype}, need int32 or int64")
    flat = ids.reshape(-1)
    inside = (flat >= 0) & (flat < n_experts)
    # a bin for what does not count: the size of the result must not depend on values
    flat = flat.masked_fill(~inside, n_experts)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.index_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))[:-1]


@torch.no_grad()
def update_router_bias(
    selection_bias: torch.Tensor, counts: torch.Tensor, *, rate: float = 1e-3
) -> None:
    """One step of balancing without a loss: experts with too few tokens become easier to choose.

        b[e] += rate sign(mean(counts) - counts[e])

    selection_bias   (E,) changed in place
    counts           (E,) slots of each expert in the whole batch of an optimizer step: over several
                     processes the sum of theirs, and each token once even if its layer ran again
    rate             the step, in units of the scores

    ValueError: shapes that differ.

    Source: Wang et al., arXiv 2408.15664, algorithm 1.
    """
    expect_shapes("update_router_bias", selection_bias=(selection_bias, "E"), counts=(counts, "E"))
    # in whole numbers: E counts are compared with their sum, and an exact balance moves nothing
    counts = counts.to(torch.int64)
    selection_bias += rate * torch.sign(counts.sum() - counts.numel() * counts)


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(.., k) indices of the largest along the last axis, best first, lowest index first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def over_capacity(ids, gates, n_experts, capacity, order) -> torch.Tensor:
    """(T, K) bool: the slots that come after the first `capacity` of their expert."""
    n_tokens, top_k = ids.shape
    if order == "arrival":  # all first choices, then all second ones
        first = torch.arange(n_tokens * top_k, device=ids.device)
        first = first.view(n_tokens, top_k).T.reshape(-1)
    elif order == "score":
        first = best(gates.reshape(-1), n_tokens * top_k)
    else:
        first = torch.randperm(n_tokens * top_k, device=ids.device)
    expert = ids.reshape(-1)[first]
    by_expert = expert.sort(stable=True)
    begins = torch.searchsorted(by_expert.values, by_expert.values)  # of its expert
    rank = torch.arange(expert.numel(), device=ids.device) - begins
    is_over = torch.zeros(expert.numel(), dtype=torch.bool, device=ids.device)
    is_over[first[by_expert.indices]] = rank >= capacity
    return is_over.view_as(ids)


def _in_best_groups(by: torch.Tensor, n_groups: int, kept_groups: int) -> torch.Tensor:
    """Scores with those outside a token's best groups at -inf."""
    grouped = by.view(by.shape[0], n_groups, -1)
    of_group = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(of_group, dtype=torch.bool)
    kept.scatter_(1, best(of_group, kept_groups), True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).view_as(by)


def as_wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def expect_float(name: str, **tensors: torch.Tensor) -> None:
    for argument, t in tensors.items():
        if t.dtype not in FLOATS:
            raise ValueError(
                f"{name}: {argument} is {t.dtype}, need float32, bfloat16, float16 or float64"
            )


def _check_choice(name, n_experts, top_k, score, n_groups, kept_groups, capacity, order) -> None:
    if score not in SCORES:
        raise ValueError(f"{name}: no score {score!r}. Known: {', '.join(SCORES)}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"{name}: top_k is {top_k}, need 1 to {n_experts}: E as in logits")
    if n_groups < 1 or n_experts % n_groups:
        raise ValueError(f"{name}: n_groups is {n_groups}, need a divisor of E = {n_experts}")
    if not 1 <= kept_groups <= n_groups:
        raise ValueError(f"{name}: kept_groups is {kept_groups}, need 1 to n_groups = {n_groups}")
    if kept_groups * (n_experts // n_groups) < top_k:
        raise ValueError(
            f"{name}: {kept_groups} groups of {n_experts // n_groups} experts, "
            f"need at least top_k = {top_k} experts in them"
        )
    if capacity is not None and capacity < 0:
        raise ValueError(f"{name}: capacity is {capacity}, need at least 0")
    if order not in ORDERS:
        raise ValueError(f"{name}: no capacity_order {order!r}. Known: {', '.join(ORDERS)}")


def _expect_ids(name, ids, logits, top_k, capacity) -> torch.Tensor:
    n_tokens, n_experts = logits.shape
    if capacity is not None:
        raise ValueError(f"{name}: capacity is {capacity} beside ids, need None: they are settled")
    if ids.shape != (n_tokens, top_k) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: ids is {ids.dtype} of shape {tuple(ids.shape)}, "
            f"need int32 or int64 of shape ({n_tokens}, {top_k})"
        )
    if ids.device.type == "cpu" and ids.numel() and not -1 <= ids.min() <= ids.max() < n_experts:
        raise ValueError(
            f"{name}: ids are {int(ids.min())} to {int(ids.max())}, need -1 to {n_experts - 1}"
        )
    return ids.long()
