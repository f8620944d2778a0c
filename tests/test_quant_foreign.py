"""GPTQ, AWQ, compressed-tensors and GGUF, against files that their own tools wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tilewright
from tilewright.ops.common.packed import unpack_codes
from tilewright.ops.quant import gguf as gguf_reader

GOLDENS = Path(__file__).parent / "goldens"
GGUF = GOLDENS / "quant.gguf"


def part(stored, name):
    return {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def gptq():
    return load_file(GOLDENS / "quant_gptq.safetensors")


@pytest.fixture(scope="module")
def awq():
    return load_file(GOLDENS / "quant_awq.safetensors")


@pytest.fixture(scope="module")
def compressed():
    return load_file(GOLDENS / "quant_compressed_tensors.safetensors")


def decoded(packed, dtype=torch.float32):
    return tilewright.dequantize_weight(packed, dtype)


def assert_same(packed, truth):
    """Equal up to the last place of float32, in which scale * code and scale * zero are summed."""
    slack = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    torch.testing.assert_close(decoded(packed), truth.float(), rtol=0, atol=slack)


# --- GPTQ ---


@pytest.mark.parametrize("name", ["sym", "asym", "act-order", "8-bit"])
def test_gptq_decodes_to_what_its_tool_decodes(gptq, name):
    packed = tilewright.read_gptq(gptq, name)
    assert_same(packed, gptq[f"{name}.decoded"])
    assert packed.dtype == torch.float16 and packed.group_size == 32
    assert packed.format == {"sym": "int4", "8-bit": "int8"}.get(name, "uint4")
    assert (packed.offsets is None) == (name in ("sym", "8-bit"))
    assert (packed.input_order is not None) == (name == "act-order")


def test_gptq_without_g_idx_has_groups_in_order(gptq):
    tensors = part(gptq, "asym")
    with_order = decoded(tilewright.read_gptq(tensors))
    del tensors["g_idx"]
    assert torch.equal(decoded(tilewright.read_gptq(tensors)), with_order)


@pytest.mark.parametrize("name", ["sym", "asym", "act-order", "8-bit"])
def test_both_versions_of_gptq_zero_points_are_told_apart(gptq, name):
    first = part(gptq, name)
    # version 2, as GPTQModel converts: 1 more in each field of the words
    ones = 0x01010101 if name == "8-bit" else 0x11111111
    second = {**first, "qzeros": first["qzeros"] + ones}
    for version, tensors in ((1, first), (2, second)):
        found = decoded(tilewright.read_gptq(tensors))
        assert torch.equal(found, decoded(tilewright.read_gptq(tensors, version=version)))
        assert_same(tilewright.read_gptq(tensors), first["decoded"])
    wrong = decoded(tilewright.read_gptq(first, version=2))
    assert (wrong - first["decoded"]).abs().max() > 0.5 * first["scales"].min()


def test_gptq_zero_points_that_cannot_be_told_are_refused(gptq):
    tensors = part(gptq, "asym")
    # codes of 15 alone lie far above any zero point in the middle
    tensors["qweight"] = torch.full_like(tensors["qweight"], -1)
    with pytest.raises(ValueError, match=r"codes lie \d+\.\d\d above them on average.*version=1"):
        tilewright.read_gptq(tensors, "")
    assert decoded(tilewright.read_gptq(tensors, version=2)).isfinite().all()


def test_gptq_codes_are_those_of_a_plain_loop(gptq):
    tensors = part(gptq, "asym")
    packed = tilewright.read_gptq(tensors)
    codes = unpack_codes(packed.codes, "uint4", *packed.shape)
    for o, i in ((0, 0), (3, 7), (31, 127), (5, 64), (16, 9)):
        word = int(tensors["qweight"][i // 8, o]) & 0xFFFFFFFF
        assert codes[o, i] == word >> 4 * (i % 8) & 15


def test_gptq_of_8_bits_with_zero_points_off_the_middle(gptq):
    tensors = part(gptq, "8-bit")
    zeros = torch.randint(100, 156, (4, 32))
    by_four = zeros.view(4, 8, 4).to(torch.int64)
    packed_zeros = sum(by_four[..., i] << 8 * i for i in range(4))
    tensors["qzeros"] = torch.where(packed_zeros >= 2**31, packed_zeros - 2**32, packed_zeros).to(
        torch.int32
    )
    codes = torch.stack([tensors["qweight"][i // 4] >> 8 * (i % 4) & 255 for i in range(128)], 1)
    group = torch.arange(128) // 32
    truth = (codes - zeros.t()[:, group]) * tensors["scales"].t().float()[:, group]
    packed = tilewright.read_gptq(tensors, version=2)
    assert packed.format == "int8" and packed.offsets is not None
    assert_same(packed, truth)


# --- AWQ ---


def test_awq_decodes_to_what_its_tool_decodes(awq):
    packed = tilewright.read_awq(awq, "layer")
    assert torch.equal(decoded(packed, torch.float16), awq["layer.decoded"])
    assert packed.format == "uint4" and packed.group_size == 32


def test_awq_codes_are_those_of_a_plain_loop(awq):
    packed = tilewright.read_awq(awq, "layer")
    codes = unpack_codes(packed.codes, "uint4", *packed.shape)
    nibble = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # output -> its place in the word
    for o, i in ((0, 0), (1, 0), (2, 5), (31, 127), (12, 64)):
        word = int(awq["layer.qweight"][i, o // 8]) & 0xFFFFFFFF
        assert codes[o, i] == word >> 4 * nibble[o % 8] & 15


# --- compressed-tensors ---


@pytest.mark.parametrize("name", ["sym", "asym", "row", "8-bit"])
def test_compressed_tensors_decode_to_what_their_tool_decodes(compressed, name):
    packed = tilewright.read_compressed_tensors(compressed, name)
    truth = compressed[f"{name}.decoded"]
    assert torch.equal(decoded(packed, truth.dtype), truth)
    assert packed.dtype == torch.bfloat16
    assert packed.format == {"asym": "uint4", "8-bit": "int8"}.get(name, "int4")
    assert packed.group_size == (83 if name == "row" else 32)


def test_compressed_tensors_with_reordered_inputs(compressed):
    tensors = part(compressed, "asym")
    plain = decoded(tilewright.read_compressed_tensors(tensors))
    assert torch.equal(
        decoded(tilewright.read_compressed_tensors(
            {**tensors, "weight_g_idx": torch.full((96,), -1)}  # the mark of none
        )), plain,
    )  # fmt: skip
    g_idx = (torch.arange(96) // 32)[torch.randperm(96)]
    packed = tilewright.read_compressed_tensors({**tensors, "weight_g_idx": g_idx.int()})
    from_words = torch.stack(
        [tensors["weight_packed"][:, i // 8] >> 4 * (i % 8) & 15 for i in range(96)], 1
    )
    zeros = torch.stack(
        [tensors["weight_zero_point"][o // 8] >> 4 * (o % 8) & 15 for o in range(12)]
    )
    truth = (from_words - zeros[:, g_idx]) * tensors["weight_scale"].float()[:, g_idx]
    assert_same(packed, truth)


# --- GGUF ---


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


def test_gguf_decodes_to_what_its_package_decodes(gguf):
    tensors = tilewright.read_gguf(GGUF)
    truth = load_file(GOLDENS / "quant_gguf.safetensors")
    assert tensors.keys() == truth.keys()
    assert torch.equal(tensors["norm"], truth["norm"])
    for name in ("Q4_0", "Q8_0"):
        assert torch.equal(decoded(tensors[name]), truth[name])
        assert tensors[name].scales.dtype == torch.float16
    assert_same(tensors["Q4_K"], truth["Q4_K"])
    formats = {n: p.format for n, p in tensors.items() if n != "norm"}
    assert formats == {"Q4_0": "int4", "Q8_0": "int8", "Q4_K": "uint4"}


def test_a_gguf_weight_takes_the_bits_that_the_docstring_says(gguf):
    tensors = tilewright.read_gguf(GGUF, ["Q4_K"])
    packed = tensors["Q4_K"]
    padded = 16 * packed.in_features  # rows in whole lines
    assert tensors.keys() == {"Q4_K"} and 8 * packed.nbytes / padded == 6.0


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf_matrices_that_its_package_quantizes_now(gguf, kind, tmp_path):
    import numpy as np

    kind = gguf.GGMLQuantizationType[kind]
    weight = torch.randn(83, 96) * torch.tensor([[1e-3], [1.0], [30.0]]).repeat(28, 1)[:83]
    weight[5] = 0
    data = gguf.quantize(weight.numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.add_tensor("half", np.arange(6, dtype=np.float16).reshape(2, 3))
    bits = torch.randn(4, 8).to(torch.bfloat16)
    writer.add_tensor(
        "brain", bits.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = tilewright.read_gguf(tmp_path / "a.gguf")
    assert torch.equal(decoded(found["w"]), torch.from_numpy(gguf.dequantize(data, kind)))
    assert torch.equal(found["half"], torch.arange(6.0).half().view(2, 3))
    assert torch.equal(found["brain"], bits)


def test_random_q4_k_blocks(gguf):
    raw = torch.randint(0, 256, (7, 3 * 144), dtype=torch.uint8)
    halves = (torch.rand(7, 3, 2) * 0.1).half().view(torch.uint8)
    raw.view(7, 3, 144)[..., :4] = halves
    format, codes, scales, offsets = gguf_reader._q4_k(raw)
    codes, of_code = (
        codes.reshape(7, -1, 32).float(),
        [t.reshape(7, -1, 1) for t in (scales, offsets)],
    )
    truth = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType.Q4_K)
    assert format == "uint4"
    assert torch.equal((codes * of_code[0] + of_code[1]).view(7, -1), torch.from_numpy(truth))


# --- refusals ---

READERS = {
    "gptq": (tilewright.read_gptq, "sym"),
    "awq": (tilewright.read_awq, "layer"),
    "compressed": (tilewright.read_compressed_tensors, "asym"),
}
REFUSALS = {
    "gptq-missing": ("gptq", {"qzeros": None}, "sym.qzeros is missing; of this layer there are: "),
    "gptq-words": (
        "gptq", {"qweight": torch.zeros(16, 31, dtype=torch.int32)},
        "sym.qweight is torch.int32 (16, 31), need int32 (I 4 / 32, 32)",
    ),
    "gptq-zeros": (
        "gptq", {"qzeros": torch.zeros(4, 3, dtype=torch.int32)},
        "sym.qzeros has shape (4, 3), need (4, O / 8) or (4, O / 4) with O = 32",
    ),
    "gptq-groups": (
        "gptq", {"g_idx": torch.zeros(128, dtype=torch.int32)},
        "sym.g_idx puts [128, 0, 0, 0] of 128 inputs into 4 groups, need 32 in each",
    ),
    "gptq-scales": ("gptq", {"scales": torch.zeros(4)}, "sym.scales has shape (4,), need two axes"),
    "gptq-scale-dtype": (
        "gptq", {"scales": torch.zeros(4, 32, dtype=torch.int8)},
        "scales of sym are torch.int8, need floats",
    ),
    "awq-words": (
        "awq", {"qweight": torch.zeros(128, 3, dtype=torch.int32)},
        "layer.qweight is torch.int32 (128, 3), need int32 (128, O / 8) with O = 32",
    ),
    "awq-zeros": (
        "awq", {"qzeros": torch.zeros(4, 4)},
        "layer.qzeros is torch.float32 (4, 4), need int32 (4, O / 8)",
    ),
    "awq-groups": (
        "awq", {"qweight": torch.zeros(120, 4, dtype=torch.int32)},
        "layer has 4 groups of 120 inputs, need groups of a multiple of 8, or one",
    ),
    "compressed-words": (
        "compressed", {"weight_packed": torch.zeros(12, 11, dtype=torch.int32)},
        "asym.weight_packed is torch.int32 (12, 11) and weight_scale (12, 3), need int32 (12, 12)",
    ),
    "compressed-shape": (
        "compressed", {"weight_shape": torch.tensor([12, 96, 1])},
        "asym.weight_shape is [12, 96, 1], need [O, I]",
    ),
    "compressed-zeros": (
        "compressed", {"weight_zero_point": torch.zeros(12, 3, dtype=torch.int32)},
        "asym.weight_zero_point is torch.int32 (12, 3), need int32 (2, 3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind, change, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(kind, change, message, request):
    reader, name = READERS[kind]
    tensors = dict(request.getfixturevalue(kind))
    for key, tensor in change.items():
        tensors[f"{name}.{key}"] = tensor
        if tensor is None:
            del tensors[f"{name}.{key}"]
    with pytest.raises(ValueError) as refused:
        reader(tensors, name)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{reader.__name__}: ")


def test_gptq_version_is_1_or_2(gptq):
    with pytest.raises(ValueError, match="read_gptq: version is 3, need 1, 2 or None"):
        tilewright.read_gptq(gptq, "sym", version=3)


def test_gguf_refusals(gguf, tmp_path):
    with pytest.raises(ValueError, match=r"read_gguf: .*absent.gguf does not exist"):
        tilewright.read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match=r"has no tensor head; it has Q4_0, Q8_0"):
        tilewright.read_gguf(GGUF, ["head"])
    whole = GGUF.read_bytes()
    broken = tmp_path / "broken.gguf"
    for n in (0, 3, 4, 20, 100, len(whole) - 100, len(whole) - 1000):
        broken.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="is truncated, damaged or no GGUF file"):
            tilewright.read_gguf(broken)
    broken.write_bytes(b"no gguf at all, but some text")
    with pytest.raises(ValueError, match="is truncated, damaged or no GGUF file"):
        tilewright.read_gguf(broken)


def test_gguf_types_and_shapes_that_cannot_be_read(gguf, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for kind, shape in (("Q5_0", (2, 64)), ("Q8_0", (2, 3, 32))):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind.name, gguf.quantize(torch.randn(shape).numpy(), kind),
                          raw_dtype=kind)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"Q5_0 of .* is Q5_0, need one of Q4_0, Q8_0, Q4_K, F32"):
        tilewright.read_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"Q8_0 of .* has shape \(2, 3, 32\), need \(O, I\)"):
        tilewright.read_gguf(tmp_path / "a.gguf", ["Q8_0"])


def test_gguf_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the package gguf; pip install"):
        tilewright.read_gguf(GGUF)
