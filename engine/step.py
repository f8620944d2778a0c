"""One token more for each row of a batch: the kernels of a whole decoder as one recorded call.

A forward of a few tokens asks for some two hundred short kernels, and Python between them takes as
long as they do. Where a model is one of those below, accelerated and on a CPU, their calls are
recorded over buffers that stay, and a step makes them all. What differs from step to step lies in
memory: the embedded token, the angles of its position, the length of the cache.

All else goes through the model's own forward: prompts, other models, modules with hooks, and the
step after the cache had to grow.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from tilewright import recording
from tilewright.adapt import gates, loss, norms, projections, rotary, together
from tilewright.adapt.forms import DTYPES, Renewed, is_hooked
from tilewright.adapt.interface import SETTINGS
from tilewright.cache import GrowingLayer
from tilewright.native import why_not_native
from tilewright.ops import (
    LinearLayer,
    append_to_cache,
    flash_decode,
    linear_group,
    rms_norm,
    rope,
)
from tilewright.pretrained import base_of
from tilewright.recording import CannotRecord, Recording

# each layer: h += o(attention(rope(q(norm h)), ..)), then h += down(activation(gate) up)
_KNOWN = {
    causal: (decoder, layer, attention, mlp)
    for causal, decoder, layer, attention, mlp in (
        (
            getattr(module, f"{name}ForCausalLM"), getattr(module, f"{name}Model"),
            getattr(module, f"{name}DecoderLayer"), getattr(module, f"{name}Attention"),
            getattr(module, f"{name}MLP"),
        )
        for module, name in (
            (modeling_llama, "Llama"), (modeling_mistral, "Mistral"), (modeling_qwen2, "Qwen2"),
            (modeling_qwen3, "Qwen3"),
        )
    )
}  # fmt: skip


class Stepper:
    """A model's logits, by one recorded call a token where that can be.

    model   of transformers or PEFT, in evaluation mode
    cache   of `new_cache`; `settle` before it is touched
    """

    def __init__(self, model: nn.Module, cache) -> None:
        self._model, self._cache = model, cache
        self._causal: Any = base_of(model)
        self._recorded: _Recorded | None = None
        self._ahead = 0  # tokens that lie in the cache's buffers and are not counted in
        self.why_not = _why_not(model, self._causal)
        parameters = inspect.signature(self._causal.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @torch.no_grad()
    def __call__(self, input_ids, mask, position_ids) -> torch.Tensor:
        """Logits of the last position, (B, V), to be read before the next call.

        input_ids, position_ids   (B, n)
        mask                      (B, tokens in the cache and these) of 1 and 0, zeros to the left;
                                  None: ones
        """
        if input_ids.shape[1] == 1 and self._is_ready(mask, len(input_ids)):
            assert self._recorded is not None
            self._ahead += 1
            return self._recorded(input_ids, position_ids)
        self.settle()
        return self._model(
            input_ids=input_ids,
            attention_mask=None if mask is None or bool(mask.all()) else mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        ).logits[:, -1]

    def settle(self) -> None:
        """Let the cache know of all tokens; the next step records anew."""
        if self._recorded is not None:
            for layer in self._cache.layers:
                layer.take_in(self._ahead)
        self._recorded, self._ahead = None, 0

    def _is_ready(self, mask, batch: int) -> bool:
        """Whether a recording has room for one more token; records if need be."""
        if self.why_not is not None:
            return False
        held = self._recorded
        if held is not None:
            return held.fits(batch) and self._ahead < held.room
        layers = self._cache.layers
        if len(layers) != len(self._causal.model.layers) or not all(
            type(layer) is GrowingLayer and layer.room() for layer in layers
        ):
            return False
        try:
            self._recorded = _Recorded(self._causal, layers, mask, batch)
        except CannotRecord as why:
            self.why_not = str(why)
            return False
        return True


def _why_not(model: nn.Module, causal: Any) -> str | None:
    """Why every token goes through the model's forward, or None."""
    classes = _KNOWN.get(_stock_class(causal))
    if classes is None:
        return f"{type(causal).__name__} is none of the models that are recorded"
    decoder, layer, attention, mlp = classes
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        return "its adapter puts tokens before the prompt"
    if _stock_class(causal.model) is not decoder:
        return f"its decoder is {type(causal.model).__name__}"
    why_not_rope = rotary.why_not_class(attention)
    if why_not_rope is not None:
        return f"rotary positions: {why_not_rope}"
    if together.sees_every_module():
        return "there are hooks on every module"
    for module in causal.modules():
        if is_hooked(module):
            return f"a {type(module).__name__} has hooks"
    for one in causal.model.layers:
        if _stock_class(one) is not layer or _stock_class(one.mlp) is not mlp:
            return f"a layer is a {type(one).__name__} with {type(one.mlp).__name__}"
        settings = getattr(one.self_attn, SETTINGS, None)
        if _stock_class(one.self_attn) is not attention or settings is None:
            return "its attention is not accelerated"
        if settings.stays_stock is not None:
            return f"its attention stays stock: {settings.stays_stock}"
        window = getattr(causal.config, "sliding_window", None)
        if getattr(one.self_attn, "sliding_window", window) is not None:
            return "its attention has a window"
    first = next(causal.parameters())
    if first.device.type != "cpu":
        return f"it is on {first.device.type}"
    return why_not_native()


_OF_FACTORIES = (rotary.fused_class, loss.fused_model)  # what their classes compute is known
_OF_MIXINS = (gates.SplitForm, loss.HeadForm, projections.AheadForm)


def _stock_class(module: nn.Module) -> type | None:
    """The class before the module was accelerated; None if its forward is yet another."""
    for cls in type(module).__mro__:
        if issubclass(cls, nn.Module) and not issubclass(cls, Renewed):
            return cls
        if "forward" not in vars(cls) or cls in _OF_MIXINS:
            continue
        if getattr(cls, "_tilewright_recipe", (None,))[0] not in _OF_FACTORIES:
            return None
    return None


class _Recorded:
    """The kernels' calls over a cache's buffers, for one more token a row, and another.

    causal   one of `_KNOWN`
    layers   of the cache, each with room
    mask     (B, tokens that will be in the cache after a step) of 1 and 0, or None
    """

    def __init__(self, causal, layers: list[GrowingLayer], mask, batch: int) -> None:
        self.room = min(layer.room() for layer in layers)
        self.batch, self._threads = batch, torch.get_num_threads()
        self._causal, config = causal, causal.config
        embedded = self._embedded(torch.zeros(batch, 1, dtype=torch.long))
        if embedded.dtype not in DTYPES or torch.is_autocast_enabled("cpu"):
            raise CannotRecord(f"it computes in {embedded.dtype}, or under autocast")
        self._x = embedded.clone()
        angles = causal.model.rotary_emb(self._x, torch.zeros(batch, 1, dtype=torch.long))
        self._half = angles[0].shape[-1] // 2
        self._angles = [a[..., : self._half].contiguous() for a in angles]
        self._lengths = torch.full((batch,), layers[0].get_seq_length(), dtype=torch.int32)
        if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise CannotRecord("a row has padding that is not to its left")
        starts = torch.zeros(batch) if mask is None else mask.shape[1] - mask.sum(1)
        self._starts = starts.to(torch.int32)
        self._calls = Recording()
        self._lengths += 1  # as in a step, where the new token is counted in
        with self._calls.on():
            self._logits = self._record(config, layers)
        self._lengths -= 1

    def fits(self, batch: int) -> bool:
        return batch == self.batch and torch.get_num_threads() == self._threads

    def __call__(self, input_ids, position_ids) -> torch.Tensor:
        self._x.copy_(self._embedded(input_ids))
        angles = self._causal.model.rotary_emb(self._x, position_ids)
        for held, new in zip(self._angles, angles, strict=True):
            held.copy_(new[..., : self._half])
        self._lengths += 1
        self._calls()
        return self._logits[:, 0]

    def _embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._causal.model.embed_tokens(input_ids)

    def _record(self, config, layers: list[GrowingLayer]) -> torch.Tensor:
        residual, x = self._x, self._normed(self._causal.model.layers[0].input_layernorm, self._x)
        after = [layer.input_layernorm for layer in self._causal.model.layers[1:]]
        after.append(self._causal.model.norm)
        for layer, cached, norm in zip(self._causal.model.layers, layers, after, strict=True):
            y = self._attention(layer.self_attn, x, cached)
            x, residual = self._normed(layer.post_attention_layernorm, y, residual)
            gate, up = self._linear(x, layer.mlp.gate_proj, layer.mlp.up_proj)
            operator = gates.operator_of(layer.mlp.act_fn)
            if operator is None:
                raise CannotRecord(f"its activation is {type(layer.mlp.act_fn).__name__}")
            (y,) = self._linear(self._one(operator, gate, up), layer.mlp.down_proj)
            x, residual = self._normed(norm, y, residual)
        (logits,) = self._linear(x, self._causal.lm_head)
        return logits

    def _attention(self, attention, x: torch.Tensor, cached: GrowingLayer) -> torch.Tensor:
        q, k, v = (
            t.view(self.batch, 1, -1, attention.head_dim)
            for t in self._linear(x, attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = self._normed(attention.q_norm, q), self._normed(attention.k_norm, k)
        q, k = (self._one(rope, t, *self._angles, heads_first=False) for t in (q, k))
        keys, values = (cached.buffers[name].transpose(1, 2) for name in ("keys", "values"))
        self._one(append_to_cache, k, v, keys, values, key_lengths=self._lengths)
        out, _ = self._one(
            flash_decode, q, keys, values, key_lengths=self._lengths, key_starts=self._starts,
            scale=attention.scaling, return_lse=True,
        )  # fmt: skip
        (y,) = self._linear(out.view(self.batch, 1, -1), attention.o_proj)
        return y

    def _normed(self, norm, x: torch.Tensor, residual: torch.Tensor | None = None):
        if not isinstance(norm, norms.RmsForm):
            raise CannotRecord(f"its {type(norm).__name__} is not accelerated")
        weight = norm.weight
        if weight.dtype != x.dtype:
            raise CannotRecord(f"a norm's weight is {weight.dtype} where x is {x.dtype}")
        if residual is None:
            return self._one(rms_norm, x, weight, **norm.options())
        return self._one(rms_norm, x, weight, residual=residual, **norm.options())

    def _linear(self, x: torch.Tensor, *modules: nn.Module) -> tuple[torch.Tensor, ...]:
        layers = [self._layer(module, x) for module in modules]
        return self._calling((1, len(layers)), linear_group, x, layers)

    def _layer(self, module: Any, x: torch.Tensor) -> LinearLayer:
        is_plain = type(module) is nn.Linear or module is self._causal.lm_head
        if is_plain and _stock_class(module) is nn.Linear and module.weight.dtype == x.dtype:
            return LinearLayer(module.weight, module.bias)
        layer = together.layer_of(module, x)
        if layer is None:
            raise CannotRecord(f"a {type(module).__name__} is more than a linear layer of ours")
        return layer

    def _one(self, operator, *args, **kwargs):
        return self._calling((1,), operator, *args, **kwargs)

    def _calling(self, n_calls: tuple[int, ...], operator, *args, **kwargs):
        """What the operator returns, if it recorded so many calls."""
        before = len(self._calls)
        results = operator(*args, **kwargs)
        n = len(self._calls) - before
        if n not in n_calls:
            raise CannotRecord(f"{operator.__name__} made {n} calls of kernels, expected {n_calls}")
        recording.keep((args, kwargs, results))
        return results
