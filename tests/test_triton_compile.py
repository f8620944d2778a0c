"""The Triton kernels as machine code for sm_80 and sm_90: registers, spills, tensor cores.

Each launch is compiled as `triton_gpu.py` would start it, tile sizes and warps included.
"""

import dataclasses

import pytest
import torch

from tilewright import choose, settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from triton_ahead_of_time import SHARED_BYTES, compiled, missing_tool

from tilewright.ops.attention import triton_gpu
from tilewright.ops.attention.problem import ShiftedSegments

CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0)}
TOKENS, HEADS, PROCESSORS = 8192, 2, 132
# their time is that of memory, and they multiply no matrices
WITHOUT_PRODUCTS = ("attention_row_terms_kernel", "attention_combine_kernel", "live_range_kernel")
# also: what the features cost in registers, at the width that has the fewest to spare
FEATURES = {
    "packed": dict(cu_seqlens=torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)),
    "shifted": dict(segments=ShiftedSegments(group_size=2048)),
    "softcap": dict(softcap=30.0),
    "key mask": dict(key_mask=torch.ones(1, TOKENS, dtype=torch.bool)),
    "dropout": dict(dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64)),
}


@pytest.fixture(scope="module")
def registers_table():
    """Lines of the table, shown by `pytest -s`; README.md of the room has a copy."""
    lines = ["| kernel | D | for | warps | registers | shared memory | tensor core instructions |"]
    yield lines
    print("", *lines, sep="\n")


def problem_of(head_dim, dtype, **options):
    """The record of a causal call; TOKENS in one row, or packed if options say so."""
    lead = (TOKENS,) if "cu_seqlens" in options else (1, TOKENS)
    q, k, v = (torch.empty(*lead, HEADS, head_dim, dtype=dtype) for _ in range(3))
    return choose.OPERATORS["flash_attention"].problem(q, k, v, is_causal=True, **options)


def forward_launches(head_dim, dtype, capability, **options):
    problem = problem_of(head_dim, dtype, **options)
    q, k, v, out = (torch.empty(1, TOKENS, HEADS, head_dim, dtype=dtype) for _ in range(4))
    lse = torch.empty(1, HEADS, TOKENS)
    return triton_gpu.forward_launches(q, k, v, out, lse, problem, capability)


def backward_launches(head_dim, dtype, capability, **options):
    problem = problem_of(head_dim, dtype, **options)
    q, k, v, out, dout, dq, dk, dv = (
        torch.empty(1, TOKENS, HEADS, head_dim, dtype=dtype) for _ in range(8)
    )
    lse = torch.empty(1, HEADS, TOKENS)
    return triton_gpu.backward_launches(
        dout, None, q, k, v, out, lse, dq, dk, dv, problem, capability
    )


def decode_launches(head_dim, dtype, capability):
    q, out = (torch.empty(1, 1, 32, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.empty(1, 4096, 8, head_dim, dtype=dtype) for _ in range(2))
    lengths = torch.full((1,), 4096, dtype=torch.int32)
    problem = choose.OPERATORS["flash_decode"].problem(q, k, v, lengths)
    return triton_gpu.decode_launches(
        q, k, v, out, torch.empty(1, 32, 1), problem, capability, 0, PROCESSORS
    )


def expect_good_code(launch, target, folder, table, head_dim):
    code = compiled(launch, CAPABILITIES[target], folder)
    name = launch.kernel.__name__
    products = {n: code.counts[n] for n in ("HGMMA", "HMMA") if code.counts[n]}
    table.append(
        f"| {name.removeprefix('attention_').removesuffix('_kernel')} | {head_dim} | {target} "
        f"| {code.warps} | {code.registers} | {code.shared_bytes / 1024:.1f} KiB "
        f"| {', '.join(f'{count} {n}' for n, count in products.items())} |"
    )
    assert code.spills == 0, f"{name}: {code.spills} accesses of spilled registers"
    assert code.stack_bytes == 0, f"{name}: a stack of {code.stack_bytes} bytes"
    assert code.shared_bytes <= SHARED_BYTES[CAPABILITIES[target]], f"{name}: too much shared"
    if name in WITHOUT_PRODUCTS:
        return
    if target == "sm_90" and name != "attention_decode_kernel":  # 16 rows are too few for wgmma
        assert code.counts["HGMMA"], f"{name}: no wgmma"
        assert code.counts["UTMALDG"], f"{name}: no bulk copies"
    else:
        assert code.counts["HMMA"], f"{name}: no mma"


@pytest.fixture(autouse=True)
def _needs_tools(clean_memory):
    """Nothing here is computed, so fresh memory need not be poisoned, nor touched."""
    reason = missing_tool()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("launches", (forward_launches, backward_launches, decode_launches))
def test_no_spills_and_tensor_cores(launches, head_dim, target, tmp_path, registers_table):
    for launch in launches(head_dim, torch.bfloat16, CAPABILITIES[target]):
        expect_good_code(launch, target, tmp_path, registers_table, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("launches", (forward_launches, backward_launches, decode_launches))
def test_no_spills_at_the_widest_head(launches, target, tmp_path, registers_table):
    for launch in launches(256, torch.bfloat16, CAPABILITIES[target]):
        expect_good_code(launch, target, tmp_path, registers_table, 256)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("launches", (forward_launches, backward_launches))
def test_no_spills_with_features(launches, feature, tmp_path, registers_table):
    for launch in launches(128, torch.bfloat16, (9, 0), **FEATURES[feature]):
        if launch.kernel.__name__ not in WITHOUT_PRODUCTS:
            expect_good_code(launch, "sm_90", tmp_path, registers_table, f"128, {feature}")


def test_a_spill_is_seen(tmp_path):
    """The check itself: on half of the warps the accumulators do not fit, and the code says so."""
    (launch,) = forward_launches(128, torch.bfloat16, (9, 0))
    crowded = dataclasses.replace(launch, num_warps=4)
    code = compiled(crowded, (9, 0), tmp_path)
    assert code.spills > 0 and code.stack_bytes > 0
