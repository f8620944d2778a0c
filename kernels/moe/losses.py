"""What keeps a router's choice balanced and its logits small; plain torch, float32."""

from __future__ import annotations

import torch

from tilewright.ops.moe.routing import tokens_per_expert
from tilewright.shapes import expect_device, expect_shapes

COUNTED = ("all", "mean", "first")


def balance_loss(
    scores: torch.Tensor,
    ids: torch.Tensor,
    *,
    counted: str = "all",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far the experts' shares of tokens and of probability go together.

        E sum_e f[e] P[e]       P[e] = mean_t scores[t, e],  f[e] = slots of expert e / T

    scores    (T, E) softmax of all logits, as in a Route
    ids       (T, K) the choice; slots outside 0 to E - 1 do not count
    counted   "all": every slot counts, so that a balanced router gives K (transformers'
              load_balancing_loss_func); "mean": f / K, balanced 1 (MegaBlocks, SonicMoE,
              DeepSpeed's top-k); "first": the first choices alone, balanced 1 (Switch, GShard).
              A router that sends everything to one expert gives E times as much
    mask      (T,) bool or numbers: tokens that do not count are False or 0

    Returns a float32 number, 0 without tokens; its gradient is that of P alone. No weight is
    applied: papers use 0.01 to 0.001.
    ValueError: a shape or value outside the above.

    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, section 2.2; Lepikhin et al.,
    GShard, arXiv 2006.16668.
    """
    name = "balance_loss"
    if counted not in COUNTED:
        raise ValueError(f"{name}: no counted {counted!r}. Known: {', '.join(COUNTED)}")
    size = expect_shapes(name, scores=(scores, "TE"), ids=(ids, "TK"))
    expect_device(name, scores=scores, ids=ids, mask=mask)
    if counted == "first":
        ids = ids[:, :1]
    weights, n_tokens = _weights(name, scores, mask)
    if mask is not None:
        ids = ids.masked_fill(weights[:, None] == 0, -1)
    shares = tokens_per_expert(ids, size["E"]) / n_tokens
    if counted == "mean":
        shares = shares / size["K"]
    return size["E"] * (shares * ((weights[:, None] * scores).sum(0) / n_tokens)).sum()


def router_z_loss(logits: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Large logits cost: the mean of logsumexp(l)^2 over tokens.

    logits   (T, E) of any floating dtype
    mask     (T,) bool or numbers: tokens that do not count are False or 0

    Returns a float32 number, 0 without tokens. ValueError: a shape outside the above.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906, section 3.2.
    """
    expect_shapes("router_z_loss", logits=(logits, "TE"))
    weights, n_tokens = _weights("router_z_loss", logits, mask)
    return (weights * logits.float().logsumexp(-1).square()).sum() / n_tokens


def importance_loss(
    gates: torch.Tensor, ids: torch.Tensor, n_experts: int, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The squared coefficient of variation of what the experts' gates sum up to.

        var(m) / mean(m)^2,  m[e] = sum of the gates of expert e;  var with 1 / E

    gates       (T, K) of a Route
    ids         (T, K); slots outside 0 to n_experts - 1 do not count
    n_experts   E
    mask        (T,) bool or numbers: tokens that do not count are False or 0

    Returns a float32 number: 0 if balanced, E - 1 if one expert has everything, 0 without tokens.
    ValueError: a shape outside the above.

    Source: Shazeer et al., arXiv 1701.06538, section 4.
    """
    expect_shapes("importance_loss", gates=(gates, "TK"), ids=(ids, "TK"))
    weights, _ = _weights("importance_loss", gates, mask)
    gates = gates.float() * weights[:, None]
    inside = (ids >= 0) & (ids < n_experts)
    flat = ids.masked_fill(~inside, n_experts).reshape(-1).long()
    sums = gates.new_zeros(n_experts + 1).index_add(0, flat, gates.reshape(-1))[:-1]
    return _cv_squared(sums)


def load_loss(
    logits: torch.Tensor,
    noisy_logits: torch.Tensor,
    noise: torch.Tensor,
    top_k: int,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The squared coefficient of variation of the experts' expected numbers of tokens.

        var(n) / mean(n)^2,  n[e] = sum_t Phi((l[t, e] - b[t, e]) / noise[t, e])

    where b[t, e] is the top_k-th largest of the other experts' noisy logits: how likely expert e is
    to be chosen if its noise is drawn again.

    logits         (T, E) without noise
    noisy_logits   (T, E) those that the choice was made from
    noise          (T, E) standard deviation of the noise, or a tensor that broadcasts to it
    top_k          experts of a token, 1 <= top_k < E
    mask           (T,) bool or numbers: tokens that do not count are False or 0

    Returns a float32 number, 0 without tokens. ValueError: a shape or value outside the above.

    Source: Shazeer et al., arXiv 1701.06538, appendix A.
    """
    size = expect_shapes("load_loss", logits=(logits, "TE"), noisy_logits=(noisy_logits, "TE"))
    if not 1 <= top_k < size["E"]:
        raise ValueError(f"load_loss: top_k is {top_k}, need 1 to {size['E'] - 1}: less than E")
    weights, _ = _weights("load_loss", logits, mask)
    noisy = noisy_logits.float()
    largest = noisy.topk(top_k + 1, dim=-1).values
    among = noisy >= largest[:, top_k - 1 : top_k]
    # without a chosen expert the next one moves up to its place
    bound = torch.where(among, largest[:, top_k : top_k + 1], largest[:, top_k - 1 : top_k])
    likely = torch.special.ndtr((logits.float() - bound) / noise)
    return _cv_squared((weights[:, None] * likely).sum(0))


def mutual_information_loss(
    scores: torch.Tensor,
    tasks: torch.Tensor,
    n_tasks: int,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How little a token's task says about its expert: minus their mutual information.

        -sum_ne p[n, e] log(p[n, e] / (p[n] p[e])),  p[n, e] = 1 / T sum of scores[t, e] over
                                                      the tokens t of task n

    scores    (T, E) softmax of all logits, as in a Route
    tasks     (T,) int32 or int64, 0 to n_tasks - 1: the task or domain of each token; tokens with
              others do not count
    n_tasks   N
    mask      (T,) bool or numbers: tokens that do not count are False or 0

    Returns a float32 number in nats: 0 if all tasks use the experts alike or there are no tokens,
    minus log(N) if N tasks of equal size share no expert.
    ValueError: a shape or dtype outside the above.

    Source: Chen et al., Mod-Squad, arXiv 2212.08066.
    """
    name = "mutual_information_loss"
    expect_shapes(name, scores=(scores, "TE"), tasks=(tasks, "T"))
    expect_device(name, scores=scores, tasks=tasks, mask=mask)
    if tasks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: tasks is {tasks.dtype}, need int32 or int64")
    if n_tasks < 1:
        raise ValueError(f"{name}: n_tasks is {n_tasks}, need at least 1")
    weights, _ = _weights(name, scores, mask)
    weights = weights.masked_fill((tasks < 0) | (tasks >= n_tasks), 0.0)
    at = tasks.long().clamp(0, n_tasks - 1)
    sums = weights.new_zeros(n_tasks, scores.shape[1])
    joint = sums.index_add(0, at, weights[:, None] * scores.float()) / weights.sum().clamp(min=1.0)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # a task without tokens, or an expert without scores, adds 0, and its gradient is finite
    ratio = (joint / apart.clamp(min=1e-20)).clamp(min=1e-20)
    return -(joint * ratio.log()).sum()


def _weights(name: str, per_token: torch.Tensor, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) float32 weights of the tokens, and their sum, at least a tiny number."""
    n_tokens = per_token.shape[0]
    if mask is None:
        weights = torch.ones(n_tokens, dtype=torch.float32, device=per_token.device)
    elif mask.shape != (n_tokens,):
        raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}, need ({n_tokens},)")
    else:
        weights = (mask != 0).float()
    return weights, weights.sum().clamp(min=1.0)


def _cv_squared(sums: torch.Tensor) -> torch.Tensor:
    return sums.var(unbiased=False) / sums.mean().square().clamp(min=1e-20)
