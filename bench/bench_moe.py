"""The experts' MLPs: coarse and fine-grained experts, balanced and skewed, trained and decoding.

Axes: T tokens, K slots of a token, E experts, H features, I width of an expert. `skew` is the share
of tokens whose first choice is expert 0. The router's own product is not part of what is timed.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

import tilewright
from tilewright.bench.variant import Variant

GRADIENTS = ("x", "gates", "gate_up", "down")

COARSE, FINE = dict(E=8, K=2, H=1024, I=3584), dict(E=64, K=8, H=1024, I=512)
TRAINED = dict(dtypes=("bf16",), modes=("fwd", "fwd+bwd"))
DECODED = dict(dtypes=("bf16",), modes=("fwd",))

CASES = {
    "coarse-512": dict(T=512, **COARSE, **TRAINED),
    "coarse-2k": dict(T=2048, **COARSE, **TRAINED),
    "fine-512": dict(T=512, **FINE, **TRAINED),
    "fine-2k": dict(T=2048, **FINE, **TRAINED),
    "fine-4k": dict(T=4096, **FINE, **TRAINED),
    "fine-2k-skewed": dict(T=2048, skew=0.9, **FINE, **TRAINED),
    "fine-2k-frozen": dict(T=2048, gradients=("x", "gates"), **FINE, **TRAINED),
    "coarse-1": dict(T=1, **COARSE, **DECODED),
    "coarse-8": dict(T=8, **COARSE, **DECODED),
    "fine-1": dict(T=1, **FINE, **DECODED),
    "fine-8": dict(T=8, **FINE, **DECODED),
    "coarse-1-int4": dict(T=1, format="int4", **COARSE, **DECODED),
    "fine-8-int4": dict(T=8, format="int4", **FINE, **DECODED),
    "fine-2k-int4": dict(T=2048, format="int4", gradients=("x", "gates"), **FINE, **TRAINED),
}


@functools.lru_cache(maxsize=2)
def _packed(n_experts: int, n_out: int, n_in: int, seed: int):
    """All experts' weights as one packed weight, and what it decodes to."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_experts * n_out, n_in, generator=generator) / n_in**0.5
    packed = tilewright.quantize_weight(weight, tilewright.Int4(64, solver="minmax"))
    decoded = tilewright.dequantize_weight(packed, torch.float32)
    return packed, decoded.view(n_experts, n_out, n_in)


def _ids(n_tokens: int, n_experts: int, slots: int, skew: float | None, generator) -> torch.Tensor:
    """(T, K), the first that is drawn."""
    logits = torch.randn(n_tokens, n_experts, generator=generator, device=generator.device)
    if skew:
        logits[: int(skew * n_tokens), 0] += 100
    return logits.topk(slots, dim=-1).indices


@functools.cache
def _active(n_tokens: int, n_experts: int, slots: int, skew: float | None) -> int:
    """How many experts have tokens, on a CPU; on a GPU other numbers are drawn."""
    generator = torch.Generator().manual_seed(0)
    return _ids(n_tokens, n_experts, slots, skew, generator).unique().numel()


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """x (T, H), ids and gates (T, K), gate_up (E, 2 I, H) and down (E, H, I)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    ids = _ids(case["T"], case["E"], case["K"], case.get("skew"), generator)
    weights = [
        _packed(*shape, seed)[1].to(device)
        if case.get("format")
        else normal(*shape) / shape[-1] ** 0.5
        for seed, shape in enumerate(_shapes(case))
    ]
    return dict(
        x=normal(case["T"], case["H"]).to(dtype), ids=ids,
        gates=normal(case["T"], case["K"]).softmax(-1),
        gate_up=weights[0].to(dtype), down=weights[1].to(dtype),
    )  # fmt: skip


def _shapes(case: dict) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    n_experts, features, width = case["E"], case["H"], case["I"]
    return (n_experts, 2 * width, features), (n_experts, features, width)


def small(case: dict) -> dict:
    return {**case, "T": min(case["T"], 80), "E": 8, "K": 2, "H": 256, "I": 128}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: three products of each slot with its expert, in the backward once more for the
    inputs and once more for trained weights. Bytes: the weights of experts that have tokens, and x
    and y, once, and in the backward again with their gradients."""
    slots, active = (
        case["T"] * case["K"],
        _active(case["T"], case["E"], case["K"], case.get("skew")),
    )
    trained = "gate_up" in case.get("gradients", GRADIENTS)
    passes = 1 if mode == "fwd" else 3 if trained else 2
    bits = 4.5 if case.get("format") else 8 * itemsize
    weights = active * 3 * case["H"] * case["I"] * bits / 8
    n_bytes = passes * weights + (1 if mode == "fwd" else 2) * itemsize * 2 * case["T"] * case["H"]
    return 6.0 * slots * case["H"] * case["I"] * passes, n_bytes


def ours(case: dict, x, ids, gates, gate_up, down, impl: str = "auto") -> torch.Tensor:
    """All experts by tilewright, (T, H)."""
    if case.get("format") and impl == "auto":
        gate_up, down = (_packed(*shape, n)[0] for n, shape in enumerate(_shapes(case)))
    return tilewright.moe_mlp(x, ids, gates, gate_up, down, impl=impl)


def truth(case: dict, x, ids, gates, gate_up, down) -> torch.Tensor:
    return ours(case, x, ids, gates, gate_up, down, impl="reference")


def stock(case: dict, x, ids, gates, gate_up, down) -> torch.Tensor:
    """transformers' own loop over experts."""
    return by_transformers("eager", case, x, ids, gates, gate_up, down)


def by_transformers(name: str, case: dict, x, ids, gates, gate_up, down) -> torch.Tensor:
    """One of the functions that transformers knows for experts, on these weights."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts: Any = SimpleNamespace(
        config=SimpleNamespace(_experts_implementation=name), num_experts=case["E"],
        gate_up_proj=gate_up, down_proj=down, act_fn=F.silu, has_gate=True, has_bias=False,
        has_post_expert_norm=False, is_transposed=False, is_concatenated=True,
        _is_expert_parallel=False,
    )  # fmt: skip
    experts._apply_gate = functools.partial(_default_apply_gate, experts)
    function = MixtralExperts.forward if name == "eager" else ALL_EXPERTS_FUNCTIONS[name]
    return function(experts, x, ids, gates)


def is_small_enough(case: dict) -> bool:
    """Each slot of batched_mm has a copy of its expert's weights: at most 4 GiB of them."""
    return case["T"] * case["K"] * 3 * case["H"] * case["I"] * 2 < 2**32


VARIANTS = {
    "tilewright": Variant(ours),
    "eager": Variant(functools.partial(by_transformers, "eager")),
    "batched_mm": Variant(
        functools.partial(by_transformers, "batched_mm"), applies=is_small_enough
    ),
    "grouped_mm": Variant(functools.partial(by_transformers, "grouped_mm")),
}
