"""The Triton kernels of the optim room, compiled for sm_80 and sm_90 without a GPU.

Each is compiled as `triton_gpu.py` would start it, tile sizes and warps included.
"""

import pytest
import torch

from tilewright import settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton_ahead_of_time import CAPABILITIES, compiled, source_of

from tilewright.ops.optim import triton_gpu

pytestmark = pytest.mark.usefixtures("ahead_of_time")
F32, BF16 = torch.float32, torch.bfloat16


def adamw(dtype=F32, n=8192, ages=False, places=None, master=False, bits=32, scaled=True,
          rounding="nearest", key=7):  # fmt: skip
    state = [torch.empty(n, dtype=F32 if bits == 32 else torch.uint8) for _ in range(2)]
    scales = [torch.empty(-(-n // 256)) if bits == 8 else None for _ in range(2)]
    chosen = None if places is None else torch.empty(n, dtype=places)
    return triton_gpu.adamw_launch(
        torch.empty(2 * n, dtype=dtype), torch.empty(2 * n, dtype=dtype), *state,
        torch.empty(n, dtype=torch.int32) if ages else torch.empty(()), chosen,
        torch.empty(n) if master else None, *scales, torch.empty(()) if scaled else None, 1e-3, 0.9,
        0.999, 1e-8, 0.1, rounding, key,
    )  # fmt: skip


def squares(dtype=F32, n=1 << 20):
    sums = torch.empty(-(-n // 16384))
    return triton_gpu.squares_launch(torch.empty(n, dtype=dtype), sums)


def sm3(dtype=F32, n=64, columns=None):
    row, column = torch.empty(n), torch.empty(4096)
    p = torch.empty(n, 4096, dtype=dtype)
    offsets = None
    if columns is not None:
        offsets = torch.zeros(n + 1, dtype=torch.int64)
        columns, p = torch.zeros(0, dtype=columns), torch.empty(0, dtype=dtype)
    return triton_gpu.sm3_launch(
        p, p, row, column, row, column, offsets, columns, torch.empty(()), 1e-3, 1e-8, 0.1
    )


LAUNCHES = {
    "float32": adamw,
    "float32, no scale": lambda: adamw(scaled=False),
    "bfloat16": lambda: adamw(BF16),
    "bfloat16 at random": lambda: adamw(BF16, rounding="stochastic"),
    "bfloat16 at random, ages": lambda: adamw(BF16, ages=True, rounding="stochastic"),
    "master": lambda: adamw(BF16, master=True),
    "ages": lambda: adamw(ages=True),
    "places": lambda: adamw(ages=True, places=torch.int32),
    "places, int64": lambda: adamw(BF16, ages=True, places=torch.int64, master=True),
    "8 bits": lambda: adamw(bits=8),
    "8 bits, bfloat16 at random": lambda: adamw(BF16, bits=8, rounding="stochastic"),
    "norm": squares,
    "norm, bfloat16": lambda: squares(BF16),
    "matrix": sm3,
    "matrix, bfloat16": lambda: sm3(BF16),
    "cells": lambda: sm3(columns=torch.int32),
    "cells, short": lambda: sm3(BF16, columns=torch.int16),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_kernel_spills(target, tmp_path):
    lines = [f"triton {triton.__version__}", "| kernel | of | for | registers | shared |"]
    wrong = []
    for name, make in LAUNCHES.items():
        launch = make()
        code = compiled(launch, CAPABILITIES[target], tmp_path)
        short = launch.kernel.__name__.removesuffix("_kernel")
        lines.append(f"| {short} | {name} | {target} | {code.registers} | {code.shared_bytes} B |")
        if code.spills or code.stack_bytes or code.scratch_bytes:
            wrong.append(f"{short} of {name}: {code.spills} spills, {code.stack_bytes} B stack")
    print("", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)


def test_a_spill_is_seen(tmp_path):
    """The check itself: a tile that one warp cannot hold."""
    launch = adamw(bits=8)
    arguments = launch.arguments | {"ROWS": 8}
    code = compiled(type(launch)(launch.kernel, 1, arguments, 1), (9, 0), tmp_path)
    assert code.spills or code.stack_bytes


@pytest.mark.parametrize("make", [adamw, squares, sm3], ids=lambda f: f.__name__)
def test_shapes_share_their_kernels(make):
    """Another number of entries compiles nothing."""
    assert len({source_of(make(n=n)).hash() for n in (33, 64, 8000)}) == 1


def test_parameters_share_their_kernels():
    keys = (0, 1, 2**31 + 5, 2**32 - 1)
    assert len({source_of(adamw(BF16, rounding="stochastic", key=k)).hash() for k in keys}) == 1
