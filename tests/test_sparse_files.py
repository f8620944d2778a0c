"""Deltas merged into weights and taken out again; deltas in files."""

import json
import re
from dataclasses import replace

import pytest
import torch
from linear_inputs import random_packed
from safetensors.torch import load_file, save_file

from tilewright import ops
from tilewright.files import InputError
from tilewright.ops import WeightDelta
from tilewright.ops.sparse import saved

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def random_delta(n_out=30, n_in=40, n=100, kind=torch.float32) -> WeightDelta:
    places = torch.randperm(n_out * n_in)[:n]
    return WeightDelta.from_flat(places, torch.randn(n).to(kind), n_out, n_in)


def bits(t):
    return t.contiguous().view(torch.uint8)


@by_dtype
def test_merging_rounds_once_and_unmerging_gives_the_old_bits(dtype):
    """Subtracting would not: most sums are rounded, and -0, NaN and infinity have no way back."""
    weight = torch.randn(30, 40).to(dtype)
    delta = random_delta(kind=torch.bfloat16)
    rows, columns = delta.rows(), delta.wide_columns()
    weight[rows[:4], columns[:4]] = torch.tensor([-0.0, float("inf"), float("nan"), 1e30]).to(dtype)
    before = weight.clone()
    kept = ops.merge_delta(weight, delta)
    merged = before.double() + delta.dense().double()
    assert torch.equal(weight.nan_to_num(7.0), merged.to(dtype).nan_to_num(7.0))
    subtracted = weight - delta.dense().to(dtype)
    assert not torch.equal(bits(subtracted), bits(before))
    ops.unmerge_delta(weight, delta, kept)
    assert torch.equal(bits(weight), bits(before))


def test_merging_into_a_parameter_and_nothing():
    weight = torch.nn.Parameter(torch.randn(30, 40))
    before = weight.detach().clone()
    empty = random_delta(n=0)
    assert ops.merge_delta(weight, empty).shape == (0,) and torch.equal(weight, before)
    delta = random_delta()
    kept = ops.merge_delta(weight, delta)
    assert weight.requires_grad and torch.equal(weight, before + delta.dense())
    ops.unmerge_delta(weight, delta, kept)
    assert torch.equal(weight, before)


def test_refusals_of_merging():
    delta, weight = random_delta(), torch.zeros(30, 40)
    for call, message in (
        (
            lambda: ops.merge_delta(random_packed("nf4", 30, 40, 8), delta),
            "weight is packed in nf4",
        ),
        (lambda: ops.merge_delta(weight.T, delta), "weight has shape (40, 30), need (30, 40)"),
        (lambda: ops.merge_delta(torch.zeros(40, 30).T, delta), "weight is not contiguous"),
        (
            lambda: ops.unmerge_delta(weight, delta, torch.zeros(99)),
            "kept is torch.float32 of shape",
        ),
        (
            lambda: ops.unmerge_delta(weight, delta, torch.zeros(100).half()),
            "kept is torch.float16",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


# --- files ---


@pytest.mark.parametrize("n", [0, 1, 3, 12, 60, 240, 1200])
def test_places_survive_their_coding(n):
    places = torch.randperm(1200)[:n].sort().values
    for size in (1200, 10**6):  # units of 8 bits, and of 16
        units = saved.encode_places(places, size)
        assert torch.equal(saved.decode_places(units), places)


def test_steps_at_the_ends_of_a_unit():
    for most, size in ((255, 10), (65_535, 10**9)):
        steps = torch.tensor([0, 1, most - 1, most, most + 1, 2 * most, 2 * most + 1, 0, 5 * most])
        places = (steps + 1).cumsum(0) - 1
        units = saved.encode_places(places, size)
        assert torch.iinfo(units.dtype).max == most
        assert len(units) == sum(s // most + 1 for s in steps.tolist())
        assert torch.equal(saved.decode_places(units), places)


def test_a_place_takes_about_a_byte_at_one_percent():
    places = torch.randperm(10**6)[: 10**4].sort().values
    units = saved.encode_places(places, 10**6)
    assert units.dtype == torch.uint8 and units.nbytes < 1.1 * len(places)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_saved_deltas_come_back_bit_for_bit(tmp_path, kind):
    deltas = {
        "a.weight": random_delta(kind=kind),
        "b.weight": random_delta(2, 70_000, 5, kind),
        "empty.weight": random_delta(n=0, kind=kind),
        "full.weight": random_delta(5, 7, 35, kind),
    }
    path = tmp_path / "deltas.safetensors"
    ops.save_deltas(path, deltas, {"base": "somewhere"})
    first = path.read_bytes()
    ops.save_deltas(path, deltas, {"base": "somewhere"})
    assert path.read_bytes() == first
    found = ops.load_deltas(path)
    assert found.metadata == {"base": "somewhere"} and list(found.deltas) == list(deltas)
    for name, delta in deltas.items():
        again = found.deltas[name]
        assert again.shape == delta.shape and again.columns.dtype == delta.columns.dtype
        assert torch.equal(again.places(), delta.places())
        assert torch.equal(bits(again.values), bits(delta.values))


def rewritten(path, change):
    """The file again, after `change(tensors, header)`."""
    tensors = load_file(path)
    header = {"version": 1, "deltas": {"a": [30, 40]}, "metadata": {}}
    change(tensors, header)
    save_file(tensors, path, metadata={"tilewright.deltas": json.dumps(header)})


DAMAGE = {
    "version": (lambda t, h: h.update(version=2), "has version 2, need 1"),
    "shapes": (lambda t, h: h.update(deltas={"a": [30]}), "its header cannot be read"),
    "no-values": (lambda t, h: t.pop("a.values"), "a has no values"),
    "no-steps": (lambda t, h: t.pop("a.steps"), "a has no steps"),
    "more": (lambda t, h: t.update(b=torch.zeros(1)), "its header does not tell of b"),
    "values-dtype": (
        lambda t, h: t.update({"a.values": t["a.values"].half()}), "a.values is torch.float16"
    ),
    "steps-dtype": (
        lambda t, h: t.update({"a.steps": t["a.steps"].int()}), "a.steps is torch.int32"
    ),
    "too-few": (
        lambda t, h: t.update({"a.steps": t["a.steps"][:-3]}), "a has 97 places and 100 values"
    ),
    "past-the-last": (
        lambda t, h: h.update(deltas={"a": [3, 4]}), "need 0 <= place < O * I = 12"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "deltas.safetensors"
    ops.save_deltas(path, {"a": random_delta()})
    rewritten(path, change)
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        ops.load_deltas(path)
    assert str(refusal.value).startswith(f"load_deltas: {path}")


def test_files_that_hold_no_deltas(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="holds no deltas"):
        ops.load_deltas(path)
    with pytest.raises(InputError, match="does not exist"):
        ops.load_deltas(tmp_path / "nothing")
    ops.save_deltas(path, {"a": random_delta()})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated or damaged"):
        ops.load_deltas(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deltas.safetensors"
    ops.save_deltas(path, {"a": random_delta()})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="metadata has 'n': 3, need texts by name"):
        ops.save_deltas(path, {"a": random_delta()}, {"n": 3})
    assert path.read_bytes() == before


@pytest.mark.parametrize("block", [(1, 8), (16, 16), (4, 2)], ids=str)
def test_blocks_stay_blocks(tmp_path, block):
    """In any order, as entries for all that reads them, and in a file with a place a block."""
    n_out, n_in = 64, 96
    rows, columns = block
    there = torch.randperm(n_out * n_in // (rows * columns))[:7]
    values = torch.randn(7, rows, columns)
    delta = ops.WeightDelta.from_blocks(there, values, n_out, n_in, block)
    delta.expect_whole("test")
    dense = torch.zeros(n_out, n_in)
    for b, of_block in zip(there.tolist(), values, strict=True):
        o, i = b // (n_in // columns) * rows, b % (n_in // columns) * columns
        dense[o : o + rows, i : i + columns] = of_block
    assert torch.equal(delta.dense(), dense) and delta.nnz == 7 * rows * columns
    x, weight = torch.randn(5, n_in), torch.randn(n_out, n_in)
    y = ops.fused_linear(x, weight, delta=delta)
    assert torch.allclose(y, x @ (weight + dense).T, atol=1e-4)
    path = tmp_path / "blocks.safetensors"
    ops.save_deltas(path, {"w": delta, "v": delta.with_values(2 * delta.values)})
    back = ops.load_deltas(path).deltas
    for name, wanted in (("w", dense), ("v", 2 * dense)):
        assert back[name].block == block and torch.equal(back[name].dense(), wanted)
    assert torch.equal(back["w"].blocks()[0], there.sort().values)
    n_steps = len(saved.encode_places(there.sort().values, n_out * n_in // (rows * columns)))
    assert len(load_file(path)["w.steps"]) == n_steps


def test_a_block_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"blocks are \(3, 8\), need divisors of \(O, I\) = \(64, 96\)"
    ):
        ops.WeightDelta.from_blocks(torch.zeros(1), torch.zeros(1, 3, 8), 64, 96, (3, 8))
    delta = ops.WeightDelta.from_flat(torch.arange(8) * 9, torch.ones(8), 64, 96)
    with pytest.raises(ValueError, match=r"a block of \(1, 8\) is not whole"):
        ops.save_deltas(tmp_path / "b.safetensors", {"w": replace(delta, block=(1, 8))})
