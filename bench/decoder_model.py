"""A Llama of random packed weights, for bench_decoder.py: built layer by layer, never dense first.

Every way to run it has the same weights: those that the packed codes decode to.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn

import tilewright
from tilewright import PackedWeight, QuantizedLinear, pretrained
from tilewright.cache import new_cache
from tilewright.quantized import replace_module
from tilewright.step import Stepper

FORMATS = {"int4": tilewright.Int4(64, solver="minmax"), "nf4": tilewright.NF4(64)}
HEAD, HEAD_FORMAT = "lm_head", tilewright.Int8()
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Shape:
    """What the model measures; `heads` share `kv_heads` keys."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(O, I) of the linear layers of one block, by their names in it."""
        keys = self.kv_heads * self.head_width
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all blocks."""
        return self.layers * sum(n_out * n_in for n_out, n_in in self.layer_matrices.values())


@functools.lru_cache(maxsize=2)
def packed_weights(shape: Shape, format: str) -> dict[str, PackedWeight]:
    """Each linear layer's weight by its name in the model; the head in 8 bits."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n_out: int, n_in: int, kind) -> PackedWeight:
        weight = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
        return tilewright.quantize_weight(weight.bfloat16(), kind)

    found = {
        f"model.layers.{layer}.{name}": drawn(*size, FORMATS[format])
        for layer in range(shape.layers)
        for name, size in shape.layer_matrices.items()
    }
    return {**found, HEAD: drawn(shape.vocab, shape.hidden, HEAD_FORMAT)}


@functools.lru_cache(maxsize=2)
def plain_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """The embedding and the scales of the norms, bfloat16, by their names in the model."""
    generator = torch.Generator().manual_seed(1)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(shape.hidden, generator=generator)).bfloat16()

    found = {
        "model.embed_tokens": torch.randn(shape.vocab, shape.hidden, generator=generator).bfloat16()
    }
    for layer in range(shape.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}"] = norm()
    return {**found, "model.norm": norm()}


def config_of(shape: Shape):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate, max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


@functools.lru_cache(maxsize=6)
def hosted(shape: Shape, format: str, attention: str, dtype: torch.dtype, device: str) -> nn.Module:
    """transformers' model in evaluation mode.

    attention   "tilewright": over packed layers and accelerated; "sdpa" or "eager": stock, dense
    """
    from transformers import AutoModelForCausalLM

    is_ours = attention == "tilewright"
    config = config_of(shape)
    with pretrained.quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa" if is_ours else attention
        )
    packed, plain = packed_weights(shape, format), plain_weights(shape)
    for name, module in list(model.named_modules()):
        if name in plain:
            module.weight = _fixed(plain[name].to(device, dtype))
        elif name in packed and is_ours:
            weight = replace(packed[name].to(device), dtype=dtype)
            replace_module(model, module, QuantizedLinear(weight))
        elif name in packed:
            # by way of float32, which holds the decoded values
            decoded = tilewright.dequantize_weight(packed[name], torch.float32)
            module.weight = _fixed(decoded.to(device, dtype))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)  # its angles were on "meta"
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise RuntimeError(f"decoder: {', '.join(empty)} got no values")
    model.eval()
    if is_ours:
        tilewright.accelerate(model)
    return model


def _fixed(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


class HostedSession:
    """Prefill or decode by a model of transformers; a call can be repeated.

    tokens   (P + T,); P are in the cache before a call
    before   P; with 0 a call reads all T tokens at once, else one after the other
    is_ours  as `tilewright.generate` steps through a model
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor, before: int, is_ours: bool):
        self.model, self.tokens, self.before, self.is_ours = model, tokens[None], before, is_ours
        self._renew()
        if before:
            self._read(0, before)

    def _renew(self) -> None:
        from transformers import DynamicCache

        config = pretrained.config_of(self.model)
        self.cache = new_cache(config) if self.is_ours else DynamicCache(config=config)
        self.step = Stepper(self.model, self.cache) if self.is_ours else None

    @torch.no_grad()
    def _read(self, start: int, end: int) -> torch.Tensor:
        """(V,) logits after the last of these tokens."""
        if self.step is not None:
            positions = torch.arange(start, end, device=self.tokens.device)[None]
            return self.step(self.tokens[:, start:end], None, positions)[0].clone()
        return self.model(
            self.tokens[:, start:end], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]

    def __call__(self) -> torch.Tensor:
        """Logits after the last token (1, V), or after each (T, V) where P > 0."""
        n = self.tokens.shape[1]
        if not self.before:
            self._renew()
            return self._read(0, n)[None]
        rows = [self._read(i, i + 1) for i in range(self.before, n)]
        if self.step is not None:
            self.step.settle()
        self.cache.crop(self.before - n)  # so many less
        return torch.stack(rows)
