"""The Triton kernel of the loss room, compiled for sm_80 and sm_90 without a GPU.

It is compiled as `triton_gpu.py` would start it, tile sizes and warps included.
"""

import pytest
import torch

from tilewright import settings

if settings.triton_is_interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton_ahead_of_time import CAPABILITIES, compiled, source_of

from tilewright.ops.loss import triton_gpu
from tilewright.ops.loss.problem import Found, Head, Upstream

pytestmark = pytest.mark.usefixtures("ahead_of_time")


def launch(
    n_rows=64, n_classes=128256, n_ids=1, dtype=torch.bfloat16, upstream="ids", softcap=0.0,
    weighted=False, is_backward=False,
):  # fmt: skip
    """upstream: what of a loss has a gradient; "" for statistics alone."""
    logits = torch.empty(n_rows, n_classes, dtype=dtype)
    per_token = torch.empty(n_rows)
    head = Head(
        logits, logits, torch.empty(n_classes) if weighted else None,
        torch.zeros(n_rows, n_ids, dtype=torch.long),
        torch.empty(n_classes) if weighted else None, 1.0, softcap,
    )  # fmt: skip
    of_ids = torch.empty(n_rows, n_ids)
    up = None
    if upstream:
        rest = [per_token if part in upstream else None for part in ("total", "lse", "square")]
        up = Upstream(of_ids, *rest)
    total = per_token if "total" in upstream and not is_backward else None
    found = Found(of_ids, per_token, total, torch.empty(2, n_rows))
    return triton_gpu.head_rows_launch(head, logits, up, found, is_backward)


LAUNCHES = {
    "statistics": dict(upstream=""),
    "cross-entropy": {},
    "cross-entropy, float32": dict(dtype=torch.float32),
    "cross-entropy, few classes": dict(n_classes=33),
    "with everything": dict(upstream="ids total square", softcap=30.0, weighted=True),
    "backward": dict(upstream="ids total lse", is_backward=True),
    "32 soft targets": dict(n_ids=32),
    "128 soft targets": dict(n_ids=128),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_kernel_spills(target, tmp_path):
    lines = [f"triton {triton.__version__}", "| of | for | warps | registers | shared |"]
    wrong = []
    for name, options in LAUNCHES.items():
        code = compiled(launch(**options), CAPABILITIES[target], tmp_path)
        lines.append(
            f"| {name} | {target} | {code.warps} | {code.registers} | {code.shared_bytes} B |"
        )
        if code.spills or code.stack_bytes or code.scratch_bytes:
            wrong.append(f"{name}: {code.spills} spills, {code.stack_bytes} B stack")
    print("", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)


def test_shapes_share_their_kernels():
    """A new number of tokens compiles nothing."""
    assert len({source_of(launch(n_rows=n)).hash() for n in (33, 64, 1000)}) == 1
