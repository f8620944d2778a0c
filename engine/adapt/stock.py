"""transformers' own attention, for the calls that our operator does not take."""

from __future__ import annotations

import sys

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tilewright.adapt.masks import pairs


def eager_function(module_class: type):
    """The eager attention beside the class in its modeling file, or None."""
    for cls in module_class.__mro__:
        file = sys.modules.get(cls.__module__)
        found = getattr(file, "eager_attention_forward", None)
        if found is not None and cls.__module__.split(".")[0] != "torch":
            return found
    return None


def stock_attention(
    module, query, key, value, mask, *, is_causal, window, eager, prefer_eager, **arguments
):
    """Attention by transformers' eager or sdpa function; returns its (output, weights or None).

    mask            any form of `masks`; written out pair by pair here
    eager           the modeling file's eager function, or None
    prefer_eager    the model ran eagerly before, or weights are asked for
    """
    if mask is None or mask.dim() < 4:
        mask = pairs(
            mask, query.shape[0], query.shape[2], key.shape[2], is_causal, window, query.device
        )
    needs_eager = arguments.get("softcap") is not None or arguments.get("s_aux") is not None
    if eager is not None and (prefer_eager or needs_eager):
        if mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
                ~mask, lowest
            )
        return eager(module, query, key, value, mask, **arguments)
    if needs_eager:
        raise NotImplementedError(
            f"tilewright: {type(module).__name__} needs softcap or sinks together with a mask that "
            "flash_attention does not take, and its modeling file has no eager attention. "
            "Call tilewright.restore(model) for such inputs."
        )
    return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **arguments)
