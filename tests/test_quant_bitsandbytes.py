"""Flat blocks and state dicts of bitsandbytes, bit for bit, against files that it wrote and, where
it is installed, against itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tilewright
from tilewright import FP4, NF4
from tilewright.ops.quant import blockwise, reference

GOLDEN = Path(__file__).parent / "goldens/quant_bitsandbytes.safetensors"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = {"nf4": NF4, "fp4": FP4}
NAMES = ("nf4-plain", "nf4-nested", "fp4-plain", "fp4-nested")


def bitwise(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def layer(golden, name):
    """What bitsandbytes would put into a state dict, and no more."""
    return {k: t for k, t in golden.items() if k.startswith(f"{name}.weight")}


# --- against stored files ---


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_layer_decodes_to_what_bitsandbytes_decodes(golden, name):
    packed = tilewright.read_bitsandbytes(layer(golden, name), name)
    assert (packed.nested is not None) == name.endswith("nested")
    decoded, truth = tilewright.dequantize_weight(packed), golden[f"{name}.decoded"]
    assert decoded.dtype == truth.dtype
    assert torch.equal(decoded, truth)  # not its bits: FP4's second zero is negative here


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_layer_goes_back_bit_for_bit(golden, name):
    stored = layer(golden, name)
    written = tilewright.to_bitsandbytes(tilewright.read_bitsandbytes(stored, name), name)
    assert written.keys() == stored.keys()
    for key, tensor in stored.items():
        bitwise(written[key], tensor)


@pytest.mark.parametrize("name", NAMES)
def test_quantizing_gives_the_stored_layer(golden, name):
    code, kind = name.split("-")
    format = FORMATS[code](32, double_quant=kind == "nested")
    packed = tilewright.quantize_weight(golden[f"{name}.original"], format)
    for key, tensor in tilewright.to_bitsandbytes(packed, name).items():
        bitwise(tensor, golden[key])


def test_flat_blocks_give_the_stored_ones(golden):
    original = golden["flat.original"]
    codes, absmax = tilewright.quantize_blockwise(original)
    bitwise(codes, golden["flat.codes"].flatten())
    bitwise(absmax, golden["flat.absmax"])
    bitwise(tilewright.dequantize_blockwise(codes, absmax, original.shape), golden["flat.decoded"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_offset_that_was_rounded_to_two_bytes_is_taken_as_it_is(golden, dtype):
    name = "nf4-nested"
    offset = torch.tensor(0.0437, dtype=dtype).item()
    stored = changed(golden, name, nested_offset=offset)
    packed = tilewright.read_bitsandbytes(stored, name)
    codes = blockwise.unpack(stored[f"{name}.weight"].flatten(), 65 * 128)
    second = stored[f"{name}.weight.nested_absmax"].repeat_interleave(256)[:260]
    table = stored[f"{name}.weight.nested_quant_map"]
    absmax = table[stored[f"{name}.weight.absmax"].long()] * second + offset
    levels = stored[f"{name}.weight.quant_map"][codes.long()]
    truth = (levels * absmax.repeat_interleave(32)).view(65, 128)
    assert torch.equal(tilewright.dequantize_weight(packed, torch.float32), truth)


# --- against bitsandbytes itself ---


@pytest.mark.parametrize("code", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_flat_blocks_are_those_of_bitsandbytes(bnb, code, block, dtype):
    for n in (1, 7, block - 1, block, block + 1, 7 * (block - 1), 9 * block):
        values = torch.randn(n).to(dtype)
        values[: n // 3] = 0
        values[-1] = 1e-30
        codes, absmax = tilewright.quantize_blockwise(values, format=code, block_size=block)
        theirs, state = bnb.quantize_4bit(values, blocksize=block, quant_type=code)
        bitwise(codes, theirs.flatten())
        bitwise(absmax, state.absmax)
        state.shape = torch.Size([1, n])  # an odd last axis makes it compile for each length
        for out in (torch.float32, dtype):
            mine = tilewright.dequantize_blockwise(
                codes, absmax, (n,), format=code, block_size=block, dtype=out
            )
            if n % 2 == 0:
                state.dtype = out
                assert torch.equal(mine, bnb.dequantize_4bit(theirs, state).flatten())


def test_nested_scales_are_those_of_bitsandbytes(bnb):
    bitwise(blockwise.dynamic_map(), bnb.create_dynamic_map())
    for n in (1, 255, 256, 257, 5000):
        for scales in (torch.rand(n) * 0.01 + 0.03, torch.randn(n).abs(), torch.full((n,), 0.25)):
            codes, nested = blockwise.quantize_scales(scales[None])
            theirs, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
            bitwise(codes[0], theirs)
            bitwise(nested.absmax, state.absmax)
            assert nested.offset == scales.mean().item()


SHAPES = {  # (outputs, inputs, block)
    "blocks-fill-rows": (33, 256, 64),
    "more-scales-than-a-nested-block": (300, 64, 64),
    "blocks-cross-rows": (7, 96, 64),
    "rows-shorter-than-a-block": (5, 24, 64),
    "short-last-block": (3, 200, 64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("code", FORMATS)
def test_layers_are_those_of_bitsandbytes(bnb, code, nested, shape):
    n_out, n_in, block = shape
    weight = torch.randn(n_out, n_in).to(torch.bfloat16)
    theirs, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=code
    )
    stored = {"a.weight": theirs}
    stored |= {f"a.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    packed = tilewright.read_bitsandbytes(stored, "a")
    # as one row: the AVX-512 path of 0.50 takes wrong scales where blocks cross rows
    state.shape = torch.Size([1, n_out * n_in])
    truth = bnb.dequantize_4bit(theirs, state).view(n_out, n_in)
    assert torch.equal(tilewright.dequantize_weight(packed), truth)
    if n_in % block == 0:
        mine = tilewright.quantize_weight(weight, FORMATS[code](block, nested))
        for written in (tilewright.to_bitsandbytes(p, "a") for p in (packed, mine)):
            assert written.keys() == stored.keys()
            for key, tensor in stored.items():
                bitwise(written[key], tensor)


# --- the meaning of flat blocks ---


@pytest.mark.parametrize("code", FORMATS)
@pytest.mark.parametrize("block", [32, 4096])
def test_flat_blocks_err_as_little_as_the_reference(code, block):
    values = torch.randn(3, 7 * (block - 1))
    codes, absmax = tilewright.quantize_blockwise(values, format=code, block_size=block)
    levels = reference.levels(code)
    best, largest = reference.blockwise(values, block, levels)
    assert torch.equal(absmax.double(), largest)
    error = values.double() - tilewright.dequantize_blockwise(
        codes, absmax, values.shape, format=code, block_size=block
    )
    spread = largest.repeat_interleave(block)[: values.numel()].view(values.shape)
    truth = values.double() - levels[best].view(values.shape) * spread
    assert (error.abs() - truth.abs()).max() <= 1e-6 * values.abs().max()


def test_nested_scales_are_near_the_nearest():
    scales = torch.rand(3, 200) * 0.01 + 0.03
    codes, nested = blockwise.quantize_scales(scales)
    found = nested.table[codes.long()].flatten().double()
    spread = nested.absmax.repeat_interleave(256)[:600].double()
    shifted = (scales - nested.offset).flatten().double()
    best, largest = reference.blockwise(shifted, 256, reference.dynamic_map())
    truth = reference.dynamic_map()[best] * spread
    # a value is looked up in one of 65535 steps of [-1, 1]
    slack = 2 / 65535 * spread
    assert ((found * spread - shifted).abs() - (truth - shifted).abs() <= slack).all()
    torch.testing.assert_close(nested.absmax.double(), largest, rtol=1e-6, atol=0)


def test_flat_blocks_of_nothing():
    codes, absmax = tilewright.quantize_blockwise(torch.zeros(0, 5))
    assert codes.shape == absmax.shape == (0,)
    assert tilewright.dequantize_blockwise(codes, absmax, (0, 5)).shape == (0, 5)


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("n", [1, 130])
def test_opcheck(n):
    values = torch.randn(n)
    ops = torch.ops.tilewright
    torch.library.opcheck(ops.quantize_blockwise.default, (values, "nf4", 64))
    codes, absmax = ops.quantize_blockwise(values, "nf4", 64)
    args = (codes, absmax, "nf4", 64, [n], torch.bfloat16)
    torch.library.opcheck(ops.dequantize_blockwise.default, args)


@pytest.mark.usefixtures("clean_memory")
def test_a_compiled_graph_holds_one_call():
    values = torch.randn(200)

    def both(values):
        codes, absmax = tilewright.quantize_blockwise(values)
        return tilewright.dequantize_blockwise(codes, absmax, values.shape)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert torch.equal(compiled(values), both(values))


# --- refusals ---


def changed(golden, name="nf4-nested", **state):
    """A stored layer with entries of its JSON changed, or a tensor left out or replaced."""
    stored = layer(golden, name)
    key = f"{name}.weight.quant_state.bitsandbytes__nf4"
    text = json.loads(bytes(stored[key].tolist())) | state
    stored[key] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    return stored


REFUSALS = {
    "blocks-cross-rows": (
        lambda g: changed(g, shape=[1664, 5], blocksize=64),
        "rows of 5, which blocks of 64 cross with 1 in common, need a multiple of 8; dequantize it",
    ),
    "axes": (lambda g: changed(g, shape=[65, 8, 16]), "has shape (65, 8, 16), need (O, I)"),
    "too-few-codes": (
        lambda g: changed(g, shape=[66, 128]),
        "nf4-nested.weight has 4160 entries, need 4224 for shape (66, 128)",
    ),
    "block-size": (lambda g: changed(g, blocksize=48), "block_size is 48, need one of 32, 64"),
    "dtype": (lambda g: changed(g, dtype="int8"), "has dtype int8, need a floating-point one"),
    "nested-dtype": (
        lambda g: changed(g, nested_dtype="float16"),
        "has nested_dtype float16, need float32",
    ),
    "no-shape": (lambda g: changed(g, shape=None), "holds no quant state (TypeError"),
    "no-absmax": (
        lambda g: {k: t for k, t in layer(g, "nf4-nested").items() if "absmax" not in k},
        "nf4-nested.weight.absmax is missing; of this layer there are: nf4-nested.weight, nf4-",
    ),
    "no-state": (
        lambda g: {k: t for k, t in layer(g, "nf4-nested").items() if "state" not in k},
        "0 of nf4-nested.weight.quant_state.bitsandbytes__nf4 and",
    ),
    "other-map": (
        lambda g: {**layer(g, "nf4-nested"), "nf4-nested.weight.quant_map": torch.arange(16.0)},
        "nf4-nested.weight.quant_map is [0.0, 1.0, 2.0",
    ),
}


@pytest.mark.parametrize("stored, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals_of_reading(golden, stored, message):
    with pytest.raises(ValueError) as refused:
        tilewright.read_bitsandbytes(stored(golden), "nf4-nested")
    assert message in str(refused.value) and str(refused.value).startswith("read_bitsandbytes: ")


def packed(format, n_in=128):
    return tilewright.quantize_weight(torch.randn(4, n_in), format)


OTHER_REFUSALS = {
    "to-int8": (
        lambda: tilewright.to_bitsandbytes(packed(tilewright.Int8())),
        "to_bitsandbytes: packed has format 'int8', need one of nf4, fp4",
    ),
    "to-group": (
        lambda: tilewright.to_bitsandbytes(packed(NF4(24), 96)),
        "to_bitsandbytes: packed has groups of 24 in rows of 96, need one of 32, 64, 128",
    ),
    "to-tail": (
        lambda: tilewright.to_bitsandbytes(packed(NF4(64), 100)),
        "to_bitsandbytes: packed has groups of 64 in rows of 100",
    ),
    "format": (
        lambda: tilewright.quantize_blockwise(torch.zeros(2), format="int4"),
        "quantize_blockwise: format is 'int4', need one of nf4, fp4",
    ),
    "block": (
        lambda: tilewright.quantize_blockwise(torch.zeros(2), block_size=16),
        "quantize_blockwise: block_size is 16, need one of 32, 64",
    ),
    "dtype": (
        lambda: tilewright.quantize_blockwise(torch.zeros(2, dtype=torch.int32)),
        "quantize_blockwise: values is torch.int32, need one of float32, float16, bfloat16",
    ),
    "codes-dtype": (
        lambda: tilewright.dequantize_blockwise(torch.zeros(1), torch.zeros(1), (2,)),
        "dequantize_blockwise: codes is torch.float32, need one of uint8",
    ),
    "codes": (
        lambda: tilewright.dequantize_blockwise(
            torch.zeros(2, dtype=torch.uint8), torch.zeros(1), (5,)
        ),
        "dequantize_blockwise: codes has 2 entries, need 3 for shape (5,)",
    ),
    "absmax": (
        lambda: tilewright.dequantize_blockwise(
            torch.zeros(50, dtype=torch.uint8), torch.zeros(1), (100,)
        ),
        "dequantize_blockwise: absmax has 1 entries, need 2 for shape (100,)",
    ),
    "out-dtype": (
        lambda: tilewright.dequantize_blockwise(
            torch.zeros(1, dtype=torch.uint8), torch.zeros(1), (2,), dtype=torch.float64
        ),
        "dequantize_blockwise: dtype is torch.float64, need one of",
    ),
}


@pytest.mark.parametrize("call, message", OTHER_REFUSALS.values(), ids=OTHER_REFUSALS)
def test_refusals_of_blocks_and_writing(call, message):
    with pytest.raises(ValueError) as refused:
        call()
    assert message in str(refused.value)
