"""Attention: causal and bidirectional training shapes, shifted-sparse segments, decoding.

Axes: B batch rows, L queries and keys, H query heads, Hkv key/value heads, D head width,
G group size of shifted segments, S cached keys of a decoding step.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F

import tilewright
from tilewright import choose
from tilewright.bench.variant import Variant
from tilewright.ops.attention import reference

GRADIENTS = ("q", "k", "v")
TRAINED = dict(dtypes=("bf16", "float32"), modes=("fwd", "fwd+bwd"))
SHIFTED = dict(dtypes=("bf16", "float32"), modes=("fwd+bwd",))
DECODED = dict(dtypes=("bf16", "float32"), modes=("fwd",))

CASES = {
    "causal-2k": dict(B=1, L=2048, H=8, D=128, is_causal=True, **TRAINED),
    "causal-4k": dict(B=1, L=4096, H=8, D=128, is_causal=True, **TRAINED),
    "causal-2k-d64": dict(B=1, L=2048, H=16, D=64, is_causal=True, **TRAINED),
    "bert-128-d32": dict(B=8, L=128, H=12, D=32, is_causal=False, **TRAINED),
    "bert-128-d64": dict(B=8, L=128, H=12, D=64, is_causal=False, **TRAINED),
    "bert-512-d32": dict(B=8, L=512, H=12, D=32, is_causal=False, **TRAINED),
    "bert-512-d64": dict(B=8, L=512, H=12, D=64, is_causal=False, **TRAINED),
    "shifted-8k": dict(B=1, L=8192, H=8, D=128, is_causal=True, G=2048, **SHIFTED),
    "decode-4k": dict(B=1, S=4096, H=8, Hkv=8, D=128, **DECODED),
    "decode-4k-b8": dict(B=8, S=4096, H=8, Hkv=8, D=128, **DECODED),
    "decode-4k-gqa": dict(B=1, S=4096, H=32, Hkv=8, D=128, **DECODED),
    "decode-4k-gqa-b8": dict(B=8, S=4096, H=32, Hkv=8, D=128, **DECODED),
}


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """q (B, L, H, D), k and v (B, L, H, D); for decoding q (B, 1, H, D), k and v (B, S, Hkv, D)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if "S" in case:
        cache = case["B"], case["S"], case["Hkv"], case["D"]
        return dict(
            q=normal(case["B"], 1, case["H"], case["D"]), k=normal(*cache), v=normal(*cache)
        )
    shape = case["B"], case["L"], case["H"], case["D"]
    return dict(q=normal(*shape), k=normal(*shape), v=normal(*shape))


def small(case: dict) -> dict:
    """The same features in a shape whose every pair the reference can write out."""
    if "S" in case:
        return {**case, "B": min(case["B"], 2), "S": 200}
    groups = {"G": 64} if case.get("G") else {}  # divides the length: the published way needs it
    return {**case, "B": min(case["B"], 2), "L": 256, **groups}


def group_sizes(length: int, group: int, shift: int) -> list[int]:
    """Sizes of the groups that a grid of `group`, moved left by `shift`, cuts `length` into."""
    edges = [0, *range(group - shift, length, group), length]
    return [b - a for a, b in itertools.pairwise(edges) if b > a]


def visible_pairs(case: dict) -> int:
    """Pairs of query and key that the rule lets see each other, over all heads and rows."""
    if "S" in case:
        return case["B"] * case["H"] * case["S"]
    length, group = case["L"], case.get("G")
    shifts = (0, group // 2) if group else (0, 0)
    shifted_heads = case["H"] // 2
    total = 0
    for heads, shift in zip((case["H"] - shifted_heads, shifted_heads), shifts, strict=True):
        for n in group_sizes(length, group or length, shift):
            total += heads * (n * (n + 1) // 2 if case["is_causal"] else n * n)
    return case["B"] * total


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: two products of width D for each visible pair, and five more in the backward.
    Bytes: each tensor once, forward q k v out, backward those again and dout dq dk dv."""
    products = 7 if mode == "fwd+bwd" else 2
    operations = 2.0 * products * case["D"] * visible_pairs(case)
    if "S" in case:
        rows = case["B"] * case["D"]
        return operations, itemsize * rows * 2.0 * (case["H"] + case["S"] * case["Hkv"])
    tensor = case["B"] * case["L"] * case["H"] * case["D"]
    return operations, itemsize * tensor * (12.0 if mode == "fwd+bwd" else 4.0)


def _rule(case: dict) -> dict:
    segments = None
    if case.get("G"):
        segments = tilewright.ShiftedSegments(case["G"], wraparound=case.get("wraparound", False))
    return dict(is_causal=case["is_causal"], segments=segments)


@functools.lru_cache(maxsize=8)
def _lengths(rows: int, n: int, device: torch.device) -> torch.Tensor:
    return torch.full((rows,), n, dtype=torch.int32, device=device)


def ours(case: dict, q, k, v, impl: str = "auto") -> torch.Tensor:
    """Attention by tilewright, (B, L, H, D)."""
    if "S" in case:
        lengths = _lengths(case["B"], case["S"], q.device)
        out = tilewright.flash_decode(q, k, v, key_lengths=lengths, impl=impl)
    else:
        out = tilewright.flash_attention(q, k, v, **_rule(case), impl=impl)
    assert isinstance(out, torch.Tensor)  # a pair only with return_lse
    return out


def truth(case: dict, q, k, v) -> torch.Tensor:
    return ours(case, q, k, v, impl="reference")


def stock(case: dict, q, k, v) -> torch.Tensor:
    """torch's attention with the case's mask written out: the yardstick of errors."""
    mask = None
    if "S" not in case:
        problem = choose.OPERATORS["flash_attention"].problem(q, k, v, **_rule(case))
        mask = reference.visible_pairs(problem).to(q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa="S" in case)
    return out.transpose(1, 2)


def heads_first(case: dict, inputs: dict) -> dict:
    """(B, H, L, D) contiguous: the layout that torch's attention likes best."""
    return {name: exchange(t).contiguous() for name, t in inputs.items()}


def exchange(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2)


def sdpa(case: dict, q, k, v) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=case.get("is_causal", False), enable_gqa="S" in case
    )


def sdpa_in_rolled_groups(case: dict, q, k, v) -> torch.Tensor:
    """Shifted-sparse attention as published: half of the heads roll by G / 2 around the sequence,
    groups become batch rows, and the result rolls back. LongLoRA, arXiv 2309.12307, algorithm 1."""
    rows, length, heads, width = q.shape
    group, kept = case["G"], (heads + 1) // 2

    def roll(t, by):
        return torch.cat([t[:, :, :kept], t[:, :, kept:].roll(by, dims=1)], dim=2)

    def in_groups(t):
        return roll(t, -(group // 2)).reshape(-1, group, heads, width).transpose(1, 2)

    out = F.scaled_dot_product_attention(in_groups(q), in_groups(k), in_groups(v), is_causal=True)
    return roll(out.transpose(1, 2).reshape(rows, length, heads, width), group // 2)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=4)
def _causal_blocks(length: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b, h, i, j):
        return i >= j

    return create_block_mask(causal, None, None, length, length, device=str(device))


def flex(case: dict, q, k, v) -> torch.Tensor:
    """torch's FlexAttention, compiled; the block mask is made once and not timed again."""
    blocks = None
    if case.get("is_causal"):
        blocks = _causal_blocks(q.shape[2], q.device)
    return _compiled_flex()(q, k, v, block_mask=blocks, enable_gqa="S" in case)


def is_dense(case: dict) -> bool:
    return not case.get("G")


def is_shifted(case: dict) -> bool:
    return bool(case.get("G"))


VARIANTS = {
    "tilewright": Variant(ours),
    "torch sdpa": Variant(sdpa, prepare=heads_first, restore=exchange, applies=is_dense),
    "torch flex compiled": Variant(
        flex, prepare=heads_first, restore=exchange, applies=is_dense, compiles=True
    ),
    "tilewright dense causal": Variant(ours, applies=is_shifted, computes=dict(G=None)),
    "sdpa in rolled groups": Variant(
        sdpa_in_rolled_groups, applies=is_shifted, computes=dict(wraparound=True)
    ),
}
