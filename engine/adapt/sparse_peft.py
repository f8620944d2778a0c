"""Sparse deltas as an adapter of PEFT's, of the kind it calls Super-Tuning, and back.

PEFT keeps flat places as int32 in any order and adds what stands at one place twice. All layers
have one sparsity there: a layer with fewer values is filled up with zeros at its first place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright import files
from tilewright.adapt.sparse import SparseTuner, attach_deltas
from tilewright.files import InputError
from tilewright.ops import WeightDelta

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KIND = "SUPERTUNING"
PREFIX = "base_model.model."
MOST_PLACES = 2**31


def save_peft_deltas(tuner: SparseTuner, folder: str | os.PathLike) -> None:
    """Write a model's deltas as PEFT's adapter_config.json and adapter_model.safetensors.

    ValueError: a weight has more entries than PEFT's places of 32 bits tell apart.
    WriteError (an OSError): the disk; what was there before stays.
    """
    sizes = {name: m.out_features * m.in_features for name, m in tuner.layers.items()}
    for name, size in sizes.items():
        if size > MOST_PLACES:
            raise ValueError(
                f"save_peft_deltas: {name} has {size} weights, PEFT's places of 32 bits tell "
                f"{MOST_PLACES} apart"
            )
    # half a value more than the fullest layer has, so that no rounding takes one away
    most = max((m.delta.nnz + 0.5) / max(sizes[name], 1) for name, m in tuner.layers.items())
    sparsity = max(0.0, 1.0 - most)
    tensors = {}
    for name, layer in tuner.layers.items():
        n = int(sizes[name] * (1 - sparsity))  # as PEFT counts
        places, values = layer.delta.places().int(), torch.zeros(n)
        indices = places[0].repeat(n)
        indices[: layer.delta.nnz] = places
        values[: layer.delta.nnz] = layer.delta.values.detach().float()
        tensors[f"{PREFIX}{name}.supertuning_indices"] = indices
        tensors[f"{PREFIX}{name}.supertuning_values"] = values
    config: dict[str, Any] = {
        "peft_type": KIND,
        "base_model_name_or_path": getattr(
            getattr(tuner.model, "config", None), "name_or_path", None
        ),
        "inference_mode": True,
        "target_modules": sorted(tuner.layers),
        "sparsity": sparsity,
        "save_precomputed_indices": True,
    }
    with files.replacing_files(Path(folder), CONFIG) as beside:
        files.write_tensors(beside / TENSORS, tensors, {"format": "pt"})
        files.write_json(beside / CONFIG, config)


def load_peft_deltas(model: nn.Module, folder: str | os.PathLike) -> SparseTuner:
    """Give a model the deltas of one of PEFT's Super-Tuning adapters, saved with its places.

    InputError (a ValueError): another kind of adapter, a damaged one, or of another model.
    """
    folder = Path(folder)
    config = files.read_json(folder / CONFIG)
    if config.get("peft_type") != KIND:
        raise InputError(
            f"load_peft_deltas: {folder} is an adapter of kind {config.get('peft_type')}, "
            f"need {KIND}"
        )
    if config.get("r"):
        raise InputError(
            f"load_peft_deltas: {folder} has a low-rank update beside its values (r = "
            f"{config['r']}), need values alone"
        )
    tensors = files.read_tensors(folder / TENSORS)
    modules = dict(model.named_modules())
    deltas = {}
    for key, values in tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".supertuning_")
        if part != "values":
            continue
        indices, layer = tensors.get(f"{PREFIX}{name}.supertuning_indices"), modules.get(name)
        if indices is None:
            raise InputError(
                f"load_peft_deltas: {folder} has no places for {name}; save the adapter with "
                "save_precomputed_indices"
            )
        if not isinstance(layer, nn.Linear):
            raise InputError(f"load_peft_deltas: the model has no linear layer {name!r}")
        deltas[f"{name}.weight"] = _summed(folder, name, indices, values, layer)
    if not deltas:
        raise InputError(f"load_peft_deltas: {folder / TENSORS} holds no values")
    return attach_deltas(model, deltas)


def _summed(folder, name, indices, values, layer) -> WeightDelta:
    """What stands at one place twice becomes one value."""
    if indices.shape != values.shape or indices.dim() != 1 or indices.is_floating_point():
        raise InputError(
            f"load_peft_deltas: {folder}: {name} has places {indices.dtype} of shape "
            f"{tuple(indices.shape)} and values of {tuple(values.shape)}"
        )
    places, where = indices.long().unique(return_inverse=True)
    summed = torch.zeros(len(places)).index_add_(0, where, values.float())
    try:
        return WeightDelta.from_flat(places, summed, layer.out_features, layer.in_features)
    except ValueError as error:
        raise InputError(f"load_peft_deltas: {folder}: {name}: {error}") from error
