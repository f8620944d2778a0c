"""The Hopper kernel over packed weights without a GPU: its own code on threads of the host.

What runs is the kernel itself, over stand-ins for the GPU's instructions; see hopper_on_host/.
What this cannot see: whether the stand-ins are what the chip does, and races between proxies.
"""

import re

import linear_on_host
import pytest
import torch
from linear_hopper_inputs import FOUR_BITS, problem_of, random_weight, stock
from yardstick import assert_errs_at_most_twice_stock

from tilewright import native
from tilewright.ops.common.packed import FORMATS, decode
from tilewright.ops.linear import cuda_hopper, op, reference
from tilewright.ops.linear.problem import Problem

BF16 = torch.bfloat16
WHERE = {"device": 0, "stream": 0}
NO_SPLITS = 0  # multiprocessors for which a call is never split


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    missing = linear_on_host.missing_tool()
    if missing is not None:
        pytest.skip(f"the Hopper kernel cannot be compiled for the host: {missing}")
    return linear_on_host.build(tmp_path_factory.mktemp("hopper"))


@pytest.fixture(params=[False, True], ids=["products-at-once", "products-late"])
def module(request, library):
    return linear_on_host.HostModule(library, request.param)


def check(module, x, weight, multiprocessors=NO_SPLITS, **rest):
    """Run on the host and hold against the reference; returns how the call was cut."""
    o, p = problem_of(x, weight, **rest)
    y, hidden = cuda_hopper.run(module, WHERE, multiprocessors, x, o, p)
    truth, true_hidden = reference.fused_linear(
        x, decode(weight), o.bias, o.out_scale, o.down, o.up, p.scale, p.activation,
        row_adapters=o.row_adapters, column_adapters=o.column_adapters,
        column_scales=o.column_scales,
    )  # fmt: skip
    assert y.dtype == hidden.dtype == BF16
    assert_errs_at_most_twice_stock("y", y, stock(x, weight, o, p), truth)
    if p.rank:
        stock_hidden = x @ o.down.to(x.dtype).T
        if p.activation == "relu":
            stock_hidden = stock_hidden.relu()
        if o.row_adapters is not None:
            of_row = o.row_adapters[:, None] == o.column_adapters[None, :]
            stock_hidden = torch.where(of_row, stock_hidden, 0.0)
        assert_errs_at_most_twice_stock("hidden", hidden, stock_hidden, true_hidden)
    return module.calls[-1]


# T, O, I, group size
SHAPES = {
    "one-of-everything": (1, 1, 1, 8),
    "one-line": (1, 16, 8, 8),
    "tile-of-16": (16, 128, 128, 64),
    "below-and-above-a-tile": (15, 129, 72, 72),
    "nothing-divides": (7, 37, 333, 64),
    "one-scale-a-row": (3, 20, 200, 200),
    "tile-of-32": (17, 24, 136, 128),
    "tile-of-64": (63, 16, 192, 64),
    "ring-wraps": (5, 16, 64 * 27, 128),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_scales_on_sums(shape, format, module):
    n_tokens, n_out, n_in, group_size = shape
    weight = random_weight(n_out, n_in, format, group_size)
    call = check(module, torch.randn(n_tokens, n_in).to(BF16), weight)
    assert call.sums and call.splits == 1


SMALL_GROUPS = {
    "groups-of-8": (3, 20, 136, 8),
    "groups-across-steps": (5, 40, 264, 24),
    "groups-longer-than-a-step": (2, 17, 328, 72),
    "tile-of-128": (33, 20, 72, 16),
    "two-tiles-of-256": (257, 10, 64, 16),
    "ring-wraps": (129, 16, 64 * 11, 32),
}


@pytest.mark.parametrize("shape", SMALL_GROUPS.values(), ids=SMALL_GROUPS)
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_scales_on_weights(shape, format, module):
    n_tokens, n_out, n_in, group_size = shape
    weight = random_weight(n_out, n_in, format, group_size)
    call = check(module, torch.randn(n_tokens, n_in).to(BF16), weight)
    assert not call.sums


@pytest.mark.parametrize("format", FOUR_BITS)
@pytest.mark.parametrize("has_offsets", [False, True], ids=["scales", "offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_formats_offsets_and_types_of_scales(format, has_offsets, dtype, module):
    weight = random_weight(24, 128, format, 64, dtype, has_offsets)
    call = check(module, torch.randn(3, 128).to(BF16), weight)
    assert call.sums == (not has_offsets)


@pytest.mark.parametrize("format", FOUR_BITS)
def test_weights_are_decoded_to_the_bit(format, module):
    """Products with one 1 in a row give the weights back, and they are what decode gives."""
    weight = random_weight(40, 88, format, 24, has_offsets=True)
    o, p = problem_of(torch.eye(88, dtype=BF16), weight)
    y, _ = cuda_hopper.run(module, WHERE, NO_SPLITS, torch.eye(88, dtype=BF16), o, p)
    assert torch.equal(y.T, decode(weight).to(BF16))


@pytest.mark.parametrize("group_size", [64, 32])
def test_splits_add_up_in_order(group_size, module):
    weight = random_weight(30, 64 * 9, "nf4", group_size)
    x, bias, out_scale = torch.randn(5, 64 * 9).to(BF16), torch.randn(30), torch.rand(30).to(BF16)
    call = check(module, x, weight, multiprocessors=4, bias=bias, out_scale=out_scale)
    assert call.splits == 2
    o, p = problem_of(x, weight, bias=bias, out_scale=out_scale)
    first, again = (cuda_hopper.run(module, WHERE, 4, x, o, p)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n_tokens", [2, 65])
def test_bias_and_out_scale(dtype, n_tokens, module):
    weight = random_weight(19, 72, "int4", 72)
    bias, out_scale = (500 * torch.randn(19)).to(dtype), torch.randn(19).to(dtype)
    x = torch.randn(n_tokens, 72).to(BF16)
    check(module, x, weight, bias=bias, out_scale=out_scale)
    check(module, x, weight, bias=bias)


LOW_RANK = {
    "rank-1": (3, 20, 64, 1, NO_SPLITS),
    "rank-16-in-splits": (4, 20, 64 * 9, 16, 4),
    "rank-64": (2, 130, 72, 64, NO_SPLITS),
    "odd-rank-many-tokens": (130, 20, 136, 13, NO_SPLITS),
}


@pytest.mark.parametrize("shape", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_low_rank_update(shape, activation, module):
    n_tokens, n_out, n_in, rank, multiprocessors = shape
    weight = random_weight(n_out, n_in, "nf4", 64)
    x = torch.randn(n_tokens, n_in).to(BF16)
    down, up = torch.randn(rank, n_in), torch.randn(n_out, rank)
    low_rank = dict(down=down.to(BF16), up=up.to(BF16), scale=-1.7, activation=activation)
    call = check(module, x, weight, multiprocessors, bias=torch.randn(n_out), **low_rank)
    assert call.rank == rank and (call.splits > 1) == (multiprocessors != NO_SPLITS)
    call = check(module, x, weight, multiprocessors, out_scale=torch.randn(n_out), **low_rank)
    assert call.splits == 1


def test_adapters_of_their_own_for_each_row(module):
    weight = random_weight(24, 64, "int4", 64)
    columns = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    check(
        module, torch.randn(4, 64).to(BF16), weight, down=torch.randn(5, 64).to(BF16),
        up=torch.randn(24, 5).to(BF16), row_adapters=torch.tensor([1, -1, 0, 1]).int(),
        column_adapters=columns, column_scales=torch.tensor([2.0, 0.3])[columns.long()],
    )  # fmt: skip


def test_nested_scales(module):
    weight = random_weight(37, 200, "nf4", 64, is_nested=True)
    check(module, torch.randn(3, 200).to(BF16), weight)


def test_input_order(module):
    check(module, torch.randn(3, 72).to(BF16), random_weight(20, 72, "int4", 24, is_reordered=True))


VIEWS = {
    "columns-of-a-wider-matrix": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "misaligned-start": lambda x: torch.cat([x[0, :1], x.flatten()])[1:].view(x.shape),
    "transposed": lambda x: x.T.contiguous().T,
    "one-row-for-all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_x(view, module):
    check(module, view(torch.randn(3, 72).to(BF16)), random_weight(20, 72))


def test_a_row_keeps_its_infinities_to_itself(module):
    weight = random_weight(20, 72, "uint4", 72)
    x = torch.randn(4, 72).to(BF16)
    clean, p = problem_of(x, weight)
    before, _ = cuda_hopper.run(module, WHERE, NO_SPLITS, x, clean, p)
    x[2, 5] = float("inf")
    after, _ = cuda_hopper.run(module, WHERE, NO_SPLITS, x, clean, p)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert not after[2].isfinite().any()


def test_nothing_to_compute(module):
    weight = random_weight(16, 64)
    x = torch.zeros(0, 64, dtype=BF16)
    o, p = problem_of(x, weight)
    y, hidden = cuda_hopper.run(module, WHERE, NO_SPLITS, x, o, p)
    assert y.shape == (0, 16) and hidden.shape == (0, 0) and not module.calls


# --- what needs no library ---


def hopper_problem(**changes) -> Problem:
    usual = dict(
        device="cuda", dtype=BF16, tokens=1, in_features=4096, out_features=4096, format="nf4",
        group_size=64,
    )  # fmt: skip
    return Problem(**{**usual, **changes})


REFUSALS = {
    "tensors are on cpu": dict(device="cpu"),
    "x is torch.float16, need torch.bfloat16": dict(dtype=torch.float16),
    "the weight is dense, need one of int4, uint4, nf4, fp4, e2m1": dict(format="dense"),
    "the weight is int8": dict(format="int8"),
    "it has no backward": dict(needs_grad=True),
    "it has no int8_activations": dict(int8_activations=True),
    "dropout_p is 0.5, need 0": dict(dropout_p=0.5),
    "R is 65, need at most 64": dict(rank=65),
    "scale is 0.0, need 1.5": dict(rank=8, scale=0.0),
    "I is 0, need 1 to": dict(in_features=0),
    "T is 16777217, need at most": dict(tokens=65536 * 256 + 1),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason):
    assert cuda_hopper.why_not(hopper_problem(**REFUSALS[reason])).startswith(reason)


@pytest.mark.parametrize("n_tokens", [1, 16, 17, 33, 65, 129, 4096])
@pytest.mark.parametrize("n_in", [8, 64, 320, 4096, 14336])
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("multiprocessors", [78, 120, 132])
def test_every_split_has_a_step(n_tokens, n_in, has_offsets, multiprocessors):
    p = hopper_problem(tokens=n_tokens, in_features=n_in, out_features=2048)
    cut = cuda_hopper.plan(p, -(-n_in // 64), has_offsets, True, multiprocessors)
    steps = -(-n_in // cuda_hopper.INPUTS)
    of_a_split = -(-steps // cut.splits)
    assert 1 <= cut.splits <= cuda_hopper.MAX_SPLITS and (cut.splits - 1) * of_a_split < steps
    blocks = 2048 // cuda_hopper.ROWS * -(-n_tokens // cut.tile) * cut.splits
    assert cut.splits == 1 or blocks <= multiprocessors * (2 if cut.tile <= 32 else 1)
    unsplit = cuda_hopper.plan(p, -(-n_in // 64), has_offsets, False, multiprocessors)
    assert unsplit.splits == 1


CONSTANTS = {
    "csrc/linear/linear_hopper.h": {
        "kPackedRows": cuda_hopper.ROWS,
        "kPackedInputs": cuda_hopper.INPUTS,
        "kPackedMaxRank": cuda_hopper.MAX_RANK,
    },
    "bindings/cuda_linear.cpp": {"kMaxGrid": cuda_hopper.MAX_TILES},
}


@pytest.mark.parametrize("path", CONSTANTS)
def test_both_languages_have_the_same_constants(path):
    text = (linear_on_host.ROOT / path).read_text()
    found = dict(re.findall(r"constexpr \w+ (\w+) = (\d+);", text))
    assert {name: int(found[name]) for name in CONSTANTS[path]} == CONSTANTS[path]


# what the binding refuses, whoever calls it; addresses are not read before that
USUAL = dict(
    tokens=4, in_features=128, out_features=32, x=(1024, 128), codes=1024,
    scales=(1024, "float32"), offsets=None, group_size=64, groups=2,
    values=FORMATS["int4"].table, bias=None, out_scale=None, hidden=(1024, 8), up=1024, rank=8,
    scale=1.0, y=1024, partial=1024, tile=16, sums=True, splits=1, device=0, stream=0,
)  # fmt: skip
BINDING_REFUSALS = {
    "T is 0 and O is 32, need at least 1": dict(tokens=0),
    "I is 129, need a multiple of 8": dict(in_features=129),
    f"I is {2**29 + 8}, need a multiple of 8": dict(in_features=2**29 + 8),
    "no kernel for tile 48 with sums = 1 and counts = 1": dict(tile=48),
    "no kernel for tile 128 with sums = 1 and counts = 0": dict(
        tile=128, values=FORMATS["nf4"].table
    ),
    "T is 1048561, need at most 65535 tiles of 16": dict(tokens=16 * 65535 + 1),
    "x is at address 1032, need a multiple of 16": dict(x=(1032, 128)),
    "x is a null pointer": dict(x=(0, 128)),
    "rows of x are 132 elements apart, need a multiple of 8 and at least 128": dict(x=(1024, 132)),
    "rows of x are 120 elements apart": dict(x=(1024, 120)),
    "codes is at address 1025": dict(codes=1025),
    "scales is float64, need float32, bfloat16 or float16": dict(scales=(1024, "float64")),
    "offsets is at address 8": dict(offsets=(8, "float32")),
    "group_size is 60, need a multiple of 8": dict(group_size=60),
    "3 groups of 64 inputs do not make up I = 128": dict(groups=3),
    "1 groups of 64 inputs do not make up I = 128": dict(groups=1),
    "sums with group_size 32 and no offsets, need a multiple of 64": dict(group_size=32, groups=4),
    "sums with group_size 64 and offsets": dict(offsets=(1024, "float32")),
    "splits is 3, need some of 2 steps for each": dict(splits=3),
    "partial is a null pointer with 2 splits": dict(splits=2, partial=0),
    "R is 65, need 0 to 64": dict(rank=65),
    "rows of hidden are 4 elements apart": dict(hidden=(1024, 4)),
    "scale is 0, need another number": dict(scale=0.0),
    "2 splits with a low-rank update and out_scale, need 1": dict(
        splits=2, out_scale=(1024, "float32")
    ),
    "y is a null pointer": dict(y=0),
}


@pytest.mark.parametrize("message", BINDING_REFUSALS)
def test_the_binding_checks_again(message):
    module, reason = native._load("_cuda")
    if module is None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        module.packed_linear(**{**USUAL, **BINDING_REFUSALS[message]})
    assert str(raised.value).startswith("packed_linear: ")


def test_the_operator_knows_it():
    assert op._implementation("cuda_hopper") is cuda_hopper
