"""Files of packed weights: round trip, and what happens to damaged ones and full disks."""

import json
import struct
from dataclasses import replace

import pytest
import torch

import tilewright
from tilewright import FP8, NF4, Int4, Int8
from tilewright.files import WriteError
from tilewright.ops.quant import saved

FORMATS = {
    "plain": Int8(),
    "two-bytes": Int4(32),
    "offsets": Int4(symmetric=False),
    "nested": NF4(double_quant=True),
    "eight-bit-floats": FP8("block"),
}


def packed_weights(n_in=130):
    made = {}
    for name, format in FORMATS.items():
        weight = (torch.randn(20, n_in) * 0.02).to(torch.bfloat16)
        made[f"model.{name}.weight"] = tilewright.quantize_weight(weight, format)
    order = torch.randperm(n_in).int()
    made["model.reordered.weight"] = replace(made["model.plain.weight"], input_order=order)
    made["model.tied.weight"] = made["model.plain.weight"]
    made["model.empty.weight"] = tilewright.quantize_weight(torch.zeros(0, n_in), Int4())
    return made


def same(a, b):
    fields = ("format", "shape", "group_size", "dtype")
    assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    if a.nested is not None:
        assert (a.nested.offset, a.nested.block) == (b.nested.offset, b.nested.block)


def test_what_is_saved_is_loaded(tmp_path):
    weights = packed_weights()
    tilewright.save_packed(tmp_path / "w.safetensors", weights, {"model": "a name"})
    loaded = tilewright.load_packed(tmp_path / "w.safetensors")
    assert loaded.metadata == {"model": "a name"}
    assert loaded.weights.keys() == weights.keys()
    for name, packed in weights.items():
        same(loaded.weights[name], packed)
        assert torch.equal(
            tilewright.dequantize_weight(loaded.weights[name]), tilewright.dequantize_weight(packed)
        )


def test_loading_to_a_device(tmp_path):
    tilewright.save_packed(tmp_path / "w.safetensors", packed_weights())
    loaded = tilewright.load_packed(tmp_path / "w.safetensors", device="meta")
    kinds = {t.device.type for w in loaded.weights.values() for t in w.tensors().values()}
    assert kinds == {"meta"}


def test_the_file_is_the_same_each_time(tmp_path):
    weights = packed_weights()
    for name in "abcdef":
        tilewright.save_packed(tmp_path / name, weights, {"x": "1", "y": "2"})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    tilewright.save_packed(path, packed_weights(64))
    before = path.read_bytes()

    def full(tensors, beside, metadata):
        beside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tilewright.files.save_file", full)
    with pytest.raises(WriteError, match=r"cannot write .*w.safetensors: No space left on device"):
        tilewright.save_packed(path, packed_weights())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}], ids=str)
def test_metadata_is_text(metadata, tmp_path):
    with pytest.raises(ValueError, match=r"save_packed: metadata has .*, need texts"):
        tilewright.save_packed(tmp_path / "w", packed_weights(8), metadata)
    assert not (tmp_path / "w").exists()


def test_truncated_files(tmp_path):
    path = tmp_path / "w.safetensors"
    tilewright.save_packed(path, packed_weights())
    whole = path.read_bytes()
    for n in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"w.safetensors is truncated or .*again"):
            tilewright.load_packed(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is truncated or damaged: its header describes"):
        tilewright.load_packed(path)


def test_an_absent_file(tmp_path):
    with pytest.raises(ValueError, match="none does not exist"):
        tilewright.load_packed(tmp_path / "none")


def rewritten(path, change):
    """The file with its safetensors header changed, and padded as the format wants."""
    whole = path.read_bytes()
    (n,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + n])
    ours = json.loads(header["__metadata__"][saved.HEADER])
    change(header, ours)
    if saved.HEADER in header["__metadata__"]:
        header["__metadata__"][saved.HEADER] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + n :])


def entry(**changes):
    return lambda header, ours: ours["weights"]["model.offsets.weight"].update(changes)


def without(part):
    def change(header, ours):
        # renamed, so that the bytes are still accounted for
        header["x"] = header.pop(f"model.offsets.weight.{part}")

    return change


def forget(header, ours):
    del ours["weights"]["model.offsets.weight"]


DAMAGES = {
    "no-header": (
        lambda header, ours: header["__metadata__"].clear(),
        "holds no packed weights (no tilewright.packed in its header)",
    ),
    "version": (
        lambda header, ours: ours.update(version=2), "has version 2, need 1; write it again",
    ),
    "metadata": (
        lambda header, ours: ours.update(metadata=[1]), "its header cannot be read: AttributeError",
    ),
    "no-weights": (lambda header, ours: ours.pop("weights"), "its header cannot be read: KeyError"),
    "no-format": (entry(format="int3"), "the entry of model.offsets.weight cannot be read: KeyErr"),
    "other-format": (
        entry(format="int8"),
        "model.offsets.weight.codes is torch.uint8 (2, 17, 64), need torch.uint8 (2, 33, 64)",
    ),
    "shape": (entry(shape=[20, 200]), "model.offsets.weight.codes is torch.uint8 (2, 17, 64)"),
    "negative": (entry(shape=[-1, 8]), "the entry of model.offsets.weight is impossible"),
    "dtype": (entry(dtype="int8"), "the entry of model.offsets.weight is impossible"),
    "no-dtype": (entry(dtype="float7"), "cannot be read: AttributeError"),
    "group": (entry(group_size=60), "has groups of 60, neither 8 k nor the row 130"),
    "group-count": (entry(group_size=32), "model.offsets.weight.scales is torch.float32 (2, 3,"),
    "no-codes": (without("codes"), "model.offsets.weight.codes is missing, need torch.uint8"),
    "foreign-tensor": (without("offsets"), "x belong to no weight"),
    "forgotten": (forget, "model.offsets.weight.codes, model.offsets.weight.offsets, model.off"),
    "wrong-type": (
        lambda header, ours: header["model.plain.weight.codes"].update(dtype="I8"),
        "model.plain.weight.codes is torch.int8 (2, 33, 64), need torch.uint8 (2, 33, 64)",
    ),
    "wrong-extent": (
        lambda header, ours: header["model.plain.weight.codes"].update(shape=[1, 1]),
        "is damaged, though of the right length",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", DAMAGES.values(), ids=DAMAGES)
def test_damaged_headers(change, message, tmp_path):
    path = tmp_path / "w.safetensors"
    tilewright.save_packed(path, packed_weights())
    rewritten(path, change)
    with pytest.raises(ValueError) as refused:
        tilewright.load_packed(path)
    assert message in str(refused.value) and "w.safetensors" in str(refused.value)


def test_an_input_order_that_is_none(tmp_path):
    weights = packed_weights()
    order = torch.zeros(130, dtype=torch.int32)
    weights["a"] = replace(weights["model.plain.weight"], input_order=order)
    tilewright.save_packed(tmp_path / "w", weights)
    with pytest.raises(ValueError, match=r"a.input_order does not name each of 130 inputs once"):
        tilewright.load_packed(tmp_path / "w")
