"""Distillation from a teacher's dense probabilities: two heads, a block of tokens at a time."""

from __future__ import annotations

import torch

from tilewright.direct import may_go_direct
from tilewright.ops.loss.api import INTEGERS, describe_head
from tilewright.ops.loss.op import first_order, kept_dtype, library, wants_gradient
from tilewright.shapes import expect_device

KINDS = ("forward", "reverse", "jensen_shannon")
BLOCK_BYTES = 32 << 20  # of one float32 matrix of a block's logits, of which a few are held

library.define(
    "distillation(Tensor h, Tensor weight, Tensor? bias, Tensor teacher_h, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor factor, float scale, float mixture, str kind, bool[3] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def linear_distillation(
    h: torch.Tensor,
    weight: torch.Tensor,
    teacher_h: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    kind: str = "forward",
    temperature: float = 1.0,
    mixture: float = 0.5,
    denominator: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The divergence between a teacher's and a student's next tokens, neither's logits in memory.

        p = softmax((h weight^T + bias) / temperature), q the same of the teacher
        "forward":  KL(q || p),   "reverse": KL(p || q)
        "jensen_shannon": b KL(q || m) + (1 - b) KL(p || m) with m = b q + (1 - b) p, b = mixture

    h               (T, N) or (..., N), the student's
    weight          (V, N), dtype of h
    teacher_h       (T, M) or (..., M); teacher's tensors get no gradient
    teacher_weight  (V, M), dtype of teacher_h: another width, the same vocabulary
    bias, teacher_bias
                    (V,)
    labels          (T,) or (...) int64 or int32: tokens whose label is ignore_index have no part
    ignore_index    see labels
    kind            which divergence
    temperature     above 0; the loss is not multiplied by its square
    mixture         0 to 1, both excluded
    denominator     as in `linear_cross_entropy`; default the number of tokens that have a part

    Returns the mean as a float32 scalar, 0 without any token; with gradients for h, weight and bias
    that are found in the forward. Computed by torch's operators on every device, in float32 from
    logits in the dtype of h. Under autocast all four are cast.
    ValueError: a shape, dtype or number outside the above.

    Source: Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531; the
    other divergences: Agarwal et al., On-policy distillation of language models, arXiv 2306.13649.
    """
    name = "linear_distillation"
    student = describe_head(
        name, h, weight, bias, None, None, 1 / temperature if temperature else 0
    )
    teacher = describe_head(name, teacher_h, teacher_weight, teacher_bias, None, None, 1.0)
    if teacher_h.shape[:-1] != h.shape[:-1] or teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name}: teacher_h has shape {tuple(teacher_h.shape)} and teacher_weight "
            f"{tuple(teacher_weight.shape)}, need the tokens of h {tuple(h.shape)} and the classes "
            f"of weight {tuple(weight.shape)}"
        )
    expect_device(name, h=h, teacher_h=teacher_h, labels=labels)
    if kind not in KINDS:
        raise ValueError(f'{name}: no kind "{kind}". Known: {", ".join(KINDS)}')
    if not 0 < mixture < 1:
        raise ValueError(f"{name}: mixture is {mixture}, need a number between 0 and 1")
    kept = torch.ones(student.h.shape[0], dtype=torch.bool, device=h.device)
    if labels is not None:
        if labels.dtype not in INTEGERS or labels.shape != h.shape[:-1]:
            raise ValueError(
                f"{name}: labels is {labels.dtype} of shape {tuple(labels.shape)}, need "
                f"torch.int64 or torch.int32 of shape {tuple(h.shape[:-1])}"
            )
        kept = labels.reshape(-1) != ignore_index
    factor = kept.to(kept_dtype(h.dtype))
    below = factor.sum() if denominator is None else torch.as_tensor(denominator).to(factor)
    factor = factor * torch.where(below > 0, 1 / below.clamp(min=1e-38), 0.0)
    leaves = (student.h, student.weight, student.bias)
    wants = [t is not None and wants_gradient(t) for t in leaves]
    inputs = (
        *leaves, teacher.h.detach(), teacher.weight.detach(), teacher.bias, factor,
        1 / temperature, mixture, kind, wants,
    )  # fmt: skip
    if may_go_direct(*inputs[:7]):
        return _Distillation.apply(*inputs)
    return torch.ops.tilewright.distillation(*inputs)[0]


def _divergence(x, y, kind: str, mixture: float):
    """The divergence of each row from logits x of the student and y of the teacher, and dx."""
    log_p, log_q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return (q * (log_q - log_p)).sum(-1), p - q
    if kind == "reverse":
        slope = log_p - log_q
        loss = (p * slope).sum(-1)
        return loss, p * (slope - loss[:, None])
    log_m = torch.log(mixture * q + (1 - mixture) * p)
    slope = log_p - log_m
    of_student = (p * slope).sum(-1)
    loss = mixture * (q * (log_q - log_m)).sum(-1) + (1 - mixture) * of_student
    return loss, (1 - mixture) * p * (slope - of_student[:, None])


def _distillation(
    h, weight, bias, teacher_h, teacher_weight, teacher_bias, factor, scale, mixture, kind, wants
):  # fmt: skip
    wide = {"dtype": kept_dtype(h.dtype), "device": h.device}
    kept = (
        factor.nonzero()[:, 0] if h.device.type == "cpu" else torch.arange(len(h), device=h.device)
    )
    loss = torch.zeros((), **wide)
    dh = torch.zeros_like(h, memory_format=torch.contiguous_format) if wants[0] else None
    dweight = torch.zeros(weight.shape, **wide) if wants[1] else None
    dbias = torch.zeros(weight.shape[0], **wide) if wants[2] else None
    n_block = max(16, min(1024, BLOCK_BYTES // (4 * weight.shape[0])))
    with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
        for rows in kept.split(n_block) if len(kept) else ():
            h_rows = h[rows]
            x = _logits(h_rows, weight, bias, scale, wide["dtype"])
            y = _logits(teacher_h[rows], teacher_weight, teacher_bias, scale, wide["dtype"])
            losses, dx = _divergence(x, y, kind, mixture)
            loss = loss + (losses * factor[rows]).sum()
            if not any(wants):
                continue
            dx = (dx * (scale * factor[rows])[:, None]).to(h.dtype)
            if dh is not None:
                dh[rows] = dx @ weight
            if dweight is not None:
                dweight += dx.T @ h_rows
            if dbias is not None:
                dbias += dx.sum(0, dtype=wide["dtype"])
    dweight = None if dweight is None else dweight.to(weight.dtype)
    return loss, dh, dweight, None if dbias is None else dbias.to(bias.dtype)


def _logits(h, weight, bias, scale, dtype):
    x = (h @ weight.T).to(dtype)
    return (x if bias is None else x + bias) * scale


def _operator(*inputs):
    return tuple(inputs[0].new_empty(0) if t is None else t for t in _distillation(*inputs))


def _setup(ctx, inputs, output):
    ctx.wants = list(inputs[10])
    ctx.save_for_backward(*output[1:])


def _autograd(ctx, d_loss, *_):
    grads = [
        (g * d_loss).to(g.dtype) if wants_it else None
        for g, wants_it in zip(ctx.saved_tensors, ctx.wants, strict=True)
    ]
    return *grads, *[None] * 8


class _Distillation(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _distillation(*inputs)
        _setup(ctx, inputs, output)
        return output[0]

    @staticmethod
    @first_order
    def backward(ctx, d_loss):
        return _autograd(ctx, d_loss)


def _fake(h, weight, bias, *rest):
    wants = rest[7]
    return (
        h.new_empty((), dtype=kept_dtype(h.dtype)),
        *(
            t.new_empty(t.shape) if wants_it else h.new_empty(0)
            for t, wants_it in zip((h, weight, bias), wants, strict=True)
        ),
    )


library.impl("distillation", _operator, "CPU")
library.impl("distillation", _operator, "CUDA")
torch.library.register_fake("tilewright::distillation", _fake, lib=library)
torch.library.register_autograd(
    "tilewright::distillation", _autograd, setup_context=_setup, lib=library
)
