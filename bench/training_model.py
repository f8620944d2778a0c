"""A small Llama with random weights and what of it trains, for bench_training.py.

Each way to run a step has the same weights, the same trained places and the same options.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tilewright
from tilewright import pretrained
from tilewright.adapt.sparse import attach_deltas
from tilewright.bench import decoder_model
from tilewright.bench.decoder_model import Shape
from tilewright.ops import WeightDelta

RANK, ALPHA = 16, 32
ADAMW: dict[str, Any] = dict(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)
EAGER, STOCK, COMPILED, OURS = "eager", "stock", "compiled", "tilewright"
ADAPTER = "default"  # PEFT's name for it


def config_of(shape: Shape, n_tokens: int):
    config = decoder_model.config_of(shape)
    config.max_position_embeddings = n_tokens
    config.tie_word_embeddings = True
    return config


@functools.lru_cache(maxsize=2)
def weights(shape: Shape) -> dict[str, torch.Tensor]:
    """bfloat16, by their names in the model."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in hosted_without_values(shape).named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        is_norm = weight.dim() == 1
        found[name] = (1 + 0.1 * drawn if is_norm else 0.02 * drawn).bfloat16()
    return found


def hosted_without_values(shape: Shape, n_tokens: int = 1, attention: str = "sdpa") -> nn.Module:
    from transformers import AutoModelForCausalLM

    with pretrained.quiet_transformers(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config_of(shape, n_tokens), attn_implementation=attention
        )


def hosted(
    shape: Shape, n_tokens: int, attention: str, dtype: torch.dtype, device: str
) -> nn.Module:
    """transformers' model in training mode."""
    model: Any = hosted_without_values(shape, n_tokens, attention).to(dtype).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights(shape)[name])
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)  # its angles are a buffer
    return model.train()


def half_plan(model: nn.Module) -> tilewright.HalfPlan:
    return tilewright.HalfPlan(model, seed=0)


@functools.lru_cache(maxsize=2)
def places(shape: Shape, share: float) -> dict[str, torch.Tensor]:
    """Flat places, ascending, in each linear layer's weight, by the layer's name in the model."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(shape.layers):
        for name, (n_out, n_in) in shape.layer_matrices.items():
            drawn = torch.randperm(n_out * n_in, generator=generator)[: int(share * n_out * n_in)]
            found[f"model.layers.{layer}.{name}"] = drawn.sort().values
    return found


@torch.no_grad()
def _lora(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    peft = pretrained.import_peft()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                             task_type="CAUSAL_LM")  # fmt: skip
    with pretrained.quiet_transformers():
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    for p in trained.values():  # B too: at 0 it would give A no gradient
        p.copy_((0.02 * torch.randn(p.shape, generator=generator)).bfloat16())
    return adapted, trained


def _values(n: int) -> torch.Tensor:
    return 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(1))


def _deltas(model: nn.Module, found: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Ours; the trained values by the layers' names."""
    layers = dict(model.named_modules())
    given = {}
    for name, at in found.items():
        size = layers[name].weight.shape
        given[f"{name}.weight"] = WeightDelta.from_flat(at, _values(len(at)), *size)
    tuner = attach_deltas(model, given)
    return {name: tuner.layers[name].delta_values for name in found}


@torch.no_grad()
def _super_tuning(model: nn.Module, found: dict[str, torch.Tensor], share: float):
    """PEFT's, which keeps the same values and adds them to a copy of the weight."""
    peft = pretrained.import_peft()
    config = peft.SupertuningConfig(sparsity=1 - share, target_modules="all-linear",
                                    task_type="CAUSAL_LM")  # fmt: skip
    with pretrained.quiet_transformers():
        adapted = peft.get_peft_model(model, config)
    layers = dict(adapted.base_model.model.named_modules())
    trained = {}
    for name, at in found.items():
        values = layers[name].supertuning_values[ADAPTER]
        values.data = _values(len(at)).to(values)
        layers[name].supertuning_indices[ADAPTER] = at.int().to(values.device)
        trained[name] = values
    return adapted, trained


@dataclass
class Training:
    """A model in training; a call is a step on `tokens`, all of them labels too.

    trained    what trains, by names that all ways to run the method share
    forward    (input_ids, labels) -> the model's output
    """

    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    forward: nn.Module
    tokens: torch.Tensor

    def gradients(self) -> torch.Tensor:
        """The loss; everything that trains has its gradient."""
        loss = self.forward(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def gradient(self, name: str) -> torch.Tensor:
        found = self.trained[name].grad
        if found is None:
            raise RuntimeError(f"training: {name} got no gradient")
        return found

    def __call__(self) -> torch.Tensor:
        """The loss before the step."""
        with torch.enable_grad():
            loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def training(case: dict, how: str, dtype: torch.dtype, tokens: torch.Tensor) -> Training:
    """A case's model, from the first step on: stock, stock and compiled, eager or ours."""
    shape, method, device = case["shape"], case["method"], str(tokens.device)
    attention = EAGER if how == EAGER else "sdpa"
    model = hosted(shape, tokens.shape[-1], attention, dtype, device)
    if method == "half":
        half_plan(model).begin(0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if method == "lora":
        model, trained = _lora(model)
    elif method == "sparse":
        found = places(shape, case["share"])
        if how == OURS:
            trained = _deltas(model, found)
        else:
            model, trained = _super_tuning(model, found, case["share"])
    if how == OURS:
        tilewright.accelerate(model)
        optimizer: torch.optim.Optimizer = tilewright.AdamW(trained.values(), **ADAMW)
    else:
        optimizer = torch.optim.AdamW(trained.values(), fused=True, **ADAMW)
    forward = torch.compile(model) if how == COMPILED else model
    return Training(trained, optimizer, forward, tokens)  # type: ignore[arg-type]
