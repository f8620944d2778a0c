"""LoRA updates added into the weights that they belong to, and what that costs in accuracy."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tilewright.files import check_safetensors
from tilewright.ops import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    Int4,
    Int8,
    dequantize_weight,
    quantize_weight,
    read_bitsandbytes,
)
from tilewright.quantized import FORMATS, QuantizedLinear, replace_module

BASES = ("dequantized", "original")
Format = NF4 | FP4 | Int4 | Int8 | FP8 | MXFP4


@dataclass(frozen=True)
class MergedLayer:
    """How far one merged weight is from the sum that the adapter was trained with.

    rms_error      root mean square of merged - (base as it multiplied + scaling B A)
    rms_intended   of that sum itself
    rms_update     of scaling B A alone
    """

    name: str
    rms_error: float
    rms_intended: float
    rms_update: float


@dataclass(frozen=True)
class Merged:
    """The outcome of `merge`.

    model    the model, or the layer, without adapters
    layers   one record for each merged weight
    """

    model: nn.Module
    layers: tuple[MergedLayer, ...]

    @property
    def rms_error(self) -> float:
        """Over all merged layers, each of the same weight."""
        squares = [layer.rms_error**2 for layer in self.layers]
        return (sum(squares) / len(squares)) ** 0.5

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.rms_error / (layer.rms_intended or 1.0))
        return (
            f"merged {len(self.layers)} layers, rms error {self.rms_error:.3e}; the worst is "
            f"{worst.name}: {worst.rms_error:.3e} in a weight of {worst.rms_intended:.3e}, "
            f"of which the update is {worst.rms_update:.3e}"
        )


@torch.no_grad()
def merge(
    model: nn.Module,
    base: str = "dequantized",
    *,
    original: str | os.PathLike | Mapping[str, torch.Tensor] | nn.Module | None = None,
    format: Format | None = None,
) -> Merged:
    """Add the active LoRA adapters into their weights, and report the error that this makes.

        merged = base + sum of scaling B A, rounded to the layer's dtype

    model      a PEFT model, or one of its LoRA layers; consumed: use what is returned
    base       "dequantized": the weight that the adapter was trained over, decoded;
               "original": the weight from before quantization, taken from `original`. An adapter
               learns to make up for the quantization error, and then does so without need
    original   a model folder, its tensors by name, or the dense model
    format     pack the merged weight again, NF4() for instance; default a dense nn.Linear

    The error is that of the merged weight against the sum that the adapter was trained with.
    ValueError: an argument outside the above; no LoRA layer; one that is merged already or that is
    no plain LoRA over a linear layer; the original lacks a weight or has it in another shape.
    Nothing is changed then. An accelerated model comes back stock.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"merge: model is a {type(model).__name__}, need a torch.nn.Module")
    if base not in BASES:
        raise ValueError(f'merge: no base "{base}". Known: {", ".join(BASES)}')
    if (base == "original") != (original is not None):
        raise ValueError('merge: original belongs to base="original", and is needed there')
    if format is not None and not isinstance(format, tuple(FORMATS.values())):
        known = ", ".join(f"{kind.__name__}()" for kind in FORMATS.values())
        raise ValueError(f"merge: format is {format!r}, need one of {known}")
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(f"merge: this {type(model).__name__} has no LoRA layer")
    for name, layer in layers:
        reason = _why_not(layer)
        if reason is not None:
            raise ValueError(f"merge: {name or 'the layer'} cannot be merged: {reason}")
    originals = _originals(original, layers)

    records = []
    for name, layer in layers:
        dense = None if originals is None else originals[_key(name)].detach()
        linear, record = _merged(name, layer, dense, format)
        records.append(record)
        if layer is model:
            return Merged(linear, (record,))
        replace_module(model, layer, linear)
    from tilewright.adapt import undo

    if undo.is_changed(model):
        undo.undo(model)
    if hasattr(model, "peft_config"):
        model = model.unload()  # type: ignore[operator]
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from tilewright import quantizer

        quantizer.mark(model, format)
    return Merged(model, tuple(records))


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.lora import LoraLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]


def _why_not(layer: Any) -> str | None:
    base = layer.base_layer
    if layer.merged:
        return "it is merged already, call unmerge_adapter first"
    if not isinstance(base, nn.Linear):
        return f"its base is a {type(base).__name__}, need a linear layer"
    for adapter in _active(layer):
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            return f"{adapter} is a variant of LoRA ({kind}), whose own merge_and_unload does it"
        if layer.lora_bias[adapter]:
            return f"{adapter} has a bias (lora_bias), whose own merge_and_unload does it"
    return None


def _active(layer: Any) -> list[str]:
    names = [] if layer.disable_adapters else layer.active_adapters
    return [name for name in names if name in layer.lora_A]


def _merged(
    name: str, layer: Any, original: torch.Tensor | None, format: Format | None
) -> tuple[nn.Linear, MergedLayer]:
    base = layer.base_layer
    weight, dtype = _weight(base)
    update = torch.zeros_like(weight)
    for adapter in _active(layer):
        up, down = layer.lora_B[adapter].weight.float(), layer.lora_A[adapter].weight.float()
        update += layer.scaling[adapter] * (up @ down).to(update.device)
    intended = weight + update
    summed = intended if original is None else original.to(weight) + update
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(summed.to(dtype))
    linear.bias = base.bias
    linear.train(base.training)
    result = linear.weight.float()
    if format is not None:
        packed = QuantizedLinear(quantize_weight(linear.weight, format), base.bias)
        result = dequantize_weight(packed.packed, torch.float32)
        linear = packed.train(base.training)
    return linear, MergedLayer(name, _rms(result - intended), _rms(intended), _rms(update))


def _weight(base: nn.Linear) -> tuple[torch.Tensor, torch.dtype]:
    """The base as it multiplies, float32, and the dtype that the merged weight gets."""
    if isinstance(base, QuantizedLinear):
        return dequantize_weight(base.packed, torch.float32), base.dtype
    if getattr(base.weight, "quant_state", None) is not None:  # of bitsandbytes
        packed = read_bitsandbytes(base.state_dict())
        return dequantize_weight(packed, torch.float32), packed.dtype
    return base.weight.float(), base.weight.dtype


def _originals(source, layers: list[tuple[str, Any]]) -> Mapping[str, torch.Tensor] | None:
    """The dense weights by name, after a look at each that will be needed."""
    if source is None:
        return None
    if isinstance(source, nn.Module):
        source = dict(source.named_parameters())
    tensors = source if isinstance(source, Mapping) else _Folder(source)
    for name, layer in layers:
        key = _key(name)
        if key not in tensors:
            raise ValueError(f"merge: original has no {key}, need the model before quantization")
        shape = (layer.base_layer.out_features, layer.base_layer.in_features)
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"merge: {key} in original has shape {tuple(tensors[key].shape)}, need {shape}"
            )
    return tensors


def _key(name: str) -> str:
    """What the weight of a LoRA layer is called in the model without PEFT."""
    plain = name.removeprefix("base_model.model.")
    return f"{plain}.weight" if plain else "weight"


class _Folder(Mapping):
    """The tensors of a model folder by name; each is read when it is asked for."""

    def __init__(self, folder: str | os.PathLike):
        self.files: dict[str, Path] = {}  # of a tensor
        for file in sorted(Path(folder).glob("*.safetensors")):
            check_safetensors(file)
            with safe_open(file, framework="pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)
        if not self.files:
            raise ValueError(f"merge: original {folder} holds no tensors as .safetensors")

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item()
