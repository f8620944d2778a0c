"""The Triton linear kernels as machine code for sm_80 and sm_90: registers, spills, tensor cores.

Each launch is compiled as `triton_gpu.py` would start it, tile sizes and warps included.
"""

import dataclasses

import pytest
import torch
from linear_cases import Case

from tilewright import settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton_ahead_of_time import CAPABILITIES, SHARED_BYTES, compiled, source_of

from tilewright.ops.common.packed import ROWS, inputs_of_a_line
from tilewright.ops.linear import triton_gpu
from tilewright.ops.linear.problem import Operands, Problem

pytestmark = pytest.mark.usefixtures("ahead_of_time")
BFLOAT16 = torch.bfloat16
# kernels that multiply no matrices: their time is that of memory
WITHOUT_PRODUCTS = (
    "linear_sum_splits_kernel", "linear_column_sums_kernel", "linear_quantize_rows_kernel",
)  # fmt: skip
LAYER = Case(2048, 4096, 4096, 16, has_bias=True, adapter=torch.float32)
PACKED = LAYER.with_(group=64, scales=torch.float16)
NF4 = PACKED.with_(format="nf4")
# the ways to decode, forward and backward, then what costs registers
TRAINING = {
    "dense": LAYER,
    **{format: PACKED.with_(format=format) for format in ("int4", "nf4", "fp8")},
    "nf4, dropout": NF4.with_(dropout_p=0.1),
    "nf4, groups of 32, offsets": NF4.with_(group=32, has_offsets=True, has_out_scale=True),
    "nf4, nested, input order, dropout": NF4.with_(
        scales="nested", has_order=True, dropout_p=0.1
    ),
    "int4, rank 256 of adapters": PACKED.with_(format="int4", R=64, adapters=4),
}  # fmt: skip
FORWARD = {
    **{f"{T} rows, {format}": PACKED.with_(T=T, format=format)
       for T in (1, 64) for format in ("nf4", "fp8")},
    "1 row, dense": LAYER.with_(T=1),
    "1 row, int4": PACKED.with_(T=1, format="int4"),
    "1 row, int4, groups of 128": PACKED.with_(T=1, format="int4", group=128),
    "32 rows, uint4": PACKED.with_(T=32, format="uint4", has_offsets=True),
    "1 row, nf4, nested, input order": NF4.with_(T=1, scales="nested", has_order=True),
    "1 row, int4, int8 activations": PACKED.with_(T=1, format="int4", int8_activations=True),
    "int4, int8 activations": PACKED.with_(format="int4", int8_activations=True),
    "nf4, int8 activations": NF4.with_(int8_activations=True),
    "int8, int8 activations": PACKED.with_(format="int8", int8_activations=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def registers_table():
    """Lines of the table, shown by `pytest -s`."""
    lines = [
        f"triton {triton.__version__}",
        "| kernel | of | for | warps | registers | shared | tensor core instructions |",
    ]
    yield lines
    print("", *lines, sep="\n")


def described(case: Case, dtype):
    """x, the operands and the problem of a case, all of them empty."""
    empty = torch.empty
    found = {}
    nested = case.scales == "nested"
    if case.format == "dense":
        found["weight"] = empty(case.O, case.I, dtype=dtype)
    else:
        blocks, n_groups = case.O // ROWS, case.I // case.group
        lines = case.I // inputs_of_a_line(case.format)
        found["codes"] = empty(blocks, lines, 64, dtype=torch.uint8)
        kind = torch.uint8 if nested else case.scales
        found["scales"] = empty(blocks, n_groups, ROWS, dtype=kind)
        if case.has_offsets:
            found["offsets"] = empty(blocks, n_groups, ROWS, dtype=torch.float16)
        if nested:
            found |= {"nested_table": empty(256), "nested_absmax": empty(1024)}
        if case.has_order:
            found["input_order"] = empty(case.I, dtype=torch.int32)
    if case.has_bias:
        found["bias"] = empty(case.O, dtype=dtype)
    if case.has_out_scale:
        found["out_scale"] = empty(case.O, dtype=dtype)
    rank = case.R * max(case.adapters, 1)
    if rank:
        kind = case.adapter or dtype
        found |= {"down": empty(rank, case.I, dtype=kind), "up": empty(case.O, rank, dtype=kind)}
    if case.adapters:
        found |= {"row_adapters": empty(case.T, dtype=torch.int32), "column_scales": empty(rank),
                  "column_adapters": empty(rank, dtype=torch.int32)}  # fmt: skip
    if case.dropout_p:
        found["dropout_seed"] = torch.zeros(1, dtype=torch.int64)
    problem = Problem(
        "cuda", dtype, case.T, case.I, case.O, rank, case.format, case.group,
        nested_offset=0.1 if nested else 0.0, nested_block=256 if nested else 0, scale=case.scale,
        dropout_p=case.dropout_p, int8_activations=case.int8_activations,
    )  # fmt: skip
    return empty(case.T, case.I, dtype=dtype), Operands(**found), problem


def launches_of(case: Case, capability, dtype=BFLOAT16, backward=False) -> list:
    x, o, p = described(case, dtype)
    y, hidden = torch.empty(case.T, case.O, dtype=dtype), torch.empty(case.T, p.rank, dtype=dtype)
    launches = triton_gpu.forward_launches(x, o, p, y, hidden, capability)
    if backward:
        like = (x, o.bias, o.down, o.up)
        gradients = [None if t is None else torch.empty_like(t) for t in like]
        launches += triton_gpu.backward_launches(y, x, hidden, o, p, gradients, capability)
    return launches


def faults(code, launch, target):
    """What is wrong with the machine code of a kernel, in words."""
    limit = SHARED_BYTES[(8, 0)]  # what all have
    multiplies = launch.kernel.__name__ not in WITHOUT_PRODUCTS
    # a warp group multiplies 64 rows at least
    is_hopper = target == "sm_90" and launch.arguments.get("BLOCK_ROWS", 64) >= 64
    names = ("HGMMA", "IGMMA") if is_hopper else ("HMMA", "IMMA")
    products = sum(code.counts[name] for name in names)
    conditions = {
        f"{code.spills} accesses of spilled registers": code.spills == 0,
        f"a stack of {code.stack_bytes} bytes": code.stack_bytes == 0,
        f"{code.shared_bytes} bytes of shared memory, {limit} there are": (
            code.shared_bytes <= limit
        ),
        "scratch memory, which needs an allocator": code.scratch_bytes == 0,
        "no products on tensor cores": not multiplies or products > 0,
        "no asynchronous copies": not multiplies
        or launch.kernel.__name__ == "linear_forward_finish_kernel"  # its loop adds up splits
        or code.counts["LDGSTS"] > 0,
    }
    return [words for words, holds in conditions.items() if not holds]


def identity(launch):
    return launch.kernel.__name__, source_of(launch).hash()


def expect_good_code(launches, target, folder, table):
    """launches: pairs of a case's name and a launch; each kernel is compiled once."""
    distinct = {identity(launch): (name, launch) for name, launch in reversed(launches)}
    pairs = list(reversed(distinct.values()))
    codes = [compiled(launch, CAPABILITIES[target], folder) for _, launch in pairs]
    wrong = []
    for (name, launch), code in zip(pairs, codes, strict=True):
        short = launch.kernel.__name__.removeprefix("linear_").removesuffix("_kernel")
        names = ("HGMMA", "IGMMA", "HMMA", "IMMA")
        products = ", ".join(f"{code.counts[n]} {n}" for n in names if code.counts[n])
        table.append(
            f"| {short} | {name} | {target} | {code.warps} | {code.registers} "
            f"| {code.shared_bytes / 1024:.1f} KiB | {products} |"
        )
        wrong += [f"{short} of {name}: {fault}" for fault in faults(code, launch, target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_training_has_no_spills(target, tmp_path, registers_table):
    launches = [
        (name, launch)
        for name, case in TRAINING.items()
        if target == "sm_90" or name not in ("int4", "nf4, dropout")  # the others need more there
        for launch in launches_of(case, CAPABILITIES[target], backward=True)
    ]
    expect_good_code(launches, target, tmp_path, registers_table)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_few_tokens_and_int8_activations_have_no_spills(target, tmp_path, registers_table):
    launches = [
        (name, launch)
        for name, case in FORWARD.items()
        for launch in launches_of(case, CAPABILITIES[target])
    ]
    expect_good_code(launches, target, tmp_path, registers_table)


def test_float32_has_no_spills(tmp_path):
    """And stays off the tensor cores, which would round to 10 bits."""
    for tokens in (1, 2048):
        case = NF4.with_(T=tokens, scales=torch.float32)
        for launch in launches_of(case, (9, 0), torch.float32, backward=tokens > 1):
            if "forward_kernel" in launch.kernel.__name__ or "dx" in launch.kernel.__name__:
                code = compiled(launch, (9, 0), tmp_path)
                assert code.spills == 0 and code.stack_bytes == 0
                assert code.counts["HGMMA"] == code.counts["HMMA"] == 0


def test_a_spill_is_seen(tmp_path):
    """The check itself: on two warps the accumulators do not fit, and the code says so."""
    launch = next(
        launch for launch in launches_of(NF4.with_(R=0), (9, 0)) if "forward" in str(launch.kernel)
    )
    launch = dataclasses.replace(
        launch, num_warps=4, arguments={**launch.arguments, "BLOCK_T": 256}
    )
    found = faults(compiled(launch, (9, 0), tmp_path), launch, "sm_90")
    assert any("spilled" in words for words in found) and any("stack" in words for words in found)


@pytest.mark.parametrize("target", CAPABILITIES)
def test_shapes_share_their_kernels(target):
    """A new number of tokens compiles nothing, nor does another group size, scale or seed."""
    capability = CAPABILITIES[target]

    def kernels(case):
        return {identity(launch) for launch in launches_of(case, capability, backward=True)}

    # the tiles of up to 128 tokens are too few for all processors, so their base product is split
    for tokens in ((2, 3, 16), (33, 47, 64), (65, 128), (1000, 1001, 4096)):
        found = [kernels(NF4.with_(T=n, dropout_p=0.1)) for n in tokens]
        assert len(set(map(frozenset, found))) == 1, tokens
    many = NF4.with_(T=1000)
    assert kernels(many.with_(group=128)) == kernels(many.with_(group=256, scale=0.3))
    assert kernels(many.with_(dropout_p=0.1)) == kernels(many.with_(dropout_p=0.5))
    assert kernels(many) != kernels(many.with_(format="fp4"))
