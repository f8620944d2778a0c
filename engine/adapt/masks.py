"""The mask that transformers asks for once a forward pass, in the form that our operator reads.

transformers builds one mask for each kind of layer and hands it unchanged to every attention call.
Ours takes one of four forms, told apart by the number of axes:

    None                every key is seen as far as the layer's own rule (causal, window) allows,
                        the last query standing at the last key
    (B, S) bool         the same, but only keys that are True are live. S may be less than the
                        number of keys (a preallocated cache): what lies behind S is not live. With
                        one query the row says everything, the window included
    (N + 1,) int32      packed documents: the boundaries in the flattened batch of B * L tokens
    (B, 1, Lq, Lk)      anything else, written out pair by pair; the stock path takes it

The first three never hold Lq * Lk numbers. A rule that is not known to be causal, a causal sliding
window, bidirectional, or packed documents of the first two, is written out.
"""

from __future__ import annotations

import torch
from transformers import masking_utils as stock

# A closure is known by its code object: the same for every closure that one line of source makes.
_AND = stock.and_masks(stock.causal_mask_function).__code__
_SLIDING = stock.sliding_window_overlay(1).__code__
_SAME_DOCUMENT = stock.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
# the rule on positions that restart with each document; transformers 5.17 has none: there the rule
# is joined as it is, which sees the same pairs
_OWN_POSITIONS = getattr(stock, "remap_positions_for_packed_sequence", None)
if _OWN_POSITIONS is not None:
    _OWN_POSITIONS = _OWN_POSITIONS(stock.causal_mask_function, torch.zeros(1, 1)).__code__


def tilewright_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=stock.causal_mask_function,
    attention_mask=None,
    **options,
):
    """The mask function registered with `AttentionMaskInterface`; arguments are transformers'.

    Queries stand at positions q_offset + [0, q_length), keys at kv_offset + [0, kv_length).
    attention_mask is (B, tokens so far) bool, or None.
    """
    compiling = torch.compiler.is_compiling()

    def written_out():
        options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return stock.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **options,
        )  # fmt: skip

    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    rule = _rule(mask_function, options, compiling, q_length, whole)
    if rule is None or (attention_mask is not None and attention_mask.dim() != 2):
        return written_out()
    if rule == "bidirectional":
        # not allowed to skip: the model goes on to compute with the written-out mask
        if not options.get("allow_is_bidirectional_skip", False):
            return written_out()
        return _live_keys(attention_mask, kv_length, kv_offset, compiling)
    if rule == "packed":
        return _boundaries(mask_function, batch_size, q_length, options["device"], compiling)

    # A preallocated cache counts its tokens in a tensor, so that a compiled graph need not change.
    counted_on_device = isinstance(q_offset, torch.Tensor)
    if q_length == 1:
        last_on_last = not counted_on_device and kv_offset + kv_length == q_offset + 1
        if attention_mask is None and last_on_last:
            return None
        return _row(batch_size, kv_length, q_offset, kv_offset, mask_function, attention_mask,
                    options["device"])  # fmt: skip
    if not options.get("allow_is_causal_skip", True):
        return written_out()
    if counted_on_device:
        if compiling:
            return written_out()
        q_offset = int(q_offset)
    if kv_offset + kv_length != q_offset + q_length:
        if q_offset or kv_offset:  # the cache holds tokens already and has empty slots behind them
            return written_out()
        # the first tokens of an empty preallocated cache; None would claim that all slots are live
        live = _live_keys(attention_mask, q_length, 0, compiling)
        if live is None:
            live = torch.ones(batch_size, q_length, dtype=torch.bool, device=options["device"])
        return live
    return _live_keys(attention_mask, kv_length, kv_offset, compiling)


def _rule(mask_function, options, compiling, q_length, whole) -> str | None:
    """ "causal", "bidirectional" or "packed" where that is certain, else None.

    "causal" includes the causal sliding window: its width reaches the attention call on its own.
    whole   queries and keys are the same tokens: documents are packed in no other case
    """
    if options.get("use_vmap"):  # the model has supplied a rule of its own
        return None
    if mask_function is stock.causal_mask_function:
        return "causal"
    if mask_function is stock.bidirectional_mask_function:
        return "bidirectional"
    if getattr(mask_function, "__code__", None) is not _AND:
        return None
    if compiling:
        # Closures cannot be opened here. What is left of the rules that join two by "and": causal
        # windows, chunks, windows to both sides, and packed documents.
        chunked = getattr(options.get("config"), "attention_chunk_size", None) is not None
        if chunked or "allow_is_bidirectional_skip" in options:
            return None
        # a single query behind a preallocated cache may not skip either; documents of a single
        # token see what a causal rule sees
        if options.get("allow_is_causal_skip", True) or q_length == 1:
            return "causal"
        return "packed" if whole else None
    if _is_causal(mask_function):
        return "causal"
    parts = _parts(mask_function)
    within = [part for part in parts if part.__code__ is not _SAME_DOCUMENT]
    if len(parts) != 2 or len(within) != 1:
        return None
    if within[0].__code__ is _OWN_POSITIONS:
        within = [_held(within[0], "mask_function")]
    return "packed" if _is_causal(within[0]) else None


def _is_causal(mask_function) -> bool:
    if mask_function is stock.causal_mask_function:
        return True
    if getattr(mask_function, "__code__", None) is not _AND:
        return False
    parts = _parts(mask_function)
    return (
        len(parts) == 2 and parts[0].__code__ is _SLIDING and parts[1] is stock.causal_mask_function
    )


def _parts(mask_function) -> tuple:
    """The rules that an and-closure joins."""
    return _held(mask_function, "mask_functions")


def _held(closure, name):
    at = closure.__code__.co_freevars.index(name)
    return closure.__closure__[at].cell_contents


def _live_keys(attention_mask, kv_length, kv_offset, compiling):
    """(B, kv_length) bool, or None where every key is live."""
    if attention_mask is None:
        return None
    live = _window_of(attention_mask, kv_length, kv_offset)
    if not compiling and bool(live.all()):  # data-dependent: not in a compiled graph
        return None
    return live


def _window_of(attention_mask, kv_length, kv_offset):
    """Its columns for keys at kv_offset + [0, kv_length); what it does not reach is not live."""
    n_columns = attention_mask.shape[1]
    if n_columns == kv_length:  # also what `generate` has asked us for before and hands back
        return attention_mask
    missing = kv_offset + kv_length - n_columns
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _row(batch_size, kv_length, q_offset, kv_offset, mask_function, attention_mask, device):
    """(B, kv_length) bool: what a single query sees."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    keys = torch.arange(kv_length, device=device)[None, :] + kv_offset
    row = mask_function(zero, zero, zero + q_offset, keys).expand(batch_size, kv_length)
    if attention_mask is None:
        return row.contiguous()
    return row & _window_of(attention_mask, kv_length, kv_offset)


def _boundaries(mask_function, batch_size, length, device, compiling):
    """(N + 1,) int32: where the documents of B * L flattened tokens begin, and the end.

    A token begins a document if it does not see the token before it. In a compiled graph, where N
    must not depend on the data, the documents are followed by empty ones: N is B * L.
    """
    rows = torch.arange(batch_size, device=device)[:, None]
    tokens = torch.arange(length, device=device)[None, :]
    before = (tokens - 1).clamp(min=0)
    begins = ~mask_function(rows, torch.zeros_like(rows), tokens, before)
    begins = (begins | (tokens == 0)).expand(batch_size, length).flatten()
    if compiling:
        document = begins.cumsum(0) - 1
        lengths = torch.zeros(batch_size * length, dtype=torch.int32, device=device)
        lengths = lengths.scatter_add(0, document, torch.ones_like(lengths))
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    starts = begins.nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=batch_size * length).to(torch.int32)


def pairs(mask, batch_size, n_queries, n_keys, is_causal, window, device):
    """A mask of the first three forms written out for the stock path: (B, 1, Lq, Lk) bool.

    window   how many keys a query sees, itself included, or None; causal masks only
    """
    i = torch.arange(n_queries, device=device)[:, None]
    j = torch.arange(n_keys, device=device)[None, :]
    if mask is not None and mask.dim() == 1:
        token = torch.arange(batch_size * n_queries, device=device)
        document = torch.searchsorted(mask[1:].to(torch.long).contiguous(), token, right=True)
        document = document.view(batch_size, n_queries)
        seen = (document[:, :, None] == document[:, None, :])[:, None]
        live = None
    else:
        n_live = n_keys if mask is None else mask.shape[1]
        i = i + (n_live - n_queries)
        seen = (j < n_live).expand(batch_size, 1, n_queries, n_keys)
        live = mask
    if live is not None:
        live = torch.nn.functional.pad(live, (0, n_keys - live.shape[1]))
        seen = seen & live[:, None, None, :]
    row_says_all = live is not None and n_queries == 1
    if is_causal and not row_says_all:
        seen = seen & (j <= i)
        if window is not None:
            seen = seen & (j > i - window)
    return seen
