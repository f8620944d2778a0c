"""The Triton kernels of sparse deltas as machine code for sm_80 and sm_90: registers, spills.

Each launch is compiled as the launchers would start it, tile sizes and warps included.
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
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.linear import triton_delta_launch, triton_gpu
from tilewright.ops.linear.problem import Operands, Problem
from tilewright.ops.sparse import triton_gpu as search

pytestmark = pytest.mark.usefixtures("ahead_of_time")
SIZE = 512  # of a layer whose tensors are real: kernels know no sizes but what 16 divides
# those that know no delta are in test_triton_linear_compile.py
NO_DELTA = ("linear_narrow_kernel", "linear_sum_splits_kernel")
MULTIPLY = ("sampled_tiles", "sparse_tiles", "linear_forward_kernel", "linear_dx")


def delta_of(n: int) -> WeightDelta:
    places = torch.arange(n) * (SIZE * SIZE // n)
    return WeightDelta.from_flat(places, torch.zeros(n), SIZE, SIZE)


def of_layer(tokens: int, format: str, rank: int, capability) -> list:
    """Forward and backward of a layer with a delta."""
    d, kind = delta_of(3000), torch.bfloat16
    x = torch.zeros(tokens, SIZE, dtype=kind)
    o = Operands(
        weight=torch.zeros(SIZE, SIZE, dtype=kind), delta_offsets=d.row_offsets,
        delta_columns=d.columns, delta_values=d.values, bias=torch.zeros(SIZE, dtype=kind),
    )  # fmt: skip
    if format != "dense":
        lines = SIZE // inputs_of_a_line(format)
        o = o._replace(
            weight=None, codes=torch.zeros(SIZE // ROWS, lines, 64, dtype=torch.uint8),
            scales=torch.zeros(SIZE // ROWS, SIZE // 64, ROWS, dtype=torch.float16),
        )  # fmt: skip
    if rank:
        o = o._replace(down=torch.zeros(rank, SIZE), up=torch.zeros(SIZE, rank))
    p = Problem("cuda", kind, tokens, SIZE, SIZE, rank, format, 64 * (format != "dense"),
                has_delta=True)  # fmt: skip
    hidden = torch.zeros(tokens, rank, dtype=kind)
    found = triton_gpu.forward_launches(x, o, p, x, hidden, capability)
    if tokens > 64:
        found += triton_gpu.backward_launches(x, x, hidden, o, p, [x, None, None, None], capability)
    return found


def of_gradients(tokens: int, dtype, capability) -> list:
    """The gradient of the values, by tiles and by entries, and the search."""
    x, counts = torch.zeros(tokens, SIZE, dtype=dtype), torch.zeros(SIZE, dtype=torch.int64)
    found = []
    for n in (100, 40_000):
        d, products = delta_of(n), torch.zeros(n)
        found += triton_delta_launch.sampled_launches(
            x, x, d.row_offsets, d.columns, products, capability
        )
    sizes = torch.zeros(4096, dtype=torch.int32)
    found.append(search.tiles_launch(x, x, counts, sizes.long(), sizes, 5, 9, capability))
    found.append(search.tiles_launch(x, x, counts, None, None, 5, 9, capability))
    return found


def faults(code, launch, target) -> list[str]:
    """What is wrong with the machine code of a kernel, in words."""
    multiplies = any(name in launch.kernel.__name__ for name in MULTIPLY)
    core = "HGMMA" if target == "sm_90" else "HMMA"
    limit = SHARED_BYTES[(8, 0)]  # what all have
    conditions = {
        f"{code.spills} accesses of spilled registers": code.spills == 0,
        f"a stack of {code.stack_bytes} bytes": code.stack_bytes == 0,
        f"{code.shared_bytes} bytes of shared memory": code.shared_bytes <= limit,
        "scratch memory, which needs an allocator": code.scratch_bytes == 0,
        f"no {core}": not multiplies or code.counts[core] > 0,
        "no asynchronous copies": not multiplies or code.counts["LDGSTS"] > 0,
    }
    return [words for words, holds in conditions.items() if not holds]


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_kernel_spills(target, tmp_path):
    capability = CAPABILITIES[target]
    launches = [
        *of_layer(2048, "dense", 16, capability), *of_layer(2048, "nf4", 0, capability),
        *of_layer(1, "nf4", 0, capability), *of_gradients(2048, torch.bfloat16, capability),
    ]  # fmt: skip
    lines, wrong, seen = [f"triton {triton.__version__}"], [], set()
    for launch in launches:
        name = launch.kernel.__name__
        identity = name, source_of(launch).hash()
        if identity in seen or name in NO_DELTA:
            continue
        seen.add(identity)
        code = compiled(launch, capability, tmp_path)
        lines.append(
            f"| {name} | {target} | {code.registers} | {code.shared_bytes / 1024:.0f} KiB "
            f"| {code.counts['HGMMA']} HGMMA {code.counts['HMMA']} HMMA |"
        )
        wrong += [f"{name}: {fault}" for fault in faults(code, launch, target)]
    print("", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)
    assert len({name for name, _ in seen}) == 8


def test_float32_stays_off_the_tensor_cores(tmp_path):
    """They would round to 10 bits."""
    for launch in of_gradients(64, torch.float32, (9, 0)):
        if any(name in launch.kernel.__name__ for name in MULTIPLY):
            code = compiled(launch, (9, 0), tmp_path)
            assert code.spills == 0 and code.stack_bytes == 0
            assert code.counts["HGMMA"] == code.counts["HMMA"] == 0


def test_a_spill_is_seen(tmp_path):
    """The check itself: what is collected does not fit beside the sums of a larger tile."""
    launch = of_gradients(2048, torch.bfloat16, (9, 0))[-2]
    launch = dataclasses.replace(launch, arguments={**launch.arguments, "BLOCK_O": 128})
    found = faults(compiled(launch, (9, 0), tmp_path), launch, "sm_90")
    assert any("spilled" in words for words in found) and any("stack" in words for words in found)


def test_shapes_share_their_kernels():
    """A new number of tokens, values or wanted entries compiles nothing."""

    def kernels(tokens):
        launches = of_gradients(tokens, torch.bfloat16, (9, 0))
        return {(launch.kernel.__name__, source_of(launch).hash()) for launch in launches}

    assert kernels(65) == kernels(1000) == kernels(4096)
