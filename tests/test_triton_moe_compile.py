"""The Triton kernels of the moe room as machine code for sm_80 and sm_90: registers, spills, cores.

Each launch is compiled as `triton_gpu.py` would start it, tile sizes and warps included.
"""

import dataclasses

import pytest
import torch

from tilewright import settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton_ahead_of_time import CAPABILITIES, SHARED_BYTES, compiled, source_of

from tilewright.ops.common.packed import ROWS, inputs_of_a_line
from tilewright.ops.moe import triton_gpu
from tilewright.ops.moe.problem import DENSE, Operands, Packing, Problem

pytestmark = pytest.mark.usefixtures("ahead_of_time")
# Mixtral-like and fine-grained experts, GPT-OSS's layout, few rows
MIXTRAL = dict(tokens=8192, slots=2, experts=8, features=4096, width=14336)
FINE = dict(tokens=8192, slots=8, experts=128, features=2048, width=768)
GPT_OSS = dict(
    tokens=4096, slots=4, experts=32, features=2880, width=2880, interleaved=True,
    transposed=True, activation="clamped_swiglu", alpha=1.702, limit=7.0,
)  # fmt: skip
CASES = {
    "mixtral": MIXTRAL,
    "gpt-oss": GPT_OSS,
    "16 rows an expert": {**FINE, "tokens": 256},
    "nf4": {**FINE, "up": Packing("nf4", 64), "down": Packing("nf4", 64)},
    "nf4, 16 rows": {**FINE, "tokens": 256, "up": Packing("nf4", 64), "down": Packing("nf4", 64)},
    "int4": {**MIXTRAL, "up": Packing("int4", 128), "down": Packing("int4", 128)},
}
WITHOUT_PRODUCTS = ("moe_combine_kernel", "moe_gate_gradient_kernel")


def launches_of(case: dict, capability, dtype=torch.bfloat16, bias=False, trained=True) -> list:
    p = Problem("cuda", dtype, **case)
    tokens, slots, experts = p.tokens, p.slots, p.experts
    empty = torch.empty
    up, down = (experts, 2 * p.width, p.features), (experts, p.features, p.width)
    if p.transposed:
        up, down = ((e, i, o) for e, o, i in (up, down))
    o = Operands(
        gate_up_bias=empty(experts, 2 * p.width, dtype=dtype) if bias else None,
        down_bias=empty(experts, p.features, dtype=dtype) if bias else None,
    )
    for name, dense, shape, packing in (
        ("up", "gate_up", up, p.up), ("down", "down", down, p.down),
    ):  # fmt: skip
        if packing.format == DENSE:
            o = o._replace(**{dense: empty(shape, dtype=dtype)})
            continue
        blocks, lines = shape[0] * shape[1] // ROWS, shape[2] // inputs_of_a_line(packing.format)
        codes = torch.empty(blocks, lines, 64, dtype=torch.uint8)
        scales = empty(blocks, shape[2] // packing.group_size, ROWS, dtype=torch.float16)
        o = o._replace(**{f"{name}_codes": codes, f"{name}_scales": scales})
    x, y, dx = (empty(tokens, p.features, dtype=dtype) for _ in range(3))
    z = empty(tokens * slots, 2 * p.width, dtype=dtype)
    gates, order = empty(tokens, slots), torch.zeros(tokens * slots, dtype=torch.int32)
    starts = torch.zeros(experts + 1, dtype=torch.int64)
    found = triton_gpu.forward_launches(x, gates, order, starts, o, p, y, z, None, capability)
    gradients = [dx, gates, *(None if t is None or not trained else empty(t.shape, dtype=t.dtype)
                              for t in o[:4])]  # fmt: skip
    found += triton_gpu.backward_launches(
        y, x, gates, z, order, starts, o, p, gradients, None, None, capability
    )
    return found


def faults(code, launch, target):
    """What is wrong with the machine code of a kernel, in words."""
    limit = SHARED_BYTES[CAPABILITIES[target]]
    multiplies = launch.kernel.__name__ not in WITHOUT_PRODUCTS
    lines = launch.arguments.get("LANES", launch.arguments.get("LEFT", 0))
    name = "HGMMA" if target == "sm_90" and lines >= 64 else "HMMA"
    conditions = {
        f"{code.spills} accesses of spilled registers": code.spills == 0,
        f"a stack of {code.stack_bytes} bytes": code.stack_bytes == 0,
        f"{code.shared_bytes} bytes of shared memory, {limit} there are": code.shared_bytes
        <= limit,
        f"no {name}": not multiplies or code.counts[name] > 0,
        "no asynchronous copies": not multiplies or code.counts["LDGSTS"] > 0,
        "scratch memory, which needs an allocator": code.scratch_bytes == 0,
    }
    return [words for words, holds in conditions.items() if not holds]


def identity(launch):
    return launch.kernel.__name__, source_of(launch).hash()


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_kernel_spills(target, tmp_path):
    lines = [
        f"triton {triton.__version__}",
        "| kernel | of | for | tile | warps | registers | shared | tensor core instructions |",
    ]
    wrong, seen = [], set()
    for name, case in CASES.items():
        if target == "sm_80" and name != "mixtral":
            continue
        for launch in launches_of(case, CAPABILITIES[target], bias=name == "gpt-oss"):
            if identity(launch) in seen:
                continue
            seen.add(identity(launch))
            code = compiled(launch, CAPABILITIES[target], tmp_path)
            short = launch.kernel.__name__.removeprefix("moe_").removesuffix("_kernel")
            extents = [launch.arguments.get(n) for n in ("LANES", "ROWS", "LEFT", "RIGHT", "DEPTH")]
            tile = " x ".join(str(n) for n in extents if n)
            products = " ".join(f"{code.counts[n]} {n}" for n in ("HGMMA", "HMMA"))
            lines.append(
                f"| {short} | {name} | {target} | {tile} | {code.warps} | {code.registers} "
                f"| {code.shared_bytes / 1024:.0f} KiB | {products} |"
            )
            wrong += [f"{short} of {name}: {f}" for f in faults(code, launch, target)]
    print("", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)


def test_float32_stays_off_the_tensor_cores(tmp_path):
    """They would round to 10 bits."""
    for launch in launches_of({**MIXTRAL, "width": 4096}, (9, 0), torch.float32, trained=False)[:2]:
        code = compiled(launch, (9, 0), tmp_path)
        assert code.spills == 0 and code.stack_bytes == 0
        assert code.counts["HGMMA"] == code.counts["HMMA"] == 0


def test_a_spill_is_seen(tmp_path):
    """The check itself: on one warp group the two sums of the first product do not fit."""
    launch = launches_of(MIXTRAL, (9, 0))[0]
    launch = dataclasses.replace(launch, num_warps=4)
    found = faults(compiled(launch, (9, 0), tmp_path), launch, "sm_90")
    assert any("spilled" in words for words in found) and any("stack" in words for words in found)


def test_shapes_share_their_kernels():
    """Another number of tokens compiles nothing, as long as the tiles of rows stay the same."""

    def kernels(tokens):
        return {identity(launch) for launch in launches_of({**MIXTRAL, "tokens": tokens}, (9, 0))}

    assert kernels(8192) == kernels(4097) == kernels(500)
