"""The Triton kernels of the decode room, compiled for sm_80 and sm_90 without a GPU.

They are compiled as `triton_gpu.py` would start them, tile sizes and warps included.
"""

import pytest
import torch

from tilewright import settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton_ahead_of_time import CAPABILITIES, compiled, source_of

from tilewright.ops.decode import triton_gpu

pytestmark = pytest.mark.usefixtures("ahead_of_time")


def wide(*shape):
    return torch.empty(shape, dtype=torch.float64)


def sample(rows=2, vocabulary=128256, dtype=torch.bfloat16, wants_logprobs=False):
    logits = torch.empty(rows, vocabulary, dtype=dtype)
    wholes, tokens = torch.empty(rows, 3, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows) if wants_logprobs else None
    return triton_gpu.sample_launch(logits, wide(rows, 4), wholes, tokens, logprobs)


def penalties(rows=2, vocabulary=32000, n_ids=300, counts_only=False):
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    ids = torch.empty(rows, n_ids, dtype=torch.int64)
    counts = torch.empty(rows, vocabulary, dtype=torch.int32)
    if counts_only:
        return triton_gpu.occurrences_launch(ids, counts, 1)
    x = torch.empty(rows, vocabulary)
    return triton_gpu.penalties_launch(logits, ids, counts, wide(rows, 3), x)


def fusion(rows=2, vocabulary=128256, dtype=torch.bfloat16, experts=1, is_root=False):
    z, base = torch.empty(2, rows, vocabulary, dtype=dtype)
    tables, a = torch.empty(experts, 2, dtype=torch.int64), wide(rows, experts)
    if is_root:
        return triton_gpu.root_launch(z, tables, base, a, wide(rows), wide(rows), wide(rows))
    return triton_gpu.tilt_launch(z, tables, base, a, wide(rows, 3))


LAUNCHES = {
    "sample, bf16": lambda: sample(),
    "sample, float32, with log-probabilities": lambda: sample(
        dtype=torch.float32, wants_logprobs=True
    ),
    "sample, a small vocabulary": lambda: sample(vocabulary=97, dtype=torch.float16),
    "occurrences": lambda: penalties(counts_only=True),
    "penalties": lambda: penalties(),
    "tilt": lambda: fusion(),
    "tilt, float32": lambda: fusion(dtype=torch.float32),
    "root": lambda: fusion(is_root=True),
    "root, float32": lambda: fusion(is_root=True, dtype=torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_kernel_spills(target, tmp_path):
    lines = [f"triton {triton.__version__}", "| of | for | warps | registers | shared |"]
    wrong = []
    for name, launch in LAUNCHES.items():
        code = compiled(launch(), CAPABILITIES[target], tmp_path)
        lines.append(
            f"| {name} | {target} | {code.warps} | {code.registers} | {code.shared_bytes} B |"
        )
        if code.spills or code.stack_bytes or code.scratch_bytes:
            wrong.append(f"{name}: {code.spills} spills, {code.stack_bytes} B stack")
    print("", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)


def test_calls_share_their_kernels():
    """More rows, ids or experts compile nothing."""
    for makers in (
        [lambda n=n: sample(rows=n) for n in (2, 64, 100)],
        [lambda n=n: penalties(n_ids=n) for n in (7, 300, 512)],
        [lambda n=n: penalties(n_ids=n, counts_only=True) for n in (7, 300, 512)],
        [lambda n=n: fusion(experts=n) for n in (1, 2, 16)],
        [lambda n=n: fusion(experts=n, is_root=True) for n in (1, 2, 16)],
    ):
        assert len({source_of(make()).hash() for make in makers}) == 1
