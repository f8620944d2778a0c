"""Cases of the norm room: inputs, our call, and what transformers and torch compute for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tilewright import ops


@dataclass(frozen=True)
class Case:
    """make(dtype) gives named tensors; ours(impl=.., **tensors) and stock(**tensors) one or more
    results; leaves names the tensors that get a gradient."""

    operator: str
    make: Callable[[torch.dtype], dict]
    ours: Callable
    stock: Callable
    leaves: tuple[str, ...]
    options: dict = field(default_factory=dict)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def module_forward(cls, x, weight, eps):
    """transformers' own module over the given weight; float64 would be cut to float32 there."""
    module = cls(x.shape[-1], eps=eps)
    if weight is None:
        module.weight = None
        weight = torch.full(x.shape[-1:], float(cls is not GemmaRMSNorm)).to(x)
    del module.weight
    module.weight = weight
    return module(x)


def rms(*shape, casting="llama", offset=0.0, has_weight=True, residual=False, wide=False):
    # Olmo's rounds as Gemma's does, and has no offset
    cls = LlamaRMSNorm if casting == "llama" else GemmaRMSNorm if offset else Olmo2RMSNorm

    def make(dtype):
        tensors = {"x": normal(*shape, dtype=dtype)}
        if has_weight:
            # float32, as PEFT makes norms for training in few bits
            kept = torch.float32 if wide else dtype
            tensors["weight"] = (1 - offset + 0.3 * normal(shape[-1], seed=1)).to(kept)
        if residual:
            tensors["residual"] = normal(*shape, dtype=dtype, seed=2)
        return tensors

    def ours(x, weight=None, residual=None, impl="auto"):
        return ops.rms_norm(
            x, weight, residual=residual, eps=1e-5, casting=casting, weight_offset=offset, impl=impl
        )

    def stock(x, weight=None, residual=None):
        if residual is None:
            return module_forward(cls, x, weight, 1e-5)
        return module_forward(cls, x + residual, weight, 1e-5), x + residual

    leaves = ("x", *["weight"] * has_weight, *["residual"] * residual)
    return Case("rms_norm", make, ours, stock, leaves)


def layer(*shape, parameters=True, residual=False, shift=0.0):
    def make(dtype):
        tensors = {"x": (normal(*shape) + shift).to(dtype)}
        if parameters:
            tensors["weight"] = (1 + 0.3 * normal(shape[-1], seed=1)).to(dtype)
            tensors["bias"] = normal(shape[-1], dtype=dtype, seed=3)
        if residual:
            tensors["residual"] = normal(*shape, dtype=dtype, seed=2)
        return tensors

    def ours(x, weight=None, bias=None, residual=None, impl="auto"):
        return ops.layer_norm(x, weight, bias, residual=residual, impl=impl)

    def stock(x, weight=None, bias=None, residual=None):
        if residual is None:
            return F.layer_norm(x, x.shape[-1:], weight, bias)
        return F.layer_norm(x + residual, x.shape[-1:], weight, bias), x + residual

    leaves = ("x", *["weight", "bias"] * parameters, *["residual"] * residual)
    return Case("layer_norm", make, ours, stock, leaves)


def angles(length, n_angles, batch=None):
    """(L, C) or (B, L, C) angles in float32."""
    frequencies = 10000.0 ** -(torch.arange(n_angles) / n_angles)
    places = torch.arange(length).float()
    if batch is not None:
        places = places + 7 * torch.arange(batch)[:, None]
    return places[..., None] * frequencies


def rotary(
    batch, length, heads, width, n_angles=None, interleaved=False, heads_first=False,
    by_batch=False, positions=False, wide=False, view=False,
):  # fmt: skip
    n = width // 2 if n_angles is None else n_angles

    def make(dtype):
        shape = (batch, heads, length, width) if heads_first else (batch, length, heads, width)
        tensors = {"x": normal(*shape, dtype=dtype)}
        if view:  # one of three in a joint projection
            joint = torch.stack([normal(*shape, dtype=dtype, seed=s) for s in range(3)], dim=2)
            tensors["x"] = joint[:, :, 1]
        angle = angles(2 * length if positions else length, n, batch if by_batch else None)
        kept = torch.float32 if wide else dtype
        tensors |= {"cos": angle.cos().to(kept), "sin": angle.sin().to(kept)}
        if positions:
            generator = torch.Generator().manual_seed(4)
            tensors["positions"] = torch.randint(2 * length, (batch, length), generator=generator)
        return tensors

    def ours(x, cos, sin, positions=None, impl="auto"):
        return ops.rope(
            x, cos, sin, positions=positions, interleaved=interleaved, heads_first=heads_first,
            impl=impl,
        )  # fmt: skip

    def stock(x, cos, sin, positions=None):
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        elif cos.dim() == 2:
            cos, sin = cos[None], sin[None]
        turned, rest = x[..., : 2 * n], x[..., 2 * n :]
        if interleaved:
            turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        axis = 1 if heads_first else 2
        y, _ = apply_rotary_pos_emb(turned, turned, cos, sin, unsqueeze_dim=axis)
        if interleaved:
            y = torch.stack(y.chunk(2, dim=-1), dim=-1).flatten(-2)
        return torch.cat((y.to(x.dtype), rest), dim=-1)

    return Case("rope", make, ours, stock, ("x",))


def gated(*shape, activation="silu", joint=False, size=3.0):
    def make(dtype):
        gate, up = (size * normal(*shape)).to(dtype), normal(*shape, dtype=dtype, seed=1)
        return {"gate": torch.cat((gate, up), dim=-1)} if joint else {"gate": gate, "up": up}

    def ours(gate, up=None, impl="auto"):
        if activation == "silu":
            return ops.swiglu(gate, up, impl=impl)
        how = "tanh" if activation == "gelu_tanh" else "none"
        return ops.geglu(gate, up, approximate=how, impl=impl)

    def stock(gate, up=None):
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    operator = "swiglu" if activation == "silu" else "geglu"
    return Case(operator, make, ours, stock, ("gate",) if joint else ("gate", "up"))


def looked_up(n_rows, width, *shape, kind=torch.int64, **options):
    def make(dtype):
        generator = torch.Generator().manual_seed(n_rows)
        # the square of a uniform number: some rows often, some never
        ids = (torch.rand(shape, generator=generator) ** 2 * n_rows).to(kind)
        return {"ids": ids, "weight": normal(n_rows, width, dtype=dtype)}

    def ours(ids, weight, impl="auto"):
        return ops.embedding(ids, weight, **options, impl=impl)

    def stock(ids, weight):
        return F.embedding(ids, weight, **options)

    return Case("embedding", make, ours, stock, ("weight",), options)


CASES = {
    "rms": rms(5, 7, 64),
    "rms, one of everything": rms(1, 1),
    "rms, no rows": rms(0, 16),
    "rms, 769": rms(9, 769),
    "rms, 1023": rms(3, 1023),
    "rms, 1128, gemma": rms(4, 1128, casting="gemma", offset=1.0),
    "rms, no weight": rms(6, 96, has_weight=False),
    "rms, gemma, no offset": rms(6, 40, casting="gemma"),
    "rms, float32 weight": rms(6, 72, wide=True),
    "rms, gemma, float32 weight": rms(6, 72, wide=True, casting="gemma", offset=1.0),
    "rms, residual": rms(3, 5, 130, residual=True),
    "rms, residual, gemma": rms(70, 33, residual=True, casting="gemma", offset=1.0),
    "layer": layer(5, 7, 64),
    "layer, one row": layer(1, 769),
    "layer, no rows": layer(0, 16),
    "layer, 1023": layer(4, 1023),
    "layer, no parameters": layer(6, 100, parameters=False),
    "layer, residual": layer(70, 33, residual=True),
    "layer, far from zero": layer(5, 300, shift=30.0),
    "rope": rotary(2, 5, 3, 16),
    "rope, one angle": rotary(1, 1, 1, 2),
    "rope, no tokens": rotary(2, 0, 3, 16),
    "rope, partial": rotary(2, 5, 3, 24, n_angles=9),
    "rope, interleaved": rotary(2, 6, 2, 44, interleaved=True),
    "rope, interleaved, partial": rotary(1, 3, 2, 10, n_angles=3, interleaved=True),
    "rope, heads first": rotary(2, 5, 3, 64, heads_first=True),
    "rope, tables of each row": rotary(3, 5, 2, 40, by_batch=True),
    "rope, positions": rotary(2, 9, 2, 32, positions=True),
    "rope, float32 tables": rotary(2, 5, 3, 16, wide=True),
    "rope, view of qkv": rotary(2, 5, 3, 16, view=True),
    "swiglu": gated(5, 7, 48),
    "swiglu, one": gated(1, 1),
    "swiglu, no rows": gated(0, 8),
    "swiglu, joint": gated(6, 75, joint=True),
    "geglu": gated(9, 131, activation="gelu"),
    "geglu, joint": gated(4, 20, activation="gelu", joint=True),
    "geglu, tanh": gated(9, 131, activation="gelu_tanh"),
    "embedding": looked_up(50, 33, 4, 70),
    "embedding, wide": looked_up(7, 1100, 90),
    "embedding, no ids": looked_up(5, 8, 0),
    "embedding, int32, padding": looked_up(20, 16, 3, 50, kind=torch.int32, padding_idx=-18),
    "embedding, by frequency": looked_up(20, 16, 150, scale_grad_by_freq=True),
}


def both_ways(function, tensors, leaves, **kwargs):
    """The results and the gradients of `leaves`, by name; the upstream is drawn from the shapes."""
    tensors = {
        name: t.detach().requires_grad_(name in leaves) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    outputs = function(**tensors, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(*y.shape, seed=9 + i).to(y) for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, [tensors[name] for name in leaves], upstream)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def exact(tensors):
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
