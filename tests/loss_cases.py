"""Cases of the loss room: inputs, our call, torch's own way in the same dtype, and the truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tilewright import ops
from tilewright.ops.loss import reference


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Case:
    """A call of linear_cross_entropy on T tokens of width N and V classes.

    size      of the logits; large: confident predictions
    ignored   every which token has no label; 1: all of them
    parts     tensors beside h and weight: bias, class_weight, token_weight
    options   numbers
    """

    T: int
    N: int
    V: int
    size: float = 1.0
    ignored: int = 0
    parts: tuple[str, ...] = ()
    reduction: str = "mean"
    options: dict = field(default_factory=dict)


CASES = {
    "plain": Case(33, 24, 50),
    "one of everything": Case(1, 1, 1),
    "one token": Case(1, 8, 130),
    "no tokens": Case(0, 8, 5),
    "odd extents": Case(17, 13, 1001, ignored=3, parts=("bias",)),
    "all ignored": Case(9, 8, 20, ignored=1, parts=("bias",)),
    "each its own gradient": Case(40, 16, 77, ignored=4, reduction="none"),
    "sum": Case(40, 16, 77, ignored=7, reduction="sum"),
    "smoothing": Case(30, 16, 77, ignored=5, options={"label_smoothing": 0.1}),
    "z": Case(30, 16, 77, options={"z_loss": 1e-2}),
    "softcap": Case(30, 16, 77, size=4.0, options={"softcap": 5.0}),
    "scaled": Case(30, 16, 77, options={"logit_scale": 0.3}, parts=("bias",)),
    "class weights": Case(60, 16, 7, ignored=6, parts=("class_weight",)),
    "token weights": Case(30, 16, 77, ignored=6, parts=("token_weight",)),
    "denominator": Case(30, 16, 77, ignored=6, options={"denominator": 40.0}),
    "confident": Case(40, 16, 90, size=9.0),
    "all at once": Case(
        70, 20, 101, size=3.0, ignored=4, parts=("bias", "class_weight", "token_weight"),
        options={"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 6.0, "logit_scale": 1.3},
    ),
    "all at once, each": Case(
        70, 20, 101, size=3.0, ignored=4, parts=("bias", "class_weight", "token_weight"),
        reduction="none",
        options={"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 6.0, "logit_scale": 1.3},
    ),
    "several blocks": Case(1300, 12, 35, ignored=11, parts=("bias",)),
}  # fmt: skip
LEAVES = ("h", "weight", "bias", "token_weight")


def make(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    h = normal(case.T, case.N) * case.size / case.N**0.25
    weight = normal(case.V, case.N, seed=1) / case.N**0.25
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(case.V, (case.T,), generator=generator)
    if case.size > 5:  # the model knows the answer
        labels = (h @ weight.T).argmax(1)
    if case.ignored:
        labels[:: case.ignored] = -100
    tensors = {"h": h.to(dtype), "weight": weight.to(dtype), "labels": labels}
    if "bias" in case.parts:
        tensors["bias"] = normal(case.V, seed=3, dtype=dtype)
    if "class_weight" in case.parts:
        tensors["class_weight"] = 0.5 + torch.rand(case.V, generator=generator)
    if "token_weight" in case.parts:
        tensors["token_weight"] = 0.5 + torch.rand(case.T, generator=generator)
    return tensors


def ours(case: Case, tensors: dict, impl: str = "auto") -> torch.Tensor:
    return ops.linear_cross_entropy(**tensors, reduction=case.reduction, impl=impl, **case.options)


def truth(case: Case, tensors: dict) -> torch.Tensor:
    names = {"logit_scale": "scale"}
    options = {names.get(name, name): value for name, value in case.options.items()}
    return reference.cross_entropy(**tensors, reduction=case.reduction, **options)


def stock(case: Case, tensors: dict) -> torch.Tensor:
    """transformers' way: logits in the dtype, then float32, then torch's cross_entropy."""
    t, o = tensors, case.options
    x = F.linear(t["h"], t["weight"], t.get("bias")) * o.get("logit_scale", 1.0)
    cap = o.get("softcap")
    if cap:
        x = torch.tanh(x / cap) * cap
    x = x.float()
    loss = F.cross_entropy(
        x, t["labels"], t.get("class_weight"), label_smoothing=o.get("label_smoothing", 0.0),
        reduction="none",
    )  # fmt: skip
    kept = t["labels"] != -100
    loss = loss + torch.where(kept, o.get("z_loss", 0.0) * torch.logsumexp(x, -1).square(), 0.0)
    if "token_weight" in t:
        loss = loss * t["token_weight"]
    if case.reduction == "none":
        return loss
    if case.reduction == "sum":
        return loss.sum()
    weights = torch.ones(case.V) if "class_weight" not in t else t["class_weight"]
    below = o.get("denominator", weights[t["labels"][kept]].sum())
    return loss.sum() / below if bool(kept.any()) else loss.sum()


def both_ways(function, case: Case, tensors: dict, **kwargs) -> dict[str, torch.Tensor]:
    """The loss, and the gradients of all leaves for an upstream that is drawn by shape."""
    tensors = {
        name: t.detach().requires_grad_(name in LEAVES) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    loss = function(case, tensors, **kwargs)
    names = [name for name in tensors if name in LEAVES]
    upstream = torch.ones_like(loss)
    if loss.dim():
        upstream = normal(*loss.shape, seed=9).to(loss)
    grads = torch.autograd.grad(loss, [tensors[n] for n in names], upstream, allow_unused=True)
    zeros = [
        torch.zeros_like(tensors[n]) if g is None else g for n, g in zip(names, grads, strict=True)
    ]
    return {"loss": loss.detach()} | dict(zip([f"d{n}" for n in names], zeros, strict=True))


def exact(tensors: dict) -> dict[str, torch.Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def terms_of(case: Case, tensors: dict, part: str, true: torch.Tensor, dtype: torch.dtype):
    """What a part is the sum of, for the yardstick; None: itself.

    A loss is the difference of two numbers of the size of the logits. Of a mean in 16 bits torch's
    error is one draw, so it is held against the rounding of that many logits.
    """
    if part == "dtoken_weight" or case.T == 1:
        return torch.ones_like(true)
    if part != "loss":
        return None
    terms = torch.full_like(true, 10.0 * case.size)
    if dtype != torch.float32 and not true.dim():
        steps = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        n_kept = max(1, int((tensors["labels"] >= 0).sum()))
        terms += case.size * steps * n_kept**0.5 / (1 if case.reduction == "sum" else n_kept)
    return terms
