"""Norms, rotary positions, gated activations, embeddings: bound by memory where they are large.

Axes: T tokens, N width, H heads, D head width, V rows of an embedding. A row of a gated layer has
N features in each of gate and up.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import tilewright
from tilewright.bench.variant import Variant

GRADIENTS = ("x",)
BOTH = dict(dtypes=("bf16", "float32"), modes=("fwd", "fwd+bwd"))
BF16 = dict(dtypes=("bf16",), modes=("fwd", "fwd+bwd"))
ONE = dict(dtypes=("bf16", "float32"), modes=("fwd",))
WEIGHTED = dict(gradients=("x", "weight"))

CASES: dict[str, dict] = {
    "rms-2k-4096": dict(op="rms", T=2048, N=4096, **BOTH),
    "rms-2k-4096-trained": dict(op="rms", T=2048, N=4096, **WEIGHTED, **BF16),
    "rms-2k-2048-gemma": dict(op="gemma", T=2048, N=2048, **BF16),
    "rms-residual-2k-4096": dict(op="residual", T=2048, N=4096, **BF16),
    "rms-heads-64k-128": dict(op="rms", T=65536, N=128, **BF16),
    "rms-1-4096": dict(op="rms", T=1, N=4096, **ONE),
    "layer-4k-768": dict(op="layer", T=4096, N=768, **WEIGHTED, **BOTH),
    "layer-2k-4096": dict(op="layer", T=2048, N=4096, **BF16),
    "layer-64-384": dict(op="layer", T=64, N=384, **ONE),
    "rope-2k-32x128": dict(op="rope", T=2048, H=32, D=128, **BOTH),
    "rope-1-32x128": dict(op="rope", T=1, H=32, D=128, **ONE),
    "swiglu-2k-11008": dict(op="swiglu", T=2048, N=11008, **BOTH),
    "swiglu-1-11008": dict(op="swiglu", T=1, N=11008, **ONE),
    "geglu-2k-8192": dict(op="geglu", T=2048, N=8192, **BF16),
    "geglu-tanh-2k-8192": dict(op="geglu_tanh", T=2048, N=8192, **BF16),
    "embedding-2k-32k": dict(op="embedding", T=2048, N=2048, V=32000, gradients=("weight",),
                             **BF16),
}  # fmt: skip
NORMS = ("rms", "gemma", "residual", "layer")


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    op, n_tokens = case["op"], case["T"]
    if op == "rope":
        angle = torch.arange(n_tokens)[:, None] * 10000.0 ** -(torch.arange(0, 1, 2 / case["D"]))
        tables = {"cos": angle.cos().to(device, dtype), "sin": angle.sin().to(device, dtype)}
        return {"x": normal(1, n_tokens, case["H"], case["D"]), **tables}
    if op == "embedding":
        ids = (torch.rand(n_tokens, generator=generator, device=device) ** 2 * case["V"]).long()
        return {"ids": ids, "weight": normal(case["V"], case["N"])}
    inputs = {"x": normal(n_tokens, case["N"])}
    if op in NORMS:
        inputs["weight"] = 0.3 * normal(case["N"])
        if op == "layer":
            inputs["bias"] = normal(case["N"])
    if op not in NORMS or op == "residual":
        inputs["other"] = normal(n_tokens, case["N"])
    return inputs


def small(case: dict) -> dict:
    sizes = {"T": 24, "N": 200, "H": 3, "D": 32, "V": 90}
    return {name: min(value, sizes.get(name, value)) if name in sizes else value
            for name, value in case.items()}  # fmt: skip


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: about ten an element. Bytes: what is read and written once, by each pass."""
    op = case["op"]
    n = float(case["T"] * (case["H"] * case["D"] if op == "rope" else case["N"]))
    if op == "embedding":  # the backward writes every row of the weight's gradient
        backward = n + case["V"] * case["N"]
        return 2 * n, itemsize * (2 * n + (backward if mode == "fwd+bwd" else 0))
    forward = {"swiglu": 3, "geglu": 3, "geglu_tanh": 3, "residual": 4}.get(op, 2)
    backward = {"rope": 2, "swiglu": 4, "geglu": 4, "geglu_tanh": 4}.get(op, 3)
    passes = forward + (backward if mode == "fwd+bwd" else 0)
    return 10 * n, itemsize * n * passes


def ours(case: dict, *, impl: str = "auto", **t) -> torch.Tensor:
    """The operator by tilewright; of a residual norm the normalised rows."""
    op = case["op"]
    if op == "rope":
        return tilewright.rope(t["x"], t["cos"], t["sin"], impl=impl)
    if op == "embedding":
        return tilewright.embedding(t["ids"], t["weight"], impl=impl)
    if op == "layer":
        return tilewright.layer_norm(t["x"], t["weight"], t["bias"], impl=impl)
    if op == "residual":
        return tilewright.rms_norm(t["x"], t["weight"], residual=t["other"], impl=impl)[0]
    if op == "gemma":
        return tilewright.rms_norm(
            t["x"], t["weight"], casting="gemma", weight_offset=1.0, impl=impl
        )
    if op == "rms":
        return tilewright.rms_norm(t["x"], t["weight"], impl=impl)
    if op == "swiglu":
        return tilewright.swiglu(t["x"], t["other"], impl=impl)
    how = "tanh" if op == "geglu_tanh" else "none"
    return tilewright.geglu(t["x"], t["other"], approximate=how, impl=impl)


def truth(case: dict, **t) -> torch.Tensor:
    return ours(case, impl="reference", **t)


def _gate(case: dict, x, other) -> torch.Tensor:
    if case["op"] == "swiglu":
        return F.silu(x) * other
    return F.gelu(x, approximate="tanh" if case["op"] == "geglu_tanh" else "none") * other


def aten(case: dict, **t) -> torch.Tensor:
    """torch's own fused operator where it has one."""
    op = case["op"]
    if op == "embedding":
        return F.embedding(t["ids"], t["weight"])
    if op == "layer":
        return F.layer_norm(t["x"], t["x"].shape[-1:], t["weight"], t["bias"])
    if op in NORMS:
        x = t["x"] + t["other"] if op == "residual" else t["x"]
        weight = t["weight"] + 1 if op == "gemma" else t["weight"]
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return _gate(case, t["x"], t["other"])


@functools.lru_cache(maxsize=8)
def _module(op: str, width: int):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = (GemmaRMSNorm if op == "gemma" else LlamaRMSNorm)(width, eps=1e-6)
    del module.weight
    return module


def transformers_module(case: dict, **t) -> torch.Tensor:
    """What a transformers model runs."""
    op = case["op"]
    if op == "rope":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        tables = (torch.cat((t[name], t[name]), dim=-1)[None] for name in ("cos", "sin"))
        return apply_rotary_pos_emb(t["x"], t["x"][:, :, :0], *tables, unsqueeze_dim=2)[0]
    if op in ("rms", "gemma", "residual"):
        x = t["x"] + t["other"] if op == "residual" else t["x"]
        module = _module(op, x.shape[-1])
        module.weight = t["weight"]
        try:
            return module(x)
        finally:
            del module.weight
    return aten(case, **t)


stock = transformers_module


def _plain(op: str, t: dict) -> torch.Tensor:
    """The formula as transformers writes it, for the compiler."""
    if op == "rope":
        x, cos, sin = t["x"], *(torch.cat((t[n], t[n]), dim=-1)[None, :, None]
                                for n in ("cos", "sin"))  # fmt: skip
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin
    if op in ("rms", "gemma", "residual"):
        x = t["x"] + t["other"] if op == "residual" else t["x"]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if op == "gemma":
            return (wide * (1.0 + t["weight"].float())).to(x.dtype)
        return t["weight"] * wide.to(x.dtype)
    return aten({"op": op}, **t)


@functools.lru_cache(maxsize=32)
def _compiled(op: str):
    return torch.compile(lambda **t: _plain(op, t), fullgraph=True, dynamic=False)


def compiled(case: dict, **t) -> torch.Tensor:
    return _compiled(case["op"])(**t)


def _aten_differs(case: dict) -> bool:
    return case["op"] != "rope"


def _module_differs(case: dict) -> bool:
    return case["op"] in ("rope", "rms", "gemma", "residual")


VARIANTS = {
    "tilewright": Variant(ours),
    "torch": Variant(aten, applies=_aten_differs),
    "transformers": Variant(transformers_module, applies=_module_differs),
    "torch.compile": Variant(compiled, compiles=True),
}
