"""Adapters of PEFT around one frozen layer, for the benchmarks: each reads the tensors it is given.

A layer is made once, before the clock runs; what trains is put in the place of its own parameters,
as leaves that every contender has alike.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import nn

NAME = "default"


def why_not(tuner: str) -> str | None:
    """What is missing for one of PEFT's methods, or None."""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed: pip install peft"
    if importlib.util.find_spec(f"peft.tuners.{tuner}") is None:
        return f"this peft has no {tuner}: pip install 'peft>=0.21'"
    return None


def _frozen(weight: torch.Tensor) -> nn.Linear:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def supertuning_layer(weight: torch.Tensor, places: torch.Tensor) -> nn.Module:
    """Values at flat places (N,) are added to a copy of the weight in each forward."""
    from peft import SupertuningConfig
    from peft.tuners.supertuning.layer import Linear

    layer = Linear(_frozen(weight), NAME, SupertuningConfig(sparsity=1 - 1 / weight.numel()))
    layer.supertuning_indices[NAME] = places.int()
    return layer


def by_supertuning(case: dict, layer, x, values) -> torch.Tensor:
    layer.supertuning_values._parameters[NAME] = values
    return layer(x)


def shira_layer(weight: torch.Tensor, places: torch.Tensor) -> nn.Module:
    """A sparse tensor of the values is added to a copy of the weight in each forward."""
    from peft import ShiraConfig
    from peft.tuners.shira.layer import Linear

    layer = Linear(_frozen(weight), None, NAME, ShiraConfig(r=1), r=1)
    n_in = weight.shape[1]
    layer.shira_indices[NAME] = torch.stack([places // n_in, places % n_in]).int()
    return layer


def by_shira(case: dict, layer, x, values) -> torch.Tensor:
    layer.shira_weight._parameters[NAME] = values
    return layer(x)


def lora_layer(weight: torch.Tensor, n_values: int) -> nn.Module:
    """With as many parameters as there are values, or a few less."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    rank = max(n_values // sum(weight.shape), 1)
    config = LoraConfig(r=rank, lora_alpha=rank)
    return Linear(_frozen(weight), NAME, config=config, r=rank, lora_alpha=rank)


def by_lora(case: dict, layer, x, values) -> torch.Tensor:
    """Its two matrices are the first of the values."""
    rank, n_in, n_out = layer.r[NAME], layer.in_features, layer.out_features
    split = rank * n_in
    layer.lora_A[NAME]._parameters["weight"] = values[:split].view(rank, n_in)
    both = split + rank * n_out
    layer.lora_B[NAME]._parameters["weight"] = values[split:both].view(n_out, rank)
    return layer(x)
