"""Every refusal of the attention room, by its message: argument, what came, what is needed."""

import re

import pytest
import torch
from attention_inputs import int32

import tilewright
from tilewright import ShiftedSegments

q, k, v = (torch.zeros(2, n, h, 16) for n, h in ((5, 4), (7, 2), (7, 2)))
packed = [torch.zeros(9, h, 16) for h in (4, 2, 2)]
cu = int32([0, 4, 9])

DENSE = {
    "axes": ((q[0], k, v), {}, "q has shape (5, 4, 16), need axes (B, Lq, H, D)"),
    "batch": ((q[:1], k, v), {}, "k has shape (2, 7, 2, 16), need B = 1 as in q"),
    "keys": ((q, k, v[:, :6]), {}, "v has shape (2, 6, 2, 16), need Lk = 7 as in k"),
    "width": ((q[..., :8], k, v), {}, "k has shape (2, 7, 2, 16), need D = 8 as in q"),
    "heads": ((q[:, :, :3], k, v), {}, "q has 3 heads, need a multiple of k's 2"),
    "too-wide": ((torch.zeros(1, 1, 1, 257),) * 3, {}, "D is 257, need 1 <= D <= 256"),
    "no-width": ((torch.zeros(1, 1, 1, 0),) * 3, {}, "D is 0, need 1 <= D <= 256"),
    "integers": (
        (q.int(), k.int(), v.int()),
        {},
        "q is torch.int32, need one of float32, bfloat16",
    ),
    "mixed-dtypes": ((q, k.half(), v), {}, "k is torch.float16, need torch.float32 as in q"),
    "devices": ((q, k.to("meta"), v), {}, "k is on meta, need cpu as in q"),
    "nan-scale": ((q, k, v), {"scale": float("nan")}, "scale is nan, need a finite number"),
    "softcap": ((q, k, v), {"softcap": -1.0}, "softcap is -1.0, need 0 (none) or a positive"),
    "window-pair": ((q, k, v), {"window": 5}, "window is 5, need (left, right)"),
    "window-sign": ((q, k, v), {"window": (-1, 0)}, "window is (-1, 0), need sizes >= 0 or None"),
    "mask-dtype": (
        (q, k, v),
        {"key_mask": torch.ones(2, 7)},
        "need bool of shape (B, Lk) = (2, 7)",
    ),
    "mask-shape": (
        (q, k, v),
        {"key_mask": torch.ones(2, 6, dtype=torch.bool)},
        "key_mask is torch.bool of shape (2, 6), need bool of shape (B, Lk) = (2, 7)",
    ),
    "sinks": ((q, k, v), {"sinks": torch.zeros(3)}, "sinks has shape (3,), need H = 4 as in q"),
    "segments-kind": ((q, k, v), {"segments": 8}, "segments is 8, need a ShiftedSegments"),
    "group-size": ((q, k, v), {"segments": ShiftedSegments(0)}, "group_size is 0, need at least 1"),
    "shifted-head": (
        (q, k, v),
        {"segments": ShiftedSegments(4, first_shifted_head=5)},
        "first_shifted_head is 5, need 0 to H = 4",
    ),
    "wraparound-length": (
        (k, k, v),
        {"segments": ShiftedSegments(4, wraparound=True)},
        "needs an even group_size that divides every length, got group_size 4 and length 7",
    ),
    "wraparound-queries": (
        (q, k[:, :6], v[:, :6]),
        {"segments": ShiftedSegments(2, wraparound=True)},
        "wraparound needs Lq = Lk and no window",
    ),
    "cu-k-alone": ((q, k, v), {"cu_seqlens_k": cu}, "cu_seqlens_k was given without cu_seqlens"),
    "extra-pair": ((q, k, v), {"extra_kv": k}, "extra_kv needs to be a pair of tensors"),
    "extra-shape": (
        (q, k, v),
        {"extra_kv": (k[0, :3, :1], v[0, :3])},
        "extra_kv's k has shape (2, 3, 1, 16), need (2, P, 2, 16)",
    ),
    "extra-lengths": (
        (q, k, v),
        {"extra_kv": (k[0, :3], v[0, :2])},
        "extra_kv has 3 keys and 2 values",
    ),
    "unknown-impl": (
        (q, k, v),
        {"impl": "fastest"},
        'no impl "fastest". Known: auto, triton_gpu, cpp_cpu, reference',
    ),
}

PACKED = {
    "axes": ({"cu_seqlens": cu}, "q has shape (1, 9, 4, 16), need axes (Tq, H, D)", True),
    "int64": (
        {"cu_seqlens": cu.long()},
        "cu_seqlens is torch.int64 of shape (3,), need int32",
        False,
    ),
    "documents": (
        {"cu_seqlens": cu, "cu_seqlens_k": int32([0, 9])},
        "cu_seqlens_k has shape (2,), need N + 1 = 3 as in cu_seqlens",
        False,
    ),
    "mask": (
        {"cu_seqlens": cu, "key_mask": torch.ones(1, 9, dtype=torch.bool)},
        "key_mask goes with the batch form, cu_seqlens with packed",
        False,
    ),
    "backwards": (
        {"cu_seqlens": int32([0, 6, 4])},
        "cu_seqlens[2] is 4, need at least cu_seqlens[1] = 6",
        False,
    ),
    "negative": (
        {"cu_seqlens": int32([-1, 4, 9])},
        "cu_seqlens starts at -1, need at least 0",
        False,
    ),
    "past-the-end": (
        {"cu_seqlens": int32([0, 4, 10])},
        "cu_seqlens ends at 10, past the 9 tokens given",
        False,
    ),
}


@pytest.mark.parametrize("tensors, options, message", DENSE.values(), ids=DENSE)
def test_flash_attention(tensors, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        tilewright.flash_attention(*tensors, **options)
    assert str(refusal.value).startswith("flash_attention: ")


@pytest.mark.parametrize("impl", ["cpp_cpu", "reference"])
@pytest.mark.parametrize("options, message, with_batch", PACKED.values(), ids=PACKED)
def test_packed_flash_attention(options, message, with_batch, impl):
    tensors = [t[None] for t in packed] if with_batch else packed
    with pytest.raises(ValueError, match=re.escape(message)):
        tilewright.flash_attention(*tensors, impl=impl, **options)


@pytest.mark.parametrize("impl", ["cpp_cpu", "reference"])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_wraparound_that_a_true_length_forbids(form, impl):
    """The whole length is a multiple of the group size; one document's, or one row's, is not."""
    n = torch.zeros(1, 16, 2, 8)
    options = {"segments": ShiftedSegments(8, wraparound=True), "impl": impl}
    if form == "packed":
        n, options["cu_seqlens"] = n[0], int32([0, 5, 16])
        message = "got 5 queries and 5 live keys"
    else:
        options["key_mask"] = torch.arange(16)[None] < 12
        message = "got 16 queries and 12 live keys"
    with pytest.raises(ValueError, match="needs group_size 8 to divide every length.*" + message):
        tilewright.flash_attention(n, n, n, **options)


DECODE = {
    "lengths-dtype": (
        {"key_lengths": torch.tensor([3, 4])},
        "key_lengths is torch.int64, need int32",
    ),
    "lengths-shape": (
        {"key_lengths": int32([3])},
        "key_lengths has shape (1,), need B = 2 as in q",
    ),
    "starts-dtype": (
        {"key_lengths": int32([3, 4]), "key_starts": torch.zeros(2)},
        "key_starts is torch.float32, need int32",
    ),
    "table-shape": (
        {"key_lengths": int32([3, 4]), "page_table": int32([0, 1])},
        "page_table has shape (2,), need axes (B, pages)",
    ),
    "window": ({"key_lengths": int32([3, 4]), "window_left": -1}, "window_left is -1, need >= 0"),
    "splits": ({"key_lengths": int32([3, 4]), "num_splits": 0}, "num_splits is 0, need >= 1"),
    "sinks": (
        {"key_lengths": int32([3, 4]), "sinks": torch.zeros(2)},
        "sinks has shape (2,), need H = 4 as in q",
    ),
}


@pytest.mark.parametrize("options, message", DECODE.values(), ids=DECODE)
def test_flash_decode(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        tilewright.flash_decode(q[:, :1], k, v, **options)
    assert str(refusal.value).startswith("flash_decode: ")


def test_a_named_implementation_runs_or_raises():
    message = r'impl "triton_gpu" cannot run: tensors are on cpu.* Here: cpp_cpu, reference\.'
    with pytest.raises(RuntimeError, match=message):
        tilewright.flash_attention(q, k, v, impl="triton_gpu")
    with pytest.raises(
        RuntimeError, match=r'impl "cpp_cpu" cannot run: no kernel for torch\.float64'
    ):
        tilewright.flash_attention(q.double(), k.double(), v.double(), impl="cpp_cpu")


def test_explain_says_which_and_why_not_the_others():
    explanation = tilewright.explain("flash_attention", q, k, v, is_causal=True)
    assert explanation.chosen == "cpp_cpu"
    assert set(explanation.reasons) == {"triton_gpu", "reference"}
    assert explanation.reasons["reference"] == "cpp_cpu comes first"
    assert "flash_attention: cpp_cpu" in str(explanation)
    double = tilewright.explain("flash_attention", q.double(), k.double(), v.double())
    assert double.chosen == "reference" and "float64" in double.reasons["cpp_cpu"]
    with pytest.raises(
        ValueError, match=r"no operator 'flash'\. Known: flash_attention, flash_decode"
    ):
        tilewright.explain("flash")


def test_a_conjugated_view_is_refused():
    negated = torch.zeros(2, 5, 4, 16, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises(ValueError, match="negated view"):
        tilewright.flash_attention(negated, k, v)
