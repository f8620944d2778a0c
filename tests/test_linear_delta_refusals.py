"""What is no sparse delta, and what does not go with one, by the message; places of any size."""

import re
from dataclasses import replace

import pytest
import torch

from tilewright import ops
from tilewright.ops.common.sparse_delta import WeightDelta

x, weight = torch.zeros(5, 16), torch.zeros(8, 16)
good = WeightDelta.from_flat(torch.tensor([3, 5, 18, 127]), torch.ones(4), 8, 16)


def columns(*values):
    return torch.tensor(values, dtype=torch.int16)


BAD = {
    "shape": (
        WeightDelta.from_flat(torch.tensor([0]), torch.ones(1), 8, 17), {},
        "delta is of shape (8, 17), need (8, 16): (O, I) as in weight",
    ),
    "twice": (good, {"columns": columns(3, 3, 2, 15)}, "delta has column 3 of row 0 twice"),
    "unsorted": (
        good, {"columns": columns(5, 3, 2, 15)},
        "delta's columns of row 0 go from 5 to 3, need them ascending",
    ),
    "past-the-last": (
        good, {"columns": columns(3, 16, 2, 15)}, "delta has column 16, need 0 <= column < I = 16"
    ),
    "negative-is-65535": (
        good, {"columns": columns(3, -1, 2, 15)},
        "delta has column 65535, need 0 <= column < I = 16",
    ),
    "negative": (
        good, {"columns": columns(-3, 3, 2, 15).int()},
        "delta has column -3, need 0 <= column < I = 16",
    ),
    "columns-dtype": (
        good, {"columns": columns(3, 5, 2, 15).long()},
        "delta's columns is torch.int64 of shape (4,), need int16 or int32 of shape (4,)",
    ),
    "short-columns-of-many-inputs": (
        replace(good, in_features=70_000), {},
        "delta's columns is torch.int16 of shape (4,), need int32 of shape (4,)",
    ),
    "columns-axes": (
        good, {"columns": columns(3, 5, 2, 15)[None]},
        "delta's columns is torch.int16 of shape (1, 4), need int16 or int32 of shape (N,)",
    ),
    "values-dtype": (
        good, {"values": torch.ones(4).half()},
        "delta's values is torch.float16 of shape (4,), need float32 or bfloat16 or float64",
    ),
    "values-of-64-bits": (
        good, {"values": torch.ones(4).double()},
        "delta's values are torch.float64 over x of torch.float32, need float32 or bfloat16",
    ),
    "values-shape": (
        good, {"values": torch.ones(3)},
        "delta's values is torch.float32 of shape (3,), need",
    ),
    "offsets-dtype": (
        good, {"row_offsets": good.row_offsets.int()},
        "delta's row_offsets is torch.int32 of shape (9,), need int64 of shape (9,)",
    ),
    "offsets-length": (
        good, {"row_offsets": good.row_offsets[1:]},
        "delta's row_offsets is torch.int64 of shape (8,), need int64 of shape (9,)",
    ),
    "offsets-end": (
        good, {"row_offsets": good.row_offsets + (torch.arange(9) == 8)},
        "delta's row_offsets run from 0 to 5 over 8 rows, need 0 to 4 over 8",
    ),
    "offsets-fall": (
        good, {"row_offsets": torch.tensor([0, 2, 1, 3, 3, 3, 3, 3, 4])},
        "delta's row_offsets fall from 2 to 1 after row 1, need them ascending",
    ),
    "device": (
        good, {"columns": good.columns.to("meta")}, "delta's columns is on meta, need cpu as in x"
    ),
}  # fmt: skip


@pytest.mark.parametrize("delta, change, message", BAD.values(), ids=BAD)
def test_a_delta_that_does_not_fit(delta, change, message):
    width = 70_000 if delta.in_features == 70_000 else 16
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.fused_linear(torch.zeros(5, width), torch.zeros(8, width),
                         delta=replace(delta, **change))  # fmt: skip
    assert str(refusal.value).startswith("fused_linear: ")


FLAT = {
    "twice": ([3, 5, 3], 3, "place 3 is there twice, need each once"),
    "past-the-last": ([3, 128], 2, "place 128, need 0 <= place < O * I = 128"),
    "negative": ([3, -1], 2, "place -1, need 0 <= place < O * I = 128"),
    "values": ([3, 5], 3, "places has shape (2,) and values (3,), need (N,) for both"),
}


@pytest.mark.parametrize("places, n, message", FLAT.values(), ids=FLAT)
def test_flat_places_that_do_not_fit(places, n, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        WeightDelta.from_flat(torch.tensor(places), torch.ones(n), 8, 16)
    assert str(refusal.value).startswith("WeightDelta: ")


SAMPLED = {
    "x-width": ((torch.zeros(5, 8), x[:, :15]), "x has shape (5, 15), need a last axis of I = 16"),
    "dy-width": ((torch.zeros(5, 9), x), "dy has shape (5, 9), need a last axis of O = 8 as in"),
    "tokens": ((torch.zeros(4, 8), x), "dy has shape (4, 8), need (5,) as in x before the last"),
    "dtypes": ((torch.zeros(5, 8).half(), x), "x is torch.float32, need torch.float16 as in dy"),
}


@pytest.mark.parametrize("given, message", SAMPLED.values(), ids=SAMPLED)
def test_sampled_products_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        ops.sampled_product(*given, good)
    assert str(refusal.value).startswith("sampled_product: ")


def test_flat_places_in_any_order():
    values = torch.arange(4.0)
    delta = WeightDelta.from_flat(torch.tensor([127, 5, 18, 3]), values, 8, 16)
    assert torch.equal(delta.places(), good.places()) and delta.nnz == 4
    assert delta.values.tolist() == [3.0, 1.0, 2.0, 0.0]
    assert delta.dense()[7, 15] == 0.0 and delta.dense()[1, 2] == 2.0
    assert delta.nbytes == 9 * 8 + 4 * 2 + 4 * 4


def test_places_past_31_bits():
    """O I is 2**33: only places are of 64 bits."""
    n_out, n_in = 2**17, 2**16
    places = torch.tensor([2**31 - 1, 2**31, 2**33 - 1])
    delta = WeightDelta.from_flat(places, torch.ones(3), n_out, n_in)
    delta.expect_whole("test")
    assert torch.equal(delta.places(), places)


def test_implementations_without_deltas_say_so():
    message = "cannot run: (tensors are on cpu|no sparse delta yet).* Here: cpp_cpu, reference"
    for name in ("triton_gpu", "cuda_hopper"):
        with pytest.raises(RuntimeError, match=message):
            ops.fused_linear(x, weight, delta=good, impl=name)
