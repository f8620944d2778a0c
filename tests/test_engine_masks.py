"""The mask function of accelerated models sees the pairs that transformers' own masks see."""

import pytest
import torch
from transformers import LlamaConfig, masking_utils

from tilewright.adapt.attention import register
from tilewright.adapt.masks import pairs, tilewright_mask


def expect_same_pairs(ours, arguments, window=None):
    """Our mask, written out, sees exactly the pairs that transformers' own mask sees."""
    arguments = {**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    want = masking_utils.sdpa_mask(**arguments)
    is_causal = arguments["mask_function"] is not masking_utils.bidirectional_mask_function
    n_keys = arguments["kv_length"]
    shape = arguments["batch_size"], arguments["q_length"], n_keys
    got = pairs(ours, *shape, is_causal, window, torch.device("cpu"))
    assert torch.equal(got, want.expand_as(got))


MASKS = {  # q_length, kv_length, q_offset, kv_offset, columns of the 2-D mask
    "whole": (7, 7, 0, 0, 7),
    "one more token": (1, 8, 7, 0, 8),
    "several more tokens": (3, 10, 7, 0, 10),
    "a sliding cache": (2, 6, 9, 5, 11),
    "one more in a sliding cache": (1, 5, 9, 5, 10),
    "an empty preallocated cache": (4, 12, 0, 0, 4),
    "one more in a preallocated cache": (1, 12, 5, 0, 6),
    "several more in a preallocated cache": (3, 12, 5, 0, 8),
}


@pytest.mark.parametrize("counted", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", MASKS)
def test_causal_masks_see_what_stock_masks_see(case, padded, window, counted):
    q_length, kv_length, q_offset, kv_offset, columns = MASKS[case]
    rule = masking_utils.causal_mask_function
    if window:
        rule = masking_utils.sliding_window_causal_mask_function(window)
    mask = None
    if padded:
        mask = torch.ones(2, columns, dtype=torch.bool)
        mask[0, : columns // 2 - 1] = False
    arguments = {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if counted else q_offset, "kv_offset": kv_offset,
        "mask_function": rule, "attention_mask": mask, "device": torch.device("cpu"),
    }  # fmt: skip
    ours = tilewright_mask(**arguments, local_size=window)
    if case != "several more in a preallocated cache":
        assert ours is None or ours.dim() == 2
    if ours is not None and ours.dim() == 4:
        assert torch.equal(ours, masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))
    else:
        expect_same_pairs(ours, arguments, window)
    if ours is not None and ours.dim() == 2:  # `generate` may hand it back as a 2-D mask
        again = tilewright_mask(**{**arguments, "attention_mask": ours}, local_size=window)
        expect_same_pairs(again, arguments, window)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_masks_see_what_stock_masks_see(window):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]])
    seen = {}
    create = (
        masking_utils.create_sliding_window_causal_mask
        if window
        else masking_utils.create_causal_mask
    )
    config = LlamaConfig(num_hidden_layers=1)
    config.sliding_window = window
    register()
    for name in ("tilewright", "sdpa"):
        config._attn_implementation = name
        seen[name] = create(
            config=config, inputs_embeds=torch.zeros(2, 8, 1), attention_mask=None,
            past_key_values=None, position_ids=positions,
        )  # fmt: skip
    ours = seen["tilewright"]
    assert ours.tolist() == [0, 3, 8, 14, 15, 16]
    assert ours.dtype == torch.int32
    got = pairs(ours, 2, 8, 8, True, window, torch.device("cpu"))
    assert torch.equal(got, seen["sdpa"])
    assert tilewright_mask(2, 8, 8, device="cpu") is None


@pytest.mark.parametrize(
    "rule",
    [
        masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
        masking_utils.sliding_window_bidirectional_mask_function(3),
        masking_utils.or_masks(
            masking_utils.causal_mask_function,
            masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 1, 1, 1, 1]]).expand(2, -1)),
        ),
        masking_utils.and_masks(
            masking_utils.causal_mask_function, lambda b, h, q, k: (q + k) % 3 > 0
        ),
        lambda b, h, q, k: (k <= q) | (k < 3),
    ],
    ids=["chunks", "window to both sides", "blocks", "and with an own rule", "own rule"],
)
def test_unknown_rules_are_written_out(rule):
    arguments = {
        "batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": rule, "device": "cpu",
    }  # fmt: skip
    got = tilewright_mask(**arguments)
    assert torch.equal(got, masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))
    assert got.shape == (2, 1, 7, 7)
