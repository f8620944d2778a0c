"""The attention function that transformers calls under the name "tilewright"."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from tilewright.adapt.stock import eager_function, stock_attention
from tilewright.ops import ShiftedSegments, flash_attention, flash_decode

SETTINGS = "_tilewright_attention"  # attribute of an accelerated attention module
MAX_HEAD_DIM = 256
DECODE_QUERIES = 8  # up to this many new tokens over a longer cache go to flash_decode
_DECODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class AttentionSettings:
    """What `accelerate` has settled for one attention module.

    group_size    of shifted-sparse attention while the module trains; 0 is dense
    was           the attention implementation before: the stock path returns to it
    stays_stock   why this module is not replaced though its configuration is shared with replaced
                  ones, or None
    warned        reasons already told, shared by the modules of one model
    """

    group_size: int = 0
    was: str | None = "sdpa"
    stays_stock: str | None = None
    warned: set = field(default_factory=set)


_DEFAULTS = AttentionSettings()


def tilewright_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    is_causal=None,
    **extra,
):
    """Attention of one layer, with transformers' arguments and layout.

    query           (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); any strides
    attention_mask  one of the forms of `masks`
    sliding_window  how many keys a query sees, itself included; read by causal layers
    s_aux           (H,) sinks
    is_causal       default the module's own

    Returns ((B, Lq, H, Dv), None); weights in place of None where the stock path gives them.
    """
    settings = getattr(module, SETTINGS, _DEFAULTS)
    if extra.get("cache") is not None:
        raise NotImplementedError(
            f"tilewright: {type(module).__name__} got a paged cache (continuous batching), which "
            "the attention call itself must fill. Call tilewright.restore(model) for it."
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    window = sliding_window if is_causal and sliding_window else None

    reason = _why_stock(settings, query, key, value, attention_mask, extra)
    if reason is not None:
        _tell(module, settings, reason, is_causal)
        wants_weights = bool(extra.get("output_attentions"))
        arguments = {"scaling": scaling, "dropout": dropout, **extra}
        if softcap is not None:
            arguments["softcap"] = softcap
        if s_aux is not None:
            arguments["s_aux"] = s_aux
        return stock_attention(
            module, query, key, value, attention_mask, is_causal=is_causal, window=window,
            eager=eager_function(type(module)),
            prefer_eager=settings.was == "eager" or wants_weights, **arguments,
        )  # fmt: skip

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    rule = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    bounds = _document_bounds(attention_mask, extra, q, k)
    key_mask = attention_mask if bounds is None else None
    if key_mask is not None and key_mask.shape[1] < k.shape[1]:
        k, v = k[:, : key_mask.shape[1]], v[:, : key_mask.shape[1]]

    # shifted-sparse attention is for whole sequences in training; behind a cache it is dense
    shifted = settings.group_size > 0 and is_causal and module.training
    shifted = shifted and q.shape[1] == k.shape[1]
    if key_mask is None and bounds is None and _is_decode(q, k, v, s_aux, dropout):
        lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        left = None if window is None else window - 1
        out = flash_decode(
            q, k, v, key_lengths=lengths, is_causal=is_causal, window_left=left, **rule
        )
        return out, None

    row_says_all = key_mask is not None and q.shape[1] == 1
    if window is not None and not row_says_all:
        rule["window"] = (window - 1, None)
    if shifted:
        rule["segments"] = ShiftedSegments(settings.group_size)
    rule.update(is_causal=is_causal and not row_says_all, dropout_p=float(dropout))
    if bounds is None:
        return flash_attention(q, k, v, key_mask=key_mask, **rule), None
    batch, length = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    packed: Any = flash_attention(q, k, v, cu_seqlens=bounds[0], cu_seqlens_k=bounds[1], **rule)
    return packed.unflatten(0, (batch, length)), None


def _why_stock(settings, query, key, value, mask, extra) -> str | None:
    """Why this call stays on transformers' own attention, or None."""
    if settings.stays_stock is not None:
        return settings.stays_stock
    if extra.get("output_attentions"):
        return "output_attentions=True needs the attention weights"
    if extra.get("position_bias") is not None:
        return "a position bias is added to the scores"
    if extra.get("head_mask") is not None:
        return "a head mask scales the attention weights"
    if mask is not None and not _is_ours(mask, query, key):
        return f"the attention mask is {mask.dim()}-D: a rule for each (query, key) pair"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"the heads are wider than {MAX_HEAD_DIM}"
    if query.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {query.device.type}"
    return None


def _is_ours(mask, query, key) -> bool:
    if mask.dim() == 1:
        return mask.dtype == torch.int32
    return (
        mask.dim() == 2
        and mask.dtype == torch.bool
        and mask.shape[0] == query.shape[0]
        and mask.shape[1] <= key.shape[2]
    )


def _document_bounds(mask, extra, q, k):
    """(cu_seqlens, cu_seqlens_k) of packed documents, or None.

    Boundaries that the caller passes hold where no mask says otherwise, as in transformers' own
    flash attention; those that the mask function found in restarting positions hold without them.
    """
    if mask is not None and mask.dim() > 1:
        return None
    given = extra.get("cu_seq_lens_q")
    if given is None or q.shape[0] != 1:
        return None if mask is None else (mask, mask)
    given_k = extra.get("cu_seq_lens_k")
    given_k = given if given_k is None else given_k
    return given.to(torch.int32), given_k.to(torch.int32)


def _is_decode(q, k, v, sinks, dropout) -> bool:
    """Whether a few queries meet a longer row of keys, all of them live, and no gradient is due."""
    if q.shape[1] > DECODE_QUERIES or k.shape[1] <= q.shape[1] or dropout:
        return False
    if q.dtype not in _DECODE_DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    if torch.is_autocast_enabled(q.device.type):
        return False
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _tell(module, settings, reason, is_causal) -> None:
    """Warn once a model and reason. Not in a compiled graph, which has no place for a warning."""
    if settings.stays_stock is not None:  # the report has said so
        return
    if torch.compiler.is_compiling() or reason in settings.warned:
        return
    settings.warned.add(reason)
    shifted = settings.group_size > 0 and is_causal and module.training
    how = ", dense instead of shifted" if shifted else ""
    warnings.warn(
        f"tilewright: {type(module).__name__} runs transformers' own attention{how}: {reason}",
        stacklevel=3,
    )
