"""The loss room's first operators: docstrings, checks, and the call into the operators."""

from __future__ import annotations

import math

import torch

from tilewright import choose
from tilewright.ops.loss import op
from tilewright.ops.loss.problem import SKIPPED, Head, Problem, Upstream
from tilewright.shapes import expect_device, expect_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    soft_ids: torch.Tensor | None = None,
    soft_probs: torch.Tensor | None = None,
    soft_weight: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of a linear head, never holding the logits of more than a block of tokens.

        x = logit_scale (h weight^T + bias), with a softcap x = softcap tanh(x / softcap)
        loss[t] = u[t] ((1 - e) w[y] (lse - x[y]) + (e / V) sum_i w[i] (lse - x[i]) + z lse^2)

    with y = labels[t], lse = log sum_i exp(x[i]), e = label_smoothing, w = class_weight,
    u = token_weight, z = z_loss. Soft targets take the place of a share a = soft_weight of the hard
    one: (1 - a) times the terms of e above, and a sum_k soft_probs[t, k] w[i] (lse - x[i]) with
    i = soft_ids[t, k].

    h             (T, N) or (..., N); T may be 0
    weight        (V, N), dtype of h; the head, or the embedding it is tied to
    labels        (T,) or (...), int64 or int32; None with soft targets alone
    bias          (V,) of any floating dtype
    ignore_index  a label that says: this token has no loss of any kind, and costs nothing. Such
                  tokens are left out before the product (on a GPU they only get no gradient)
    reduction     "mean" divides the sum by `denominator`; "sum"; "none": (T,) or (...)
    softcap       above 0
    logit_scale   1 / temperature, and the models' own logit scaling
    class_weight  (V,), at least 0
    token_weight  as labels; gets a gradient if it requires one
    denominator   of "mean": a number or a tensor of one element, such as the valid tokens of all
                  ranks and accumulation steps; default the sum of w[y] over tokens with a loss
    soft_ids      (T, K) or (..., K) int64 or int32, a negative id pads; an id may come twice, as in
                  a mixture of several teachers
    soft_probs    as soft_ids; gets a gradient if it requires one
    soft_weight   0 to 1; 1: labels say no more than which tokens count
    impl          "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns float32. With no label to learn from the loss is 0, and so are its gradients. What does
    not require a gradient costs none: a frozen head skips dweight. "mean" and "sum" find gradients
    in the forward, for three products of T x V x N; "none" makes the logits again in the backward.
    Dtypes of h: float32, bfloat16, float16 (float64: reference only); statistics and the sums of
    dweight are float32, logits have the dtype of h, as in torch; the error against float64 is at
    most twice that of torch's head and cross_entropy. Under autocast h and weight are cast.
    ValueError: a shape, dtype or value outside the above; labels out of range on a CPU. On a GPU
    they are not read back, and the loss becomes NaN. RuntimeError: `impl` was named and cannot run
    here.

    Source: Wijmans et al., Cut your losses in large-vocabulary language models, arXiv 2411.09009;
    Hsu et al., Liger kernel, arXiv 2410.10989.
    """
    name = "linear_cross_entropy"
    if labels is None and soft_ids is None:
        raise ValueError(f"{name}: needs labels, or soft_ids and soft_probs")
    if reduction not in REDUCTIONS:
        raise ValueError(f'{name}: no reduction "{reduction}". Known: {", ".join(REDUCTIONS)}')
    for argument, value, most in (
        ("label_smoothing", label_smoothing, 1.0),
        ("z_loss", z_loss, math.inf),
        ("soft_weight", soft_weight, 1.0),
    ):
        if not 0 <= value <= most or value == math.inf:
            needed = "a finite number of at least 0" if most == math.inf else "0 to 1"
            raise ValueError(f"{name}: {argument} is {value}, need {needed}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f'{name}: a denominator belongs to reduction="mean", not "{reduction}"')
    shape = h.shape[:-1]
    head = describe_head(name, h, weight, bias, class_weight, softcap, logit_scale)
    labels = _flat_labels(name, "labels", labels, shape, head.h)
    soft_ids, soft_probs = _soft_targets(name, soft_ids, soft_probs, shape, head.h)
    token_weight = _flat_weights(name, token_weight, shape, head.h)
    head, upstream, n_labels, weight_of_labels = _parts(
        head, labels, ignore_index, label_smoothing, z_loss, token_weight, soft_ids, soft_probs,
        soft_weight,
    )  # fmt: skip
    if reduction == "none":
        return _apart(head, upstream, name, n_labels, impl).view(shape)
    if reduction == "sum":
        return _summed(head, upstream, None, name, n_labels, impl)
    if denominator is None:
        denominator = weight_of_labels.sum()
    elif not isinstance(denominator, torch.Tensor):
        if not denominator > 0:
            raise ValueError(f"{name}: denominator is {denominator}, need a number above 0")
        denominator = torch.full((), denominator, dtype=torch.float32, device=h.device)
    elif denominator.numel() != 1:
        raise ValueError(
            f"{name}: denominator has shape {tuple(denominator.shape)}, need one element"
        )
    below = torch.as_tensor(denominator).to(weight_of_labels).reshape(())
    # a batch without labels has a denominator of 0, and no loss
    factor = torch.where(below > 0, 1 / below.clamp(min=1e-38), 0.0)
    return _summed(head, upstream, factor, name, n_labels, impl)


def linear_log_probs(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """The log-probability of each token's label under a linear head, without the logits in memory.

        y[t] = x[labels[t]] - log sum_i exp(x[i]),   x as in `linear_cross_entropy`

    h             (T, N) or (..., N); T may be 0
    weight        (V, N), dtype of h
    labels        (T,) or (...), int64 or int32; or (..., K): K classes for each token
    bias          (V,) of any floating dtype
    ignore_index  a label whose result is 0, with no gradient; tokens without any other label are
                  left out before the product
    softcap       above 0
    logit_scale   1 / temperature, and the models' own logit scaling
    impl          "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns y float32, as labels; differentiable in h, weight and bias for any gradient that comes
    in: the backward makes the logits again, a block at a time. Dtypes, accuracy and refusals are
    those of `linear_cross_entropy`.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and cannot
    run here.

    Source: Rafailov et al., Direct preference optimization, arXiv 2305.18290, equation 7, whose
    sequence log-probabilities are sums of these.
    """
    name = "linear_log_probs"
    head = describe_head(name, h, weight, bias, None, softcap, logit_scale)
    shape = tuple(h.shape[:-1])
    if labels.dim() == len(shape) + 1:
        shape = (*shape, labels.shape[-1])
    if tuple(labels.shape) != shape or labels.dtype not in INTEGERS:
        raise ValueError(
            f"{name}: labels is {labels.dtype} of shape {tuple(labels.shape)}, need torch.int64 or "
            f"torch.int32 of shape {tuple(h.shape[:-1])}, or with one more axis"
        )
    expect_device(name, h=h, labels=labels)
    n_ids = labels.shape[-1] if labels.dim() == h.dim() else 1
    ids = labels.reshape(head.h.shape[0], n_ids).long()
    head = head._replace(ids=torch.where(ids == ignore_index, SKIPPED, ids))
    log_probs, _, _ = op.call_statistics(head, False, name, ids.shape[1], impl)
    return log_probs.view(labels.shape)


def describe_head(name, h, weight, bias, class_weight, softcap, logit_scale) -> Head:
    """Checks of a head; h as (T, N), ids still empty."""
    device = h.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and h.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        h, weight = h.to(dtype), weight.to(dtype)
    expect_dtype(name, DTYPES, h=h, weight=weight)
    expect_device(name, h=h, weight=weight, bias=bias, class_weight=class_weight)
    if h.dim() == 0 or h.shape[-1] < 1:
        raise ValueError(f"{name}: h has shape {tuple(h.shape)}, need axes (..., N), N at least 1")
    if weight.dim() != 2 or weight.shape[1] != h.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, need axes (V, N) with V at least 1 "
            f"and N = {h.shape[-1]} as in h"
        )
    for argument, t in (("bias", bias), ("class_weight", class_weight)):
        if t is None:
            continue
        if t.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(t.shape)}, need ({weight.shape[0]},): V as "
                "in weight"
            )
        if t.dtype not in DTYPES:
            expect_dtype(name, DTYPES, **{argument: t})
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}, need a number above 0, or None")
    if not math.isfinite(logit_scale):
        raise ValueError(f"{name}: logit_scale is {logit_scale}, need a finite number")
    h = h.reshape(-1, h.shape[-1])
    ids = h.new_empty(h.shape[0], 0, dtype=torch.int64)
    return Head(h, weight, bias, ids, class_weight, float(logit_scale), float(softcap or 0.0))


def _flat_labels(name, argument, t, shape, h) -> torch.Tensor | None:
    if t is None:
        return None
    if t.dtype not in INTEGERS or tuple(t.shape) != tuple(shape):
        raise ValueError(
            f"{name}: {argument} is {t.dtype} of shape {tuple(t.shape)}, need torch.int64 or "
            f"torch.int32 of shape {tuple(shape)} as h without its last axis"
        )
    expect_device(name, h=h, **{argument: t})
    return t.reshape(-1).long()


def _flat_weights(name, t, shape, h) -> torch.Tensor | None:
    if t is None:
        return None
    if tuple(t.shape) != tuple(shape) or t.dtype not in DTYPES:
        raise ValueError(
            f"{name}: token_weight is {t.dtype} of shape {tuple(t.shape)}, need a floating dtype "
            f"and shape {tuple(shape)} as h without its last axis"
        )
    expect_device(name, h=h, token_weight=t)
    return t.reshape(-1).to(op.kept_dtype(h.dtype))


def _soft_targets(name, ids, probs, shape, h):
    if (ids is None) != (probs is None):
        given, other = ("soft_ids", "soft_probs") if probs is None else ("soft_probs", "soft_ids")
        raise ValueError(f"{name}: {given} came without {other}, need both or none")
    if ids is None:
        return None, None
    if ids.dtype not in INTEGERS or ids.shape[:-1] != shape or ids.dim() != len(shape) + 1:
        raise ValueError(
            f"{name}: soft_ids is {ids.dtype} of shape {tuple(ids.shape)}, need torch.int64 or "
            f"torch.int32 of shape {(*shape, 'K')}"
        )
    if probs.shape != ids.shape or probs.dtype not in DTYPES:
        raise ValueError(
            f"{name}: soft_probs is {probs.dtype} of shape {tuple(probs.shape)}, need a floating "
            f"dtype and shape {tuple(ids.shape)} as soft_ids"
        )
    expect_device(name, h=h, soft_ids=ids, soft_probs=probs)
    flat = (h.shape[0], ids.shape[-1])
    return ids.reshape(flat).long(), probs.reshape(flat).to(op.kept_dtype(h.dtype))


def _parts(
    head, labels, ignore_index, smoothing, z_loss, token_weight, soft_ids, soft_probs, soft_weight
):  # fmt: skip
    """The head with its ids, what multiplies its statistics in the loss, how many ids are labels,
    and of each token the weight of its label."""
    n_classes = head.weight.shape[0]
    of = {"dtype": op.kept_dtype(head.h.dtype), "device": head.h.device}
    w = None if head.class_weight is None else head.class_weight.detach().to(of["dtype"])
    columns, factors = [], []
    if labels is not None:
        kept = labels != ignore_index
        columns.append(torch.where(kept, labels, SKIPPED)[:, None])
    else:
        kept = (soft_ids >= 0).any(1)
    u = kept.to(of["dtype"])
    weight_of_labels = u
    if w is not None and labels is not None:
        # an id that is out of range is named later, where it can be read
        weight_of_labels = u * w[torch.where(kept, labels, 0).clamp(0, n_classes - 1)]
    if token_weight is not None:
        u = torch.where(kept, token_weight, 0.0)
    share = 0.0
    if labels is not None:
        share = 1.0 if soft_ids is None else 1.0 - soft_weight
        hard = u if w is None else torch.where(kept, u * weight_of_labels, 0.0)
        factors.append((-share * (1.0 - smoothing)) * hard[:, None])
    if soft_ids is not None:
        asked = kept[:, None] & (soft_ids >= 0)
        columns.append(torch.where(asked, soft_ids, SKIPPED))
        soft = soft_probs if w is None else soft_probs * w[soft_ids.clamp(0, n_classes - 1)]
        weight_of_soft = soft_weight if labels is not None else 1.0
        factors.append(torch.where(asked, -weight_of_soft * soft * u[:, None], 0.0))
    ids, for_ids = torch.cat(columns, dim=1), torch.cat(factors, dim=1)
    for_total = (-share * smoothing / n_classes) * u if share * smoothing else None
    for_square = z_loss * u if z_loss else None
    head = head._replace(ids=ids, class_weight=w if smoothing else None)
    upstream = Upstream(for_ids, for_total, None, for_square)
    return head, upstream, 0 if labels is None else 1, weight_of_labels


def _apart(head: Head, upstream: Upstream, name, n_labels, impl) -> torch.Tensor:
    """The loss of each token, (T,)."""
    wants_total = upstream.for_total is not None
    log_probs, lse, total = op.call_statistics(head, wants_total, name, n_labels, impl)
    loss = (log_probs * upstream.for_ids).sum(1)
    if wants_total:
        loss = loss + total * upstream.for_total
    if upstream.for_square is not None:
        loss = loss + lse.square() * upstream.for_square
    return loss


def _summed(head: Head, upstream: Upstream, factor, name, n_labels, impl) -> torch.Tensor:
    """The loss of all tokens, times a factor."""
    # float16 would lose gradients to underflow, so there the factor comes last
    if factor is not None and head.h.dtype != torch.float16:
        whole, factor = factor, None
        upstream = upstream.mapped(lambda t: t * whole)
    if op.wants_gradient(*head[:3]):
        loss = op.call_loss(head, upstream, name, n_labels, impl)
    else:
        wants_total = upstream.for_total is not None
        log_probs, lse, total = op.call_statistics(head, wants_total, name, n_labels, impl)
        loss = op.summed(log_probs, lse, total, upstream)
    return loss if factor is None else loss * factor


_CANDIDATES = (
    choose.implementation_of("loss", "triton_gpu"),
    choose.implementation_of("loss", "cpp_cpu"),
    choose.REFERENCE,
)


def _register(name: str) -> None:
    def described(h, *args, impl="auto", **kwargs) -> Problem:
        return Problem(name, h.device.type, h.dtype)

    def samples() -> dict[str, object]:
        return {
            label: Problem(name, device, dtype) for label, device, dtype in choose.usual_types()
        }

    choose.register(choose.Operator(name, _CANDIDATES, described, samples))


for _name in ("linear_cross_entropy", "linear_log_probs"):
    _register(_name)
