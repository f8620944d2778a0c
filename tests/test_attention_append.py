"""append_to_cache: rows, pages, strides, and what is refused."""

import pytest
import torch
from attention_inputs import DTYPES, dtype_name, int32

import tilewright as tw
from tilewright.ops.attention.append import _by_index


def inputs(dtype=torch.float32, rows=3, n=2, heads=2, width=8, value_width=5, slots=10):
    k = torch.randn(rows, n, heads, width).to(dtype)
    v = torch.randn(rows, n, heads, value_width).to(dtype)
    caches = [torch.randn(rows, slots, heads, w).to(dtype) for w in (width, value_width)]
    return k, v, *caches, int32([n, slots, 5][:rows])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_the_last_positions_hold_the_tokens_and_the_rest_is_untouched(dtype):
    k, v, k_cache, v_cache, lengths = inputs(dtype)
    before = [t.clone() for t in (k_cache, v_cache)]
    tw.append_to_cache(k, v, k_cache, v_cache, key_lengths=lengths)
    for new, cache, was in zip((k, v), (k_cache, v_cache), before, strict=True):
        for row, end in enumerate(lengths.tolist()):
            assert torch.equal(cache[row, end - 2 : end], new[row])
            was[row, end - 2 : end] = new[row]
        assert torch.equal(cache, was)


def test_pages_and_any_strides():
    k, v, *_ = inputs(rows=2, n=3)
    k, v = (
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v[..., torch.randperm(5)].mT.contiguous().mT,
    )
    table = int32([[4, 0, 2], [1, 5, 3]])
    lengths = int32([5, 12])
    caches, expected = ([torch.zeros(6, 4, 2, w) for w in (8, 5)] for _ in range(2))
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in caches]
    tw.append_to_cache(k, v, *views, key_lengths=lengths, page_table=table)
    for row, end in enumerate(lengths.tolist()):
        for t in range(3):
            page, slot = divmod(end - 3 + t, 4)
            expected[0][table[row, page], slot] = k[row, t]
            expected[1][table[row, page], slot] = v[row, t]
    assert torch.equal(views[0], expected[0]) and torch.equal(views[1], expected[1])
    _by_index(k, v, *caches, lengths, table)
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])


def test_what_is_appended_is_what_flash_decode_reads():
    k, v, k_cache, v_cache, lengths = inputs(value_width=8)
    q = torch.randn(3, 2, 4, 8)
    tw.append_to_cache(k, v, k_cache, v_cache, key_lengths=lengths)
    out = tw.flash_decode(q, k_cache, v_cache, key_lengths=lengths)
    for row, end in enumerate(lengths.tolist()):
        alone = tw.flash_attention(
            q[row : row + 1], k_cache[row : row + 1, :end], v_cache[row : row + 1, :end],
            is_causal=True,
        )  # fmt: skip
        torch.testing.assert_close(out[row : row + 1], alone)


def test_it_works_under_torch_function_modes():
    k, v, k_cache, v_cache, lengths = inputs()
    expected = [t.clone() for t in (k_cache, v_cache)]
    tw.append_to_cache(k, v, *expected, key_lengths=lengths)
    with torch.device("cpu"):  # a mode: the kernel is not called directly
        tw.append_to_cache(k, v, k_cache, v_cache, key_lengths=lengths)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


REFUSALS = {
    "key_lengths\\[0\\] is 1, need 2 to 10": dict(key_lengths=int32([1, 4, 5])),
    "key_lengths\\[1\\] is 11, need 2 to 10": dict(key_lengths=int32([2, 11, 5])),
    "key_lengths is torch.int64, need int32": dict(key_lengths=torch.tensor([2, 4, 5])),
    "v_cache": dict(v_cache=torch.zeros(3, 10, 2, 6)),
    "page_table\\[0, 0\\] is 7, need 0 to 2": dict(page_table=int32([[7], [0], [1]])),
    "has no gradient": dict(k=torch.randn(3, 2, 2, 8, requires_grad=True)),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    names = ("k", "v", "k_cache", "v_cache", "key_lengths")
    given = dict(zip(names, inputs(), strict=True)) | REFUSALS[message]
    with pytest.raises(ValueError, match=message):
        tw.append_to_cache(**given)


def test_the_reference_refuses_the_same_lengths():
    k, v, k_cache, v_cache, _ = inputs()
    with torch.device("cpu"), pytest.raises(ValueError, match="key_lengths\\[0\\] is 1"):
        tw.append_to_cache(k, v, k_cache, v_cache, key_lengths=int32([1, 4, 5]))
