"""The two parts of LongLoRA beside shifted-sparse attention: stretched positions, trainable set.

Both go through the record of `tilewright.adapt.undo`, so that `restore` takes them back.
Source: Chen et al., LongLoRA, arXiv 2309.12307; position interpolation, arXiv 2306.15595.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from tilewright.adapt import undo

_FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn")
_ADAPTER_PARTS = ("lora_", ".modules_to_save.")  # PEFT's own parameters: it has set their flags


def interpolate_positions(model: nn.Module, target_length: int) -> list[str]:
    """Stretch rotary positions so that target_length tokens fit into the range seen in training.

        angle(p, d) = p inv_freq[d] / f,   f = ceil(target_length / present length)

    The present length is max_position_embeddings, times the factor of a linear scaling that is
    there already; that scaling is kept, so the factors multiply. The model's own configuration is
    changed with it where it can say so, and a saved model then loads with the same positions.
    Returns the lines for the report. ValueError: no rotary positions, or frequencies that change
    with the length of the input.
    """
    rotaries = [
        (name, module)
        for name, module in model.named_modules()
        if "inv_freq" in module._buffers and hasattr(module, "rope_type")
    ]
    by_layer_type = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "rope_type", None), dict)
    ]
    if by_layer_type:
        raise ValueError(
            f"accelerate: rope_target_length needs one rotary scaling for all layers, "
            f"{by_layer_type[0]} has one for each layer type"
        )
    if not rotaries:
        raise ValueError(
            f"accelerate: rope_target_length was given, but {type(model).__name__} has no rotary "
            "positions with a buffer inv_freq"
        )
    of_config: dict[int, list[nn.Module]] = {}
    for name, module in rotaries:
        if module.rope_type not in _FIXED_FREQUENCIES:
            raise ValueError(
                f"accelerate: rope_target_length needs fixed rotary frequencies, "
                f'{name} has rope_type "{module.rope_type}", which computes them anew'
            )
        of_config.setdefault(id(module.config), []).append(module)
    return [_stretch(modules, target_length) for modules in of_config.values()]


def _stretch(rotaries: list[Any], target_length: int) -> str:
    """The same for the rotary modules of one configuration; returns a line for the report."""
    config = rotaries[0].config
    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    present_factor = rope.get("factor", 1.0) if kind == "linear" else 1.0
    present = int(config.max_position_embeddings * present_factor)
    factor = float(math.ceil(target_length / present))
    if factor <= 1.0:
        return f"rotary positions reach {present} tokens already: nothing to stretch"
    for rotary in rotaries:
        for buffer in ("inv_freq", "original_inv_freq"):
            if buffer in rotary._buffers:
                undo.set_attribute(rotary, buffer, rotary._buffers[buffer] / factor)
    note = f"rotary positions stretched {factor:g} times, from {present} to {target_length} tokens"
    if kind not in ("default", "linear"):
        return (
            f'{note}; config.json cannot say so beside rope_type "{kind}": '
            "pass rope_target_length again after loading a saved model"
        )
    for rotary in rotaries:
        undo.set_attribute(rotary, "rope_type", "linear")
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": present_factor * factor}
    return note


def train_only(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Let exactly those parameters train whose name holds one of the parts, and PEFT's adapters.

    A parameter that is shared under several names (a tied lm_head) counts under each of them.
    Adapters keep the flags that PEFT gave them. Returns the lines for the report. ValueError: a
    part that no name holds, or a chosen parameter that is packed to integers.
    """
    every = list(model.named_parameters(remove_duplicate=False))
    for part in parts:
        if not any(part in name for name, _ in every):
            raise ValueError(f'accelerate: train names "{part}", which no parameter name holds')
    named = [(n, p) for n, p in every if not _is_adapter(n) and ".original_module." not in n]
    chosen = {id(p): name for name, p in named if any(part in name for part in parts)}
    seen, n_adapters = set(), 0
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if _is_adapter(f"{prefix}.{name}"):
                n_adapters += parameter.requires_grad
                continue
            if id(parameter) in chosen and not parameter.is_floating_point():
                raise ValueError(
                    f"accelerate: train asks for {chosen[id(parameter)]}, which is "
                    f"{parameter.dtype} and cannot train"
                )
            undo.set_requires_grad(module, name, id(parameter) in chosen)
    return [
        f"training {len(chosen)} parameters whose names hold {' or '.join(parts)}, and "
        f"{n_adapters} of adapters; the rest is frozen"
    ]


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER_PARTS)
