"""The Triton kernels as machine code for sm_80 and sm_90: registers, spills, tensor cores.

Each launch is compiled as `triton_gpu.py` would start it, tile sizes and warps included.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tilewright import choose, settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton_ahead_of_time import BOX_ELEMENTS, CAPABILITIES, SHARED_BYTES, compiled, source_of

from tilewright.ops.attention import triton_gpu
from tilewright.ops.attention.problem import ShiftedSegments

pytestmark = pytest.mark.usefixtures("ahead_of_time")
TOKENS, HEADS, PROCESSORS = 8192, 4, 132
# their time is that of memory, and they multiply no matrices
WITHOUT_PRODUCTS = ("attention_row_terms_kernel", "attention_combine_kernel", "live_range_kernel")
# what costs registers; a window and an end of causality cost none, they are numbers
FEATURES = {
    "": {},
    "documents, shifted, grouped": dict(
        cu_seqlens=torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32),
        segments=ShiftedSegments(group_size=2048), kv_heads=1,
    ),
    "key mask": dict(key_mask=torch.ones(1, TOKENS, dtype=torch.bool)),
    "softcap, sinks": dict(softcap=30.0, sinks=torch.zeros(HEADS)),
    "dropout": dict(dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64)),
}  # fmt: skip


@pytest.fixture(scope="module")
def registers_table():
    """Lines of the table, shown by `pytest -s`; README.md of the room has a copy."""
    lines = [
        f"triton {triton.__version__}",
        "| kernel | D | with | for | warps | registers | shared | tensor core instructions |",
    ]
    yield lines
    print("", *lines, sep="\n")


def attention_launches(head_dim, dtype, capability, tokens=TOKENS, kv_heads=HEADS, **options):
    """What a causal call launches, forward and backward."""
    lead = (tokens,) if "cu_seqlens" in options else (1, tokens)
    q, k, v = (
        torch.empty(*lead, heads, head_dim, dtype=dtype) for heads in (HEADS, kv_heads, kv_heads)
    )
    options = {"is_causal": True, **options}
    problem = choose.OPERATORS["flash_attention"].problem(q, k, v, **options)
    q, k, v = (t.view(1, tokens, *t.shape[-2:]) for t in (q, k, v))
    out, dout, dq, dk, dv = (torch.empty_like(t) for t in (q, q, q, k, v))
    lse = torch.empty(1, HEADS, tokens)
    return [
        *triton_gpu.forward_launches(q, k, v, out, lse, problem, capability),
        *triton_gpu.backward_launches(
            dout, None, q, k, v, out, lse, dq, dk, dv, problem, capability
        ),
    ]


def decode_launches(head_dim, dtype, capability, slots=4096, page=0, **more):
    q, out = (torch.empty(1, 1, 32, head_dim, dtype=dtype) for _ in range(2))
    lead = (1, slots)
    if page:
        lead = (slots // page, page)
        more["page_table"] = torch.zeros(1, slots // page, dtype=torch.int32)
    k, v = (torch.empty(*lead, 8, head_dim, dtype=dtype) for _ in range(2))
    lengths = torch.full((1,), slots, dtype=torch.int32)
    problem = choose.OPERATORS["flash_decode"].problem(q, k, v, key_lengths=lengths, **more)
    return triton_gpu.decode_launches(
        q, k, v, out, torch.empty(1, 32, 1), problem, capability, 0, PROCESSORS
    )


def faults(code, name, target):
    """What is wrong with the machine code of a kernel, in words."""
    limit = SHARED_BYTES[CAPABILITIES[target]]
    by_engine = target == "sm_90" and name != "attention_decode_kernel"  # few rows: no wgmma
    has_products = name not in WITHOUT_PRODUCTS
    conditions = {
        f"{code.spills} accesses of spilled registers": code.spills == 0,
        f"a stack of {code.stack_bytes} bytes": code.stack_bytes == 0,
        f"{code.shared_bytes} bytes of shared memory, {limit} there are": (
            code.shared_bytes <= limit
        ),
        "scratch memory, which needs an allocator": code.scratch_bytes == 0,
        f"copies of {code.boxes}": all(max(box) <= BOX_ELEMENTS for box in code.boxes),
        "no products on tensor cores": not has_products
        or code.counts["HGMMA" if by_engine else "HMMA"] > 0,
        "no bulk copies": not (has_products and by_engine) or code.counts["UTMALDG"] > 0,
    }
    return [words for words, holds in conditions.items() if not holds]


def expect_good_code(launches, target, folder, table, head_dim):
    """launches: pairs of a feature's name and a launch. The compiler runs outside Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(
            pool.map(lambda pair: compiled(pair[1], CAPABILITIES[target], folder), launches)
        )
    wrong = []
    for (feature, launch), code in zip(launches, codes, strict=True):
        name = launch.kernel.__name__
        short = name.removeprefix("attention_").removesuffix("_kernel")
        if short == "dkv" and not launch.arguments["WANTS_DV"]:
            short = "dkv, dK"
        if short == "dkv" and not launch.arguments["WANTS_DK"]:
            short = "dkv, dV"
        products = {n: code.counts[n] for n in ("HGMMA", "HMMA") if code.counts[n]}
        table.append(
            f"| {short} | {head_dim} | {feature} | {target} | {code.warps} | {code.registers} "
            f"| {code.shared_bytes / 1024:.1f} KiB "
            f"| {', '.join(f'{count} {n}' for n, count in products.items())} |"
        )
        wrong += [f"{short} {head_dim} {feature}: {fault}" for fault in faults(code, name, target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_no_spills_and_tensor_cores(head_dim, target, tmp_path, registers_table):
    launches = [
        (feature, launch)
        for feature, options in FEATURES.items()
        for launch in attention_launches(head_dim, torch.bfloat16, CAPABILITIES[target], **options)
        if not feature or launch.kernel.__name__ not in WITHOUT_PRODUCTS
    ]
    expect_good_code(launches, target, tmp_path, registers_table, head_dim)


@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_spills_in_decoding(target, tmp_path, registers_table):
    for head_dim in (64, 128, 256):
        launches = [
            (f"pages of {page}" if page else "", launch)
            for page in (0, 16)
            for launch in decode_launches(head_dim, torch.bfloat16, CAPABILITIES[target], page=page)
            if not page or launch.kernel.__name__ not in WITHOUT_PRODUCTS
        ]
        expect_good_code(launches, target, tmp_path, registers_table, head_dim)


@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_no_spills_in_combining(dtype, target, tmp_path, registers_table):
    for head_dim in (64, 128, 256):
        *_, plain = decode_launches(head_dim, dtype, CAPABILITIES[target])
        *_, with_sinks = decode_launches(
            head_dim, dtype, CAPABILITIES[target], sinks=torch.zeros(32)
        )
        launches = [(f"{dtype}", plain), (f"{dtype}, sinks", with_sinks)]
        expect_good_code(launches, target, tmp_path, registers_table, head_dim)


def test_a_spill_is_seen(tmp_path):
    """The check itself: on half of the warps the accumulators do not fit, and the code says so."""
    launch = attention_launches(128, torch.bfloat16, (9, 0))[0]
    code = compiled(dataclasses.replace(launch, num_warps=4), (9, 0), tmp_path)
    found = faults(code, launch.kernel.__name__, "sm_90")
    assert code.spills > 0 and code.stack_bytes > 0
    assert len(found) == 2 and "spilled" in found[0] and "stack" in found[1]


def identity(launch):
    source = source_of(launch)
    return launch.kernel.__name__, source.hash()


@pytest.mark.parametrize("target", CAPABILITIES)
def test_shapes_share_their_kernels(target):
    """A new length, window or group size compiles nothing: compiling takes seconds."""
    capability = CAPABILITIES[target]

    def kernels(**options):
        launches = attention_launches(128, torch.bfloat16, capability, **options)
        return {identity(launch) for launch in launches}

    lengths = (1, 15, 16, 1000, 8192)
    assert len({frozenset(kernels(tokens=n)) for n in lengths}) == 1
    assert kernels() == kernels(window=(100, 5)) == kernels(is_causal=False, kv_heads=1)
    sizes = (16, 100, 2048)
    segments = [ShiftedSegments(group_size=n, first_shifted_head=n % 3) for n in sizes]
    assert len({frozenset(kernels(segments=s)) for s in segments}) == 1
    assert kernels(segments=segments[0]) != kernels()
    cached = [decode_launches(128, torch.bfloat16, capability, slots=n) for n in (256, 272, 8192)]
    assert len({frozenset(map(identity, launches)) for launches in cached}) == 1
