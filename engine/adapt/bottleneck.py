"""Adapters of two narrow matrices in a model: where they go, merging, removal."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from tilewright.adapt import bottleneck_layers as layers
from tilewright.adapt.methods import Parallel, Sequential
from tilewright.adapt.report import Skipped
from tilewright.adapt.sparse import choose_linear
from tilewright.adapt.tuner import Tuner
from tilewright.half import layers_with_attention
from tilewright.quantized import QuantizedLinear

NAMES = {
    "attention": re.compile(r"attn|attention"),
    "ffn": re.compile(r"^(mlp|ffn|feed_?forward|block_sparse_moe|moe)$"),
}


class AdapterTuner(Tuner):
    """A model with parallel or sequential adapters.

    layers   the layers with an adapter, by name
    """

    def __init__(self, model: nn.Module, method: Parallel):
        found, skipped = _places(model, method)
        super().__init__(model, method, skipped)
        self._freeze()
        adapter = layers.Adapter(method.scale, method.activation)
        generator = torch.Generator().manual_seed(method.seed)
        self.layers: dict[str, Any] = {}
        for name, layer, n_in, n_out in found:
            layers.attach(layer, self.name, adapter, method.rank, n_in, n_out, generator)
            self.layers[name] = layer

    def parameters(self) -> list[nn.Parameter]:
        return [p for m in self.layers.values() for p in (m.adapter_down, m.adapter_up)]

    def merge(self) -> None:
        if self.method.activation != "none":
            raise ValueError(
                f"merge: {self.name} has the activation {self.method.activation!r} between its "
                'matrices, so no weight says the same; need activation "none"'
            )
        for name, layer in self.layers.items():
            if not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"merge: {name} is a {type(layer).__name__}, whose adapter no weight takes "
                    'in; need adapters at "linear"'
                )
            if isinstance(layer, QuantizedLinear):
                raise ValueError(
                    f"merge: {name} is packed ({layer.format}), need a dense weight; "
                    "tilewright.dequantize decodes a model before it is adapted"
                )
        for layer in self.layers.values():
            layers.merge(layer, self.name)

    def unmerge(self) -> None:
        for layer in self.layers.values():
            layers.unmerge(layer)

    def remove(self) -> nn.Module:
        for layer in self.layers.values():
            layers.detach(layer)
        self.layers = {}
        return super().remove()


def _places(model: nn.Module, method: Parallel):
    """(name, layer, inputs, outputs) of all layers that get an adapter, and who gets none."""
    if any(hasattr(m, layers.DOWN) for m in model.modules()):
        raise ValueError("adapt: the model has adapters already; remove() them first")
    found: list[tuple[str, nn.Module, int, int]] = []
    skipped: list[Skipped] = []
    if "linear" in method.at:
        chosen, skipped = choose_linear(model, method.targets)
        is_behind = isinstance(method, Sequential)
        found = [
            (name, m, m.out_features if is_behind else m.in_features, m.out_features)
            for name, m in chosen
        ]
    blocks = [place for place in ("attention", "ffn") if place in method.at]
    for prefix, layer in layers_with_attention(model) if blocks else ():
        width = _width(layer)
        children = dict(layer.named_children())
        for place in blocks:
            names = [
                n for n, child in children.items()
                if NAMES[place].search(n.lower()) and "norm" not in n.lower()
                and any(isinstance(m, nn.Linear) or m._parameters for m in child.modules())
            ]  # fmt: skip
            if not names:
                raise ValueError(
                    f"adapt: {prefix} has no part that we know as its {place}, only "
                    f'{", ".join(children)}; need at="linear" and targets'
                )
            found += [(f"{prefix}.{n}", children[n], width, width) for n in names]
    if blocks and len(found) == 0:
        raise ValueError(
            f"adapt: {type(model).__name__} has no list of layers with attention in them; need "
            'at="linear"'
        )
    return found, skipped


def _width(layer: nn.Module) -> int:
    """Of the hidden states: the length of a norm's weight."""
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower() and "attn." not in name
        if is_norm and isinstance(weight, torch.Tensor):
            return weight.numel()
    raise ValueError(
        f"adapt: {type(layer).__name__} has no norm that tells how wide its states are; need "
        'at="linear"'
    )
