"""Head and cross-entropy beside torch's, with full logits, compiled, and in blocks.

Axes: T tokens, N the width of a hidden state, V classes. The gradient that comes in is 1, as in
training. `python -m tilewright.bench.loss_memory` shows the memory that each variant takes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilewright
from tilewright.bench.variant import Variant

GRADIENTS = ("h", "weight")
TRAINED = dict(dtypes=("bf16",), modes=("fwd", "fwd+bwd"))
FROZEN = dict(dtypes=("bf16",), modes=("fwd+bwd",), gradients=("h",))

CASES: dict[str, dict] = {
    "2k-1024-32k": dict(T=2048, N=1024, V=32000, dtypes=("bf16", "float32"),
                        modes=("fwd", "fwd+bwd")),
    "2k-2048-32k": dict(T=2048, N=2048, V=32000, **TRAINED),
    "2k-4096-32k-frozen": dict(T=2048, N=4096, V=32000, **FROZEN),
    "8k-1024-32k": dict(T=8192, N=1024, V=32000, **TRAINED),
    "2k-1024-128k": dict(T=2048, N=1024, V=128256, **TRAINED),
    "2k-2048-128k-frozen": dict(T=2048, N=2048, V=128256, **FROZEN),
    "2k-1024-128k-answers": dict(T=2048, N=1024, V=128256, kept=0.1, **FROZEN),
    "2k-1024-32k-each": dict(T=2048, N=1024, V=32000, reduction="none", **TRAINED),
}  # fmt: skip
BLOCK = 256  # tokens of the baseline in blocks


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    n_tokens, width, n_classes = case["T"], case["N"], case["V"]
    labels = torch.randint(n_classes, (n_tokens,), generator=generator, device=device)
    if "kept" in case:
        labels[int(case["kept"] * n_tokens) :] = -100
    return {
        "h": normal(n_tokens, width).to(dtype),
        "weight": (normal(n_classes, width) / width**0.5).to(dtype),
        "labels": labels,
    }


def small(case: dict) -> dict:
    return {**case, "T": 600, "N": 64, "V": 500}


def quick(case: dict) -> dict:
    """A smaller one, for --quick."""
    return {**case, "T": case["T"] // 4, "N": case["N"] // 4, "V": case["V"] // 4}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: one product of the tokens that have a label with the head, in the backward one
    for each gradient. Bytes: the hidden states, the head and their gradients, once by each."""
    n_tokens = case["T"] * case.get("kept", 1.0)
    n_grads = 0 if mode == "fwd" else len(case.get("gradients", GRADIENTS))
    read = itemsize * (n_tokens * case["N"] + case["V"] * case["N"])
    return 2.0 * n_tokens * case["N"] * case["V"] * (1 + n_grads), read * (1 + n_grads)


class _AsTrained(torch.autograd.Function):
    """The loss, with 1 for whatever gradient comes in."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(upstream)


def in_training(loss: torch.Tensor) -> torch.Tensor:
    return _AsTrained.apply(loss) if loss.dim() == 0 else loss


def ours(case: dict, h, weight, labels, impl: str = "auto") -> torch.Tensor:
    loss = tilewright.linear_cross_entropy(
        h, weight, labels, reduction=case.get("reduction", "mean"), impl=impl
    )
    return in_training(loss)


def truth(case: dict, **inputs) -> torch.Tensor:
    return ours(case, impl="reference", **inputs)


def _full(h, weight, labels, reduction: str) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, weight).float(), labels, reduction=reduction)


def full_logits(case: dict, h, weight, labels) -> torch.Tensor:
    """What a transformers model does."""
    return in_training(_full(h, weight, labels, case.get("reduction", "mean")))


stock = full_logits


@functools.lru_cache(maxsize=8)
def _compiled():
    return torch.compile(_full, fullgraph=True, dynamic=False)


def compiled(case: dict, h, weight, labels) -> torch.Tensor:
    return in_training(_compiled()(h, weight, labels, case.get("reduction", "mean")))


def in_blocks(case: dict, h, weight, labels) -> torch.Tensor:
    """Blocks of tokens by torch, each made again in the backward."""
    losses = [
        checkpoint(_full, *block, "none", use_reentrant=False)
        if torch.is_grad_enabled()
        else _full(*block, "none")
        for block in zip(
            h.split(BLOCK), [weight] * -(-len(h) // BLOCK), labels.split(BLOCK), strict=True
        )
    ]
    loss = torch.cat(losses)
    if case.get("reduction") == "none":
        return loss
    return in_training(loss.sum() / (labels != -100).sum())


VARIANTS = {
    "tilewright": Variant(ours),
    "torch": Variant(full_logits),
    "torch in blocks": Variant(in_blocks),
    "torch.compile": Variant(compiled, compiles=True),
}
