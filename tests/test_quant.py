"""Quantizing weights and activations: codes, scales, error, odd shapes and values."""

import copy
import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright
from tilewright import FP4, FP8, MXFP4, NF4, Int4, Int8
from tilewright.ops.common.packed import FORMATS, group_scales, unpack_codes, unpack_rows
from tilewright.ops.quant import blockwise, packing, reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QUANT = {
    "int8": Int8(),
    "int8-64": Int8(64),
    "int4": Int4(),
    "int4-minmax": Int4(solver="minmax"),
    "int4-32": Int4(32),
    "int4-row": Int4(None),
    "int4-asymmetric": Int4(symmetric=False),
    "int4-asymmetric-minmax": Int4(24, symmetric=False, solver="minmax"),
    "nf4": NF4(),
    "nf4-double": NF4(double_quant=True),
    "nf4-row": NF4(None),
    "fp4": FP4(128),
    "fp8": FP8(),
    "fp8-tensor": FP8("tensor"),
    "fp8-block": FP8("block"),
    "mxfp4": MXFP4(),
}
SHAPES = {
    "no-rows": (0, 40),
    "no-inputs": (5, 0),
    "one-of-everything": (1, 1),
    "two-rows-short-tail": (2, 83),
    "two-inputs": (83, 2),
    "nothing-divides-a-line": (17, 131),
    "groups-fill-rows": (16, 128),
    "more-than-one-chunk": (190, 2880),
}
formats = pytest.mark.parametrize("format", QUANT.values(), ids=QUANT)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def weights(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * 0.02).to(dtype)


def heavy_tailed(*shape):
    return torch.distributions.StudentT(3.0).sample(shape) * 0.01


def rms_error(weight, format):
    packed = tilewright.quantize_weight(weight, format)
    return tilewright.error_statistics(weight, packed).rms_relative_error


def parts(packed):
    """What the reference takes: codes, scales and offsets (O, G) in float64."""
    n_out, n_in = packed.shape
    codes = unpack_codes(packed.codes, packed.format, n_out, n_in)
    offsets = None if packed.offsets is None else unpack_rows(packed.offsets, n_out).double()
    return codes, group_scales(packed).double(), offsets


# --- tables ---


@pytest.mark.parametrize("code", FORMATS)
def test_the_levels_of_a_format_follow_its_formula(code):
    levels = reference.levels(code)
    if FORMATS[code].table is not None:
        table = torch.tensor(FORMATS[code].table, dtype=torch.float64)
        torch.testing.assert_close(table, levels, rtol=0, atol=2.0**-24)
        return
    kind = torch.int8 if code == "int8" else torch.float8_e4m3fn
    values = torch.arange(256, dtype=torch.uint8).view(kind).double()
    torch.testing.assert_close(values, levels, rtol=0, atol=0, equal_nan=True)


def test_the_dynamic_map_follows_its_formula():
    table = blockwise.dynamic_map()
    assert len(table.unique()) == 256 and table.min() > -1 and table.max() == 1
    torch.testing.assert_close(table.double(), reference.dynamic_map(), rtol=2e-7, atol=0)


# --- codes and scales ---


@formats
@shapes
def test_shapes_dtypes_and_padding(format, shape):
    for dtype in FLOATS if shape[0] < 100 else (torch.bfloat16,):
        check_shape_and_padding(format, shape, dtype)


def check_shape_and_padding(format, shape, dtype):
    weight = weights(*shape, dtype=dtype)
    packed = tilewright.quantize_weight(weight, format)
    assert packed.shape == shape and packed.dtype == dtype
    back = tilewright.dequantize_weight(packed)
    assert back.shape == shape and back.dtype == dtype and back.isfinite().all()
    n_lines, beyond = packed.codes.shape[1], unpack_codes(packed.codes, packed.format, 2**30, 2**30)
    assert beyond.shape[1] - shape[1] < 8 if n_lines else beyond.shape[1] == 0
    assert not beyond[shape[0] :].any() and not beyond[:, shape[1] :].any()
    assert not unpack_rows(packed.scales, 2**30)[shape[0] :].any()


@formats
@pytest.mark.parametrize("draw", [weights, heavy_tailed])
def test_every_code_is_the_nearest_one(format, draw):
    weight = draw(17, 131)
    packed = tilewright.quantize_weight(weight, format)
    _, scales, offsets = parts(packed)
    levels = reference.levels(packed.format)
    if packed.format == "int8":
        levels = levels[levels >= -127]
    best = reference.nearest(weight, scales, offsets, packed.group_size, levels)
    error = (tilewright.dequantize_weight(packed, torch.float32) - weight.double()).abs()
    slack = 4 * torch.finfo(torch.float32).eps * weight.abs().max()
    if packed.nested is not None:  # codes are those of the scales before they were rounded
        slack = 0.02 * weight.abs().max()
    assert (error - best).max() <= slack


@formats
@pytest.mark.parametrize("shape", [(17, 131), (5, 48)])
def test_decoding_is_the_formula(format, shape):
    packed = tilewright.quantize_weight(weights(*shape), format)
    codes, scales, offsets = parts(packed)
    values = reference.levels(packed.format)[codes.long()]
    truth = reference.dequantize(values, scales, offsets, packed.group_size)
    back = tilewright.dequantize_weight(packed, torch.float32).double()
    slack = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    torch.testing.assert_close(back, truth, rtol=0, atol=slack)


@pytest.mark.parametrize(
    "format, largest",
    [(Int8(), 127), (Int8(64), 127), (NF4(), 1), (FP4(128), 1), (FP8(), 448),
     (Int4(solver="minmax"), 7.5)],
    ids=str,
)  # fmt: skip
def test_the_scale_is_absmax_over_the_largest_code(format, largest):
    weight = weights(17, 131)
    packed = tilewright.quantize_weight(weight, format)
    expected = reference.absmax(weight, packed.group_size) / largest
    torch.testing.assert_close(group_scales(packed).double(), expected, rtol=1e-7, atol=0)


def test_minmax_offsets_span_the_group_and_hold_zero_exactly():
    weight = weights(17, 131)
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()  # zero lies at an end
    packed = tilewright.quantize_weight(weight, Int4(64, symmetric=False, solver="minmax"))
    scales, offsets = group_scales(packed), unpack_rows(packed.offsets, 17)
    for g in range(3):
        part = weight[:, 64 * g : 64 * g + 64].double()
        span = part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        torch.testing.assert_close(scales[:, g].double(), span / 15, rtol=1e-6, atol=0)
    zeros = -offsets.double() / scales.double()
    torch.testing.assert_close(zeros, zeros.round(), rtol=0, atol=1e-5)
    assert zeros[0].round().tolist() == [0, 0, 0] and zeros[1].round().tolist() == [15, 15, 15]


@pytest.mark.parametrize("draw", [weights, heavy_tailed])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_the_error_is_least_at_the_scale_that_is_found(draw, group_size):
    weight = draw(40, 1024)
    packed = tilewright.quantize_weight(weight, Int4(group_size))
    levels, size = reference.levels("int4"), packed.group_size

    def squared_error(factor):
        scales = group_scales(packed).double() * factor
        return reference.nearest(weight, scales, None, size, levels).square().sum()

    assert squared_error(1.0) < min(squared_error(0.99), squared_error(1.01))


def test_fp8_scales_are_shared_by_tensor_and_by_block():
    weight = weights(300, 200)
    expected = weight.abs().amax().expand(300, 1) / 448
    packed = tilewright.quantize_weight(weight, FP8("tensor"))
    torch.testing.assert_close(group_scales(packed), expected, rtol=1e-7, atol=0)
    packed = tilewright.quantize_weight(weight, FP8("block"))
    for top, left in ((0, 0), (128, 128), (256, 0)):
        expected = weight[top : top + 128, left : left + 128].abs().amax() / 448
        found = group_scales(packed)[top : top + 128, left // 128]
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-7, atol=0)


def test_mxfp4_scales_are_powers_of_two_and_ties_go_to_even():
    weight = torch.zeros(3, 64)
    # scaled by 1/4 and by 16: each middle between two levels goes to the level of even code
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    weight[0, :8], weight[1, 32:40] = middles / 4, -16 * middles
    weight[2, 0] = 7.9  # beyond 6 times its power of two
    packed = tilewright.quantize_weight(weight, MXFP4())
    assert packed.scales.dtype == torch.bfloat16
    assert group_scales(packed).tolist() == [[0.25, 0.0], [0.0, 16.0], [1.0, 0.0]]
    back = tilewright.dequantize_weight(packed)
    assert torch.equal(back[0, :8], rounded / 4) and torch.equal(back[1, 32:40], -16 * rounded)
    assert back[2, 0] == 6


@pytest.mark.parametrize("draw", [weights, heavy_tailed])
def test_hqq_finds_what_the_formula_finds(draw):
    groups = draw(40, 64)
    groups[20:] *= 100  # errors so large that they are shrunk instead of dropped
    packed = tilewright.quantize_weight(groups, Int4(64, symmetric=False))
    scales, zeros = reference.hqq_zero_points(groups)
    found_scales, found_offsets = group_scales(packed)[:, 0], unpack_rows(packed.offsets, 40)[:, 0]
    torch.testing.assert_close(found_scales.double(), scales, rtol=1e-6, atol=0)
    # a weight on the edge of two codes falls either way in float32, and the search may go on
    # from there: most groups agree closely, all in what they reach
    close = ((found_offsets.double() + zeros * scales).abs() < 1e-3 * scales).double().mean()
    assert close > 0.9

    def mean_error(scale, offset):
        codes = ((groups - offset[:, None]) / scale[:, None]).round().clamp(0, 15)
        return (codes * scale[:, None] + offset[:, None] - groups).abs().mean()

    reached = mean_error(found_scales.double(), found_offsets.double())
    assert abs(reached / mean_error(scales, -zeros * scales) - 1) < 2e-3


@pytest.mark.parametrize("draw", [weights, heavy_tailed])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_solvers_err_less_than_minmax(draw, group_size):
    weight = draw(64, 1024)
    for symmetric, at_most in ((True, 0.95), (False, 0.99)):
        solved = rms_error(weight, Int4(group_size, symmetric))
        spanned = rms_error(weight, Int4(group_size, symmetric, solver="minmax"))
        assert solved <= at_most * spanned


# --- how large the error is ---

# mean |error| and mean relative error on N(0, 1), and the spread of each over draws of 1024 x 1024:
# what bitsandbytes is tested with
EXPECTED = {
    ("nf4", 32): (0.067746, 0.000069, 0.189726, 0.000304),
    ("nf4", 64): (0.072798, 0.000074, 0.203339, 0.000340),
    ("nf4", 128): (0.076831, 0.000091, 0.215237, 0.000391),
    ("nf4", 256): (0.080337, 0.000102, 0.226105, 0.000398),
    ("nf4", 1024): (0.086610, 0.000187, 0.245370, 0.000600),
    ("nf4", 4096): (0.092547, 0.000360, 0.262473, 0.000999),
    ("fp4", 32): (0.088925, 0.000091, 0.242443, 0.000330),
    ("fp4", 64): (0.096543, 0.000111, 0.260125, 0.000379),
    ("fp4", 128): (0.102969, 0.000134, 0.275817, 0.000433),
    ("fp4", 4096): (0.129536, 0.000612, 0.337169, 0.001239),
}


@pytest.mark.parametrize("code, block", EXPECTED, ids=str)
def test_the_error_is_the_published_one(code, block):
    weight = torch.randn(256, 4096)
    kind = {"nf4": NF4, "fp4": FP4}[code]
    packed = tilewright.quantize_weight(weight, kind(block))
    error = (tilewright.dequantize_weight(packed) - weight).abs()
    mean, spread, relative, relative_spread = EXPECTED[code, block]
    assert abs(error.mean() - mean) < 7 * spread
    assert abs((error / (weight.abs() + 1e-8)).mean() - relative) < 7 * relative_spread
    statistics = tilewright.error_statistics(weight, packed)
    assert statistics.mean_error == pytest.approx(error.double().mean().item())


@pytest.mark.parametrize(
    "format, at_most",
    [(Int8(), 8.8), (Int8(64), 8.8), (Int4(), 4.8), (Int4(32), 4.8), (NF4(), 4.8), (FP4(), 4.8),
     (NF4(double_quant=True), 4.2), (Int4(symmetric=False), 5.0), (MXFP4(), 4.6), (FP8(), 8.1),
     (FP8("block"), 8.3)],
    ids=str,
)  # fmt: skip
def test_bits_per_weight(format, at_most):
    weight = weights(256, 1024)
    packed = tilewright.quantize_weight(weight, format)
    bits = 8 * sum(t.nbytes for t in packed.tensors().values()) / weight.numel()
    assert FORMATS[packed.format].bits < bits <= at_most
    assert tilewright.error_statistics(weight, packed).bits_per_weight == pytest.approx(bits)


def test_error_statistics_are_those_of_the_difference():
    weight = weights(40, 300)
    packed = tilewright.quantize_weight(weight, Int4())
    error = (tilewright.dequantize_weight(packed).double() - weight.double()).abs()
    found = tilewright.error_statistics(weight, packed)
    relative = (error.square().sum() / weight.double().square().sum()).sqrt().item()
    assert found.rms_relative_error == pytest.approx(relative)
    assert found.sqnr_db == pytest.approx(-20 * math.log10(relative))
    assert found.mean_error == pytest.approx(error.mean().item())
    assert found.largest_error == pytest.approx(error.max().item())
    assert "\n" not in str(found) and f"{found.sqnr_db:.1f} dB" in str(found)


def test_error_statistics_of_nothing_and_of_nan():
    empty = torch.zeros(0, 8)
    assert tilewright.error_statistics(empty, tilewright.quantize_weight(empty, Int8())).sqnr_db
    weight = weights(2, 64)
    weight[0, 0] = float("nan")
    found = tilewright.error_statistics(weight, tilewright.quantize_weight(weight, Int8()))
    assert math.isnan(found.largest_error) and math.isnan(found.rms_relative_error)


# --- odd values ---


@formats
def test_zero_groups_decode_to_exact_zero(format):
    weight = weights(20, 192)
    weight[:, 64:128] = 0
    weight[3] = 0
    weight[4] = -0.0
    back = tilewright.dequantize_weight(tilewright.quantize_weight(weight, format), torch.float32)
    assert not back[3].any() and not back[4].any()
    assert back[0].any()
    group = tilewright.quantize_weight(weight, format).group_size
    if 64 % group == 0:
        assert not back[:, 64:128].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    "format", [f for f in QUANT.values() if not getattr(f, "double_quant", False)], ids=str
)
def test_what_is_not_finite_stays_in_its_row(format, bad):
    weight = weights(140, 200)
    clean = weight.clone()
    weight[7, 100] = bad
    packed = tilewright.quantize_weight(weight, format)
    back = tilewright.dequantize_weight(packed)
    group = slice(100 // packed.group_size * packed.group_size, None)
    group = slice(group.start, group.start + packed.group_size)
    assert back[7, group].isnan().all()
    clean[7, group] = 0
    expected = tilewright.dequantize_weight(tilewright.quantize_weight(clean, format))
    expected[7, group] = float("nan")
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)
    codes = unpack_codes(packed.codes, packed.format, 140, 200)
    assert not codes[7, group].any()


@formats
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-39, 1e-30, 1e5, 1e30], ids=str)
def test_tiny_and_huge_weights(format, size):
    weight = torch.randn(20, 128).clamp(-3, 3) * size
    packed = tilewright.quantize_weight(weight, format)
    error = (tilewright.dequantize_weight(packed, torch.float32).double() - weight.double()).abs()
    # relative to the largest weight, or where float32 itself ends; half a step of 4 bits is 1/15,
    # e2m1 cuts off a quarter
    tiny = 2e-36 if isinstance(format, Int4) and not format.symmetric else 1e-37
    if format == MXFP4():
        tiny = 2.0**-124
    assert error.max() <= max(0.26 * weight.abs().max().item(), tiny)


def test_small_groups_take_two_bytes_a_scale_that_hold_it():
    def scales_of(size):
        return tilewright.quantize_weight(weights(20, 128) * size, Int4(32)).scales.dtype

    assert scales_of(1) == torch.float16
    assert scales_of(1e7) == torch.bfloat16  # beyond 65504
    assert scales_of(1e-4) == torch.bfloat16  # below the smallest normal float16
    for size in (1, 1e7, 1e-4):
        assert rms_error(weights(20, 128) * size, Int4(32)) < 0.09


@formats
def test_strides_do_not_matter(format):
    wide = weights(131, 50)
    for view in (wide.t(), weights(100, 262)[::2, ::2], weights(1, 131).expand(50, 131)):
        torch.testing.assert_close(
            tilewright.quantize_weight(view, format).codes,
            tilewright.quantize_weight(view.clone(memory_format=torch.contiguous_format),
                                       format).codes,
            rtol=0, atol=0,
        )  # fmt: skip


SHARED = ("fp8-tensor", "fp8-block", "nf4-double")  # rows share scales


@pytest.mark.parametrize("name", [name for name in QUANT if name not in SHARED])
def test_a_row_does_not_depend_on_the_others(name, monkeypatch):
    format, weight = QUANT[name], weights(70, 100)
    whole = tilewright.dequantize_weight(tilewright.quantize_weight(weight, format))
    monkeypatch.setattr(packing, "CHUNK", 1600)
    for rows in (slice(0, 70), slice(33, 34), slice(5, 60)):
        some = tilewright.dequantize_weight(tilewright.quantize_weight(weight[rows], format))
        assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("format", [Int4(), Int4(symmetric=False), NF4(), FP8("block"), MXFP4()],
                         ids=str)  # fmt: skip
def test_quantizing_takes_little_memory(format, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 1 << 14)

    class Largest(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found = out if isinstance(out, tuple | list) else [out]
            for tensor in (t for t in found if isinstance(t, torch.Tensor)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() != weight.untyped_storage().data_ptr():
                    Largest.n_bytes = max(Largest.n_bytes, storage.nbytes())
            return out

    weight = torch.randn(256, 1024).to(torch.bfloat16)
    with Largest():
        packed = tilewright.quantize_weight(weight, format)
    # of a weight of 256 Ki: the codes, or a float64 or index of a chunk
    assert Largest.n_bytes <= max(packed.codes.nbytes, 8 * packing.CHUNK)


# --- activations ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 300), (2, 3, 128)], ids=str)
@pytest.mark.parametrize(
    "format, group, largest",
    [(Int8(), None, 127), (Int8(64), 64, 127), (FP8(), None, 448), (FP8("block"), 128, 448)],
    ids=str,
)
def test_activations(format, group, largest, shape, dtype):
    x = torch.randn(shape).to(dtype)
    codes, scales = tilewright.quantize_activations(x, format)
    n_in = shape[-1]
    group = group or n_in
    assert codes.shape == x.shape and scales.dtype == torch.float32
    assert codes.dtype == (torch.int8 if largest == 127 else torch.float8_e4m3fn)
    assert scales.shape == (*shape[:-1], -(-n_in // group))
    if not x.numel():
        return
    rows, of_rows = x.reshape(-1, n_in), scales.reshape(-1, scales.shape[-1])
    expected = reference.absmax(rows, group) / largest
    torch.testing.assert_close(of_rows.double(), expected, rtol=1e-6, atol=0)
    back = reference.dequantize(codes.reshape(-1, n_in).double(), of_rows, None, group)
    levels = reference.levels("int8" if largest == 127 else "fp8")
    best = reference.nearest(rows.double(), of_rows, None, group, levels[levels.abs() <= largest])
    assert ((back - rows.double()).abs() - best).max() <= 1e-6 * rows.abs().max()


@pytest.mark.parametrize("format", [Int8(), FP8(), FP8("block")], ids=str)
def test_activations_of_zeros_and_infinities_stay_in_their_row(format):
    x = torch.randn(4, 256)
    x[1], x[2, 5] = 0, float("inf")
    codes, scales = tilewright.quantize_activations(x, format)
    assert not scales[1].any() and not codes[1].float().any()
    assert scales[2, 0].isnan() and not codes[2, :128].float().any()
    alone, alone_scales = tilewright.quantize_activations(x[3:], format)
    assert torch.equal(codes[3:].float(), alone.float()) and torch.equal(scales[3:], alone_scales)


# --- on a GPU ---


@pytest.mark.gpu
@formats
def test_a_gpu_quantizes_as_the_cpu_does(format):
    weight = weights(83, 300, dtype=torch.bfloat16)
    here, there = (tilewright.quantize_weight(w, format) for w in (weight, weight.cuda()))
    assert {t.device.type for t in there.tensors().values()} == {"cuda"}
    error = tilewright.error_statistics(weight.cuda(), there).rms_relative_error
    # sums of the solvers and of the mean of nested scales are in another order
    assert error == pytest.approx(rms_error(weight, format), rel=1e-3)
    if not isinstance(format, Int4) and here.nested is None:
        assert torch.equal(here.codes, there.codes.cpu())
        assert torch.equal(tilewright.dequantize_weight(here),
                           tilewright.dequantize_weight(there).cpu())  # fmt: skip


# --- the container ---


@pytest.mark.parametrize("format", [Int4(symmetric=False), NF4(double_quant=True)], ids=str)
def test_a_packed_weight_is_copied_pickled_and_moved_whole(format):
    packed = tilewright.quantize_weight(weights(20, 130), format)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    truth = tilewright.dequantize_weight(packed)
    for other in (copy.deepcopy(packed), copy.copy(packed), loaded, packed.to("cpu")):
        assert torch.equal(tilewright.dequantize_weight(other), truth)
        assert other.dtype == packed.dtype and other.tensors().keys() == packed.tensors().keys()
    assert {t.device.type for t in packed.to("meta").tensors().values()} == {"meta"}


# --- refusals ---

REFUSALS = {
    "int8-group": (lambda: Int8(12), "Int8: group_size is 12, need a positive multiple of 8"),
    "int4-group": (lambda: Int4(0), "Int4: group_size is 0, need a positive multiple of 8"),
    "int4-group-type": (lambda: Int4(64.0), "Int4: group_size is 64.0, need"),
    "int4-solver": (lambda: Int4(solver="gptq"), "solver is 'gptq', need one of hqq, minmax"),
    "int4-symmetric": (lambda: Int4(symmetric=1), "symmetric is 1, need True or False"),
    "nf4-group": (lambda: NF4(-8), "NF4: group_size is -8"),
    "fp4-group": (lambda: FP4(4), "FP4: group_size is 4"),
    "nf4-double": (lambda: NF4(double_quant="yes"), "NF4: double_quant is 'yes'"),
    "fp8-scaling": (lambda: FP8("column"), "scaling is 'column', need one of tensor, row, block"),
    "format-name": (
        lambda: tilewright.quantize_weight(weights(2, 2), "nf4"),
        "format is 'nf4', need one of Int8(), Int4(), NF4(), FP4(), FP8(), MXFP4()",
    ),
    "weight-axes": (
        lambda: tilewright.quantize_weight(torch.zeros(2, 3, 4), Int8()),
        "quantize_weight: weight has shape (2, 3, 4), need axes (O, I)",
    ),
    "weight-dtype": (
        lambda: tilewright.quantize_weight(torch.zeros(2, 3, dtype=torch.float64), Int8()),
        "quantize_weight: weight is torch.float64, need one of float32, float16, bfloat16",
    ),
    "double-quant-of-nan": (
        lambda: tilewright.quantize_weight(
            torch.tensor([[1.0], [float("nan")]]), NF4(double_quant=True)
        ),
        "weight has an infinity or NaN in row 1, and double_quant shares scales between rows",
    ),
    "decoded-dtype": (
        lambda: tilewright.dequantize_weight(
            tilewright.quantize_weight(weights(2, 2), Int8()), torch.int8
        ),
        "dequantize_weight: dtype is torch.int8, need one of float32, float16, bfloat16",
    ),
    "activation-format": (
        lambda: tilewright.quantize_activations(weights(2, 2), NF4()),
        "quantize_activations: format is NF4(group_size=64, double_quant=False), need one of",
    ),
    "activation-tensor": (
        lambda: tilewright.quantize_activations(weights(2, 2), FP8("tensor")),
        "format is FP8(scaling='tensor'), need scaling \"row\" or \"block\"",
    ),
    "activation-axes": (
        lambda: tilewright.quantize_activations(torch.tensor(1.0), Int8()),
        "quantize_activations: x has shape (), need axes (..., I)",
    ),
    "statistics-shape": (
        lambda: tilewright.error_statistics(
            weights(3, 2), tilewright.quantize_weight(weights(2, 3), Int8())
        ),
        "error_statistics: weight has shape (3, 2), need (2, 3) as packed has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError) as refused:
        call()
    assert message in str(refused.value)
