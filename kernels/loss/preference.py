"""Losses over log-probabilities of sequences or tokens: preferences, rewards, weights of tokens.

Each is a few lines of torch over what `linear_log_probs` gives; none of them sees logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tilewright.ops.loss.api import INTEGERS, linear_log_probs

OVER = ("sequences", "tokens")


def sequence_log_probs(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    average: bool = False,
    ignore_index: int = -100,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """The log-probability of each sequence's labels, summed or averaged over its tokens.

    h             (B, L, N) or (..., L, N)
    weight        (V, N), dtype of h
    labels        (B, L) or (..., L); already shifted: labels[b, t] is what follows h[b, t]
    average       over the tokens with a label; a sequence without any gives 0
    ignore_index, bias, softcap, logit_scale, impl
                  as in `linear_log_probs`

    Returns (B,) or (...) float32.
    ValueError: as `linear_log_probs`, and labels without an axis of tokens.

    Source: Rafailov et al., Direct preference optimization, arXiv 2305.18290.
    """
    if labels.dim() < 1 or labels.dim() != h.dim() - 1:
        raise ValueError(
            f"sequence_log_probs: labels has shape {tuple(labels.shape)}, need axes (..., L) as h "
            f"{tuple(h.shape)} without its last axis"
        )
    log_probs = linear_log_probs(
        h, weight, labels, bias=bias, ignore_index=ignore_index, softcap=softcap,
        logit_scale=logit_scale, impl=impl,
    )  # fmt: skip
    total = log_probs.sum(-1)
    return total / (labels != ignore_index).sum(-1).clamp(min=1) if average else total


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor | None = None,
    reference_rejected: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Direct preference optimisation, averaged over pairs.

        d = (chosen - reference_chosen) - (rejected - reference_rejected)
        loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

    chosen, rejected     (B,) log-probabilities of sequences under the policy
    reference_chosen, reference_rejected
                         the same under the reference model, which gets no gradient; both None:
                         reference-free, as if they were equal
    beta                 above 0
    label_smoothing      e, 0 to 1/2: the share of pairs that are thought to be the wrong way round

    Returns a float32 scalar; log 2 where the policy is the reference.
    ValueError: shapes that differ, one reference without the other, or a number outside the above.

    Source: Rafailov et al., Direct preference optimization, arXiv 2305.18290, equation 7; label
    smoothing: Mitchell, A note on DPO with noisy preferences.
    """
    name = "dpo_loss"
    _expect_alike(name, chosen=chosen, rejected=rejected)
    _expect_above(name, beta=beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, need 0 to 0.5")
    d = chosen - rejected
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError(f"{name}: one reference came without the other, need both or none")
    if reference_chosen is not None and reference_rejected is not None:
        _expect_alike(
            name, chosen=chosen, reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
        )  # fmt: skip
        d = d - (reference_chosen - reference_rejected).detach()
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * d)
    return (loss - label_smoothing * F.logsigmoid(-beta * d)).mean()


def simpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float = 2.0, margin: float = 1.0
) -> torch.Tensor:
    """Simple preference optimisation, without a reference, averaged over pairs.

        loss = -log sigmoid(beta (chosen - rejected) - margin)

    chosen, rejected  (B,) log-probabilities of sequences, averaged over tokens
    beta              above 0
    margin            at least 0; gamma in the paper

    Returns a float32 scalar.
    ValueError: shapes that differ, or a number outside the above.

    Source: Meng et al., SimPO, arXiv 2405.14734.
    """
    _expect_alike("simpo_loss", chosen=chosen, rejected=rejected)
    _expect_above("simpo_loss", beta=beta)
    if not margin >= 0:
        raise ValueError(f"simpo_loss: margin is {margin}, need at least 0")
    return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()


def orpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    nll: torch.Tensor | None = None,
    weight: float = 0.1,
) -> torch.Tensor:
    """Odds-ratio preference optimisation: the chosen answers' loss, and the ratio of odds.

        loss = nll - weight log sigmoid(log odds(chosen) - log odds(rejected))
        log odds(a) = a - log(1 - exp a)

    chosen, rejected  (B,) log-probabilities of sequences, averaged over tokens; below 0
    nll               a scalar, default -mean(chosen); `linear_cross_entropy` of the chosen answers
                      weighs tokens alike instead of sequences
    weight            at least 0; lambda in the paper

    Returns a float32 scalar.
    ValueError: shapes that differ, or a number outside the above.

    Source: Hong et al., ORPO, arXiv 2403.07691.
    """
    _expect_alike("orpo_loss", chosen=chosen, rejected=rejected)
    if not weight >= 0:
        raise ValueError(f"orpo_loss: weight is {weight}, need at least 0")

    def log_odds(a):
        # log(1 - exp a) by expm1 near 0 and by log1p below; -1 stands in where the other is taken,
        # since a gradient of inf there would become NaN
        is_near = a > -0.6931472
        near = torch.log(-torch.expm1(torch.where(is_near, a, -1.0)))
        return a - torch.where(
            is_near, near, torch.log1p(-torch.exp(torch.where(is_near, -1.0, a)))
        )

    ratio = log_odds(chosen) - log_odds(rejected)
    return (-chosen.mean() if nll is None else nll) - weight * F.logsigmoid(ratio).mean()


def kto_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    is_desirable: torch.Tensor,
    *,
    kl: torch.Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Kahneman-Tversky optimisation of unpaired answers, averaged over sequences.

        r = policy - reference
        loss = desirable_weight (1 - sigmoid(beta (r - kl)))       where is_desirable
             = undesirable_weight (1 - sigmoid(beta (kl - r)))     elsewhere

    policy, reference  (B,) log-probabilities of sequences; the reference gets no gradient
    is_desirable       (B,) bool
    kl                 the point of reference, at least 0 and without a gradient: usually the mean
                       of r over answers to other prompts, clamped at 0
    beta, desirable_weight, undesirable_weight
                       above 0

    Returns a float32 scalar.
    ValueError: shapes that differ, is_desirable not bool, or a number outside the above.

    Source: Ethayarajh et al., KTO, arXiv 2402.01306.
    """
    name = "kto_loss"
    _expect_alike(name, policy=policy, reference=reference, is_desirable=is_desirable)
    _expect_above(
        name, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    if is_desirable.dtype != torch.bool:
        raise ValueError(f"{name}: is_desirable is {is_desirable.dtype}, need torch.bool")
    kl = torch.as_tensor(kl, dtype=policy.dtype, device=policy.device).detach().clamp(min=0)
    gain = beta * (policy - reference.detach() - kl)
    good = desirable_weight * torch.sigmoid(-gain)
    return torch.where(is_desirable, good, undesirable_weight * torch.sigmoid(gain)).mean()


def group_advantages(rewards: torch.Tensor, group_size: int, *, eps: float = 1e-4) -> torch.Tensor:
    """Rewards relative to those of the other answers to the same prompt.

        A = (R - mean) / (std + eps), over each group of neighbours

    rewards     (B,), the answers to one prompt beside each other
    group_size  divides B
    eps         at least 0

    Returns (B,) float32. Equal rewards of a group give 0.
    ValueError: a shape or number outside the above.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300.
    """
    if rewards.dim() != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"group_advantages: rewards has shape {tuple(rewards.shape)}, need axes (B,) with B a "
            f"multiple of group_size = {group_size}"
        )
    if not eps >= 0:
        raise ValueError(f"group_advantages: eps is {eps}, need at least 0")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True).sqrt() + eps)).view(-1)


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    reference_log_probs: torch.Tensor | None = None,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_above: float | None = None,
    average: str = "sequences",
) -> torch.Tensor:
    """Group-relative policy optimisation.

        rho = exp(log_probs - old_log_probs),   d = reference_log_probs - log_probs
        loss[t] = -min(rho A, clamp(rho, 1 - clip, 1 + clip_above) A) + beta (exp(d) - d - 1)

    log_probs            (B, L) of the sampled tokens under the policy, from `linear_log_probs`
    old_log_probs        (B, L) under the policy that drew them; no gradient
    advantages           (B,) or (B, L), as from `group_advantages`; no gradient
    mask                 (B, L) bool: the tokens of the answers
    reference_log_probs  (B, L); needed where beta is not 0; no gradient
    beta                 at least 0
    clip, clip_above     above 0; clip_above is clip by default
    average              "sequences": over each answer's tokens, then over answers; "tokens": over
                         all tokens at once

    Returns a float32 scalar, 0 where the mask is empty.
    ValueError: a shape, dtype or number outside the above.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300; the unequal clip and the
    average over tokens: Yu et al., DAPO, arXiv 2503.14476.
    """
    name = "grpo_loss"
    _expect_alike(name, log_probs=log_probs, old_log_probs=old_log_probs, mask=mask)
    if log_probs.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"{name}: log_probs has shape {tuple(log_probs.shape)} and mask is {mask.dtype}, need "
            "axes (B, L) and torch.bool"
        )
    if advantages.shape not in (log_probs.shape, log_probs.shape[:1]):
        raise ValueError(
            f"{name}: advantages has shape {tuple(advantages.shape)}, need "
            f"{tuple(log_probs.shape[:1])} or {tuple(log_probs.shape)}"
        )
    if average not in OVER:
        raise ValueError(f'{name}: no average "{average}". Known: {", ".join(OVER)}')
    _expect_above(name, clip=clip, clip_above=clip if clip_above is None else clip_above)
    if not beta >= 0 or (beta and reference_log_probs is None):
        raise ValueError(
            f"{name}: beta is {beta}, need at least 0, and reference_log_probs where it is not 0"
        )
    advantage = advantages.detach().view(len(advantages), -1)
    # outside the mask anything may stand, exp(inf) among it
    difference = torch.where(mask, log_probs - old_log_probs.detach(), 0.0)
    rho = torch.exp(difference)
    clipped = rho.clamp(1 - clip, 1 + (clip if clip_above is None else clip_above))
    loss = -torch.minimum(rho * advantage, clipped * advantage)
    if beta and reference_log_probs is not None:
        d = torch.where(mask, reference_log_probs.detach() - log_probs, 0.0)
        loss = loss + beta * (torch.expm1(d) - d)
    loss = torch.where(mask, loss, 0.0)
    if average == "tokens":
        return loss.sum() / mask.sum().clamp(min=1)
    of_sequences = loss.sum(1) / mask.sum(1).clamp(min=1)
    return of_sequences.sum() / mask.any(1).sum().clamp(min=1)


def alignment_loss(
    generation: torch.Tensor, similarity: torch.Tensor, *, temperature: float = 0.05
) -> torch.Tensor:
    """Similarities of candidates drawn towards the probabilities of generating them.

        loss = KL(softmax(generation) || softmax(similarity / temperature)), averaged over queries

    generation   (B, C) log-probabilities of C candidate texts, averaged over tokens; no gradient
    similarity   (B, C) cosines
    temperature  above 0

    Returns a float32 scalar.
    ValueError: shapes that differ, or a number outside the above.

    Source: Man et al., ULLME, arXiv 2408.03402.
    """
    _expect_alike("alignment_loss", generation=generation, similarity=similarity)
    _expect_above("alignment_loss", temperature=temperature)
    want = torch.log_softmax(generation.detach().float(), -1)
    log_p = torch.log_softmax(similarity.float() / temperature, -1)
    return (want.exp() * (want - log_p)).sum(-1).mean()


def listwise_weights(
    labels: torch.Tensor, separators: int | Sequence[int], *, ignore_index: int = -100
) -> torch.Tensor:
    """Weights of the tokens of a ranking "a > b > ...": its first places count most.

        1 + 1 / log2(i + 1) for each token of the identifier at place i = 1, 2, ...
        1 for separators and for tokens without a label

    labels        (B, L) or (..., L) int64 or int32; each row one ranking
    separators    the tokens between identifiers: one or more ids; neighbours among them are one gap
    ignore_index  of tokens that are no part of the ranking

    Returns float32 as labels, for `linear_cross_entropy(..., token_weight=..., denominator=n)` with
    n the number of labels: the weights do not divide. What follows the last identifier counts as
    part of it, but for separators.
    ValueError: labels that are no integers, or without an axis of tokens.

    Source: Liu et al., Sliding windows are not the end: exploring full ranking with long-context
    large language models, arXiv 2412.14574.
    """
    if labels.dtype not in INTEGERS or labels.dim() == 0:
        raise ValueError(
            f"listwise_weights: labels is {labels.dtype} of shape {tuple(labels.shape)}, need "
            "torch.int64 or torch.int32 and axes (..., L)"
        )
    ids = [separators] if isinstance(separators, int) else list(separators)
    apart = torch.isin(labels, torch.tensor(ids, dtype=labels.dtype, device=labels.device))
    named = (labels != ignore_index) & ~apart
    place = _runs(named).clamp(min=1)
    return torch.where(named, 1 + 1 / torch.log2(place + 1.0), 1.0)


def many_shot_weights(
    labels: torch.Tensor,
    *,
    average: str = "tokens",
    shot_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with which every answer of a prompt of many shots is learnt from.

    labels        (B, L) or (..., L): each run of labels is an answer, what lies between has none
    average       "tokens": over all tokens of answers at once; "sequences": over each answer's
                  tokens, then over answers
    shot_weights  (S,): of the first, second, .. answer of a row; default 1. [0, .., 0, 1] learns
                  from the last answer alone
    ignore_index  of tokens outside the answers

    Returns (token_weight as labels, denominator), both float32, for `linear_cross_entropy`. The
    denominator counts tokens, or answers, of all rows, whatever their weights.
    ValueError: labels that are no integers, a wrong shape or average; more answers in a row than
    shot_weights (on a CPU; on a GPU the last weight goes on).

    Source: He et al., Many-shot in-context fine-tuning, arXiv 2506.11103.
    """
    name = "many_shot_weights"
    if labels.dtype not in INTEGERS or labels.dim() == 0:
        raise ValueError(
            f"{name}: labels is {labels.dtype} of shape {tuple(labels.shape)}, need torch.int64 "
            "or torch.int32 and axes (..., L)"
        )
    if average not in OVER:
        raise ValueError(f'{name}: no average "{average}". Known: {", ".join(OVER)}')
    kept = labels != ignore_index
    shot = _runs(kept)  # 1, 2, .. at the tokens of the answers
    weight = kept.float()
    denominator = weight.sum()
    if average == "sequences":
        flat = torch.where(kept, shot, 0).view(-1, labels.shape[-1])
        length = torch.zeros(*flat.shape[:1], labels.shape[-1] + 1, device=labels.device)
        length.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
        weight = weight / length.gather(1, flat).clamp(min=1).view(labels.shape)
        denominator = (length[:, 1:] > 0).sum().float()
    if shot_weights is not None:
        n_shots = shot_weights.numel()
        if shot_weights.dim() != 1 or n_shots < 1:
            raise ValueError(
                f"{name}: shot_weights has shape {tuple(shot_weights.shape)}, need axes (S,)"
            )
        if shot.device.type == "cpu" and shot.numel() and int(shot.max()) > n_shots:
            raise ValueError(
                f"{name}: shot_weights has {n_shots} elements, need {int(shot.max())}: a row of "
                "labels has as many answers"
            )
        weight = weight * shot_weights.float()[(shot - 1).clamp(0, n_shots - 1)]
    return weight, denominator


def meta_weights(ahead: torch.Tensor, behind: torch.Tensor, *, step: float) -> torch.Tensor:
    """Weights of examples with doubtful labels: those whose gradient agrees with that of good ones.

        w[j] = max(0, (ahead[j] - behind[j]) / (2 step)), divided by their sum

    which is, up to terms of step^2, max(0, <g, gradient of loss j>) with g the gradient of the loss
    of a few examples with good labels: no gradient of a gradient is needed.

    ahead   (B,) losses of the examples, `linear_cross_entropy(..., reduction="none")` or sums over
            tokens of it, with step g added to the parameters
    behind  (B,) the same with step g subtracted
    step    above 0

    Returns (B,) float32 without a gradient, with a sum of 1, or all 0 where none agrees.
    ValueError: shapes that differ, or a number outside the above.

    Source: Wang et al., LiST: lite prompted self-training, arXiv 2110.06274; Ren et al., Learning
    to reweight examples for robust deep learning, arXiv 1803.09050.
    """
    _expect_alike("meta_weights", ahead=ahead, behind=behind)
    _expect_above("meta_weights", step=step)
    agreement = ((ahead - behind).detach().float() / (2 * step)).clamp(min=0)
    total = agreement.sum()
    return torch.where(total > 0, agreement / total.clamp(min=1e-38), 0.0)


def _runs(inside: torch.Tensor) -> torch.Tensor:
    """At each place the number of runs of True that have begun in its row."""
    before = F.pad(inside, (1, 0))[..., :-1]
    return (inside & ~before).cumsum(-1)


def _expect_alike(name: str, **tensors: torch.Tensor) -> None:
    first_name, first = next(iter(tensors.items()))
    for argument, t in tensors.items():
        if t.shape != first.shape:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(t.shape)}, need {tuple(first.shape)} as "
                f"{first_name}"
            )


def _expect_above(name: str, **numbers: float) -> None:
    for argument, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}: {argument} is {value}, need a number above 0")
