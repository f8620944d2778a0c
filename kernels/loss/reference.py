"""The meaning of the loss room in float64, all logits in memory, differentiable by autograd."""

import torch


def logits(h, weight, bias=None, scale=1.0, softcap=0.0):
    """x (T, V) = softcap tanh(scale (h weight^T + bias) / softcap), float64."""
    z = h.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = scale * z
    return softcap * torch.tanh(z / softcap) if softcap else z


def head(h, weight, bias, ids, class_weight, scale, softcap):
    """log p of ids (T, K), lse (T,) and sum_i w_i log p_i (T,); 0 for negative ids, and for tokens
    that have no other."""
    x = logits(h, weight, bias, scale, softcap)
    lse = torch.logsumexp(x, dim=-1)
    log_p = x - lse[:, None]
    asked = ids >= 0
    log_probs = torch.where(asked, log_p.gather(1, ids.clamp(min=0)), 0.0)
    total = (log_p if class_weight is None else log_p * class_weight.double()).sum(-1)
    kept = asked.any(-1)
    return log_probs, torch.where(kept, lse, 0.0), torch.where(kept, total, 0.0)


def cross_entropy(
    h, weight, labels, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
    z_loss=0.0, softcap=0.0, scale=1.0, class_weight=None, token_weight=None, denominator=None,
):  # fmt: skip
    """u ((1 - e) w_y (lse - x_y) + (e / V) sum_i w_i (lse - x_i) + z lse^2), float64."""
    x = logits(h, weight, bias, scale, softcap)
    n_classes = x.shape[-1]
    kept = labels != ignore_index
    y = torch.where(kept, labels, 0)
    lse = torch.logsumexp(x, dim=-1)
    w = x.new_ones(n_classes) if class_weight is None else class_weight.double()
    loss = (1 - label_smoothing) * w[y] * (lse - x.gather(1, y[:, None])[:, 0])
    loss = loss + label_smoothing / n_classes * (w * (lse[:, None] - x)).sum(-1)
    loss = loss + z_loss * lse.square()
    if token_weight is not None:
        loss = loss * token_weight.double()
    loss = torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if denominator is None:
        denominator = torch.where(kept, w[y], 0.0).sum()
    return loss.sum() / denominator if bool(kept.any()) else loss.sum()
