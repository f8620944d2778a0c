"""The Triton kernels of the norm room, compiled for sm_80 and sm_90 without a GPU.

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

from tilewright.ops.norm import triton_gpu

pytestmark = pytest.mark.usefixtures("ahead_of_time")
BFLOAT16 = torch.bfloat16
WIDTHS = (128, 4096, 8192, 16384, 50000)  # of heads, of models, the widest in registers, wider


def norms(kind, width, residual=False, n_rows=64, dtype=BFLOAT16):
    """The launches of a norm and of all its gradients."""
    x = torch.empty(n_rows, width, dtype=dtype)
    weight = torch.empty(width, dtype=dtype)
    bias = torch.empty(width, dtype=dtype) if kind == "layer" else None
    stats = torch.empty(2 if kind == "layer" else 1, n_rows)
    other = torch.empty_like(x) if residual else None
    total = torch.empty_like(x) if residual else None
    y = torch.empty_like(x)
    forward = triton_gpu.norm_launch(x, weight, bias, other, 1e-5, 0.0, kind, y, total, stats)
    found = [torch.empty_like(t) if t is not None else None for t in (x, weight, bias)]
    backward = triton_gpu.norm_backward_launches(y, other, x, weight, stats, 0.0, kind, found)
    return [forward, *backward]


def ropes(dtype=BFLOAT16, length=64, **options):
    x = torch.empty(2, length, 32, 128, dtype=dtype)
    table = torch.empty(length, 64, dtype=dtype)
    rest = {"positions": None, "interleaved": False, "heads_first": False, "inverse": False}
    return [triton_gpu.rope_launch(x, table, table, **{**rest, **options}, y=torch.empty_like(x))]


def gates(activation, n_rows=64, dtype=BFLOAT16):
    gate, up, y = (torch.empty(n_rows, 11008, dtype=dtype) for _ in range(3))
    return [
        triton_gpu.gated_launch(gate, up, activation, y),
        triton_gpu.gated_backward_launch(y, gate, up, activation, gate, up),
    ]


def embeddings(n_ids=64, dtype=BFLOAT16):
    ids, weight = torch.zeros(n_ids, dtype=torch.long), torch.empty(32000, 4096, dtype=dtype)
    y = torch.empty(n_ids, 4096, dtype=dtype)
    return [
        triton_gpu.embedding_launch(ids, weight, y),
        triton_gpu.embedding_backward_launch(y, ids, 0, False, weight),
    ]


LAUNCHES = {
    **{f"rms {width}": lambda width=width: norms("llama", width, True) for width in WIDTHS},
    **{f"layer {width}": lambda width=width: norms("layer", width) for width in (4096, 16384)},
    "rope": ropes,
    "rope, interleaved": lambda: ropes(interleaved=True),
    "silu": lambda: gates("silu"),
    "gelu": lambda: gates("gelu"),
    "gelu, tanh": lambda: gates("gelu_tanh"),
    "embedding": embeddings,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_no_kernel_spills(target, tmp_path):
    lines = [
        f"triton {triton.__version__}",
        "| kernel | of | for | warps | registers | shared |",
    ]
    wrong, seen = [], set()
    for name, launches in LAUNCHES.items():
        for launch in launches():
            identity = launch.kernel.__name__, source_of(launch).hash()
            if identity in seen:
                continue
            seen.add(identity)
            code = compiled(launch, CAPABILITIES[target], tmp_path)
            short = launch.kernel.__name__.removesuffix("_kernel")
            lines.append(
                f"| {short} | {name} | {target} | {code.warps} | {code.registers} "
                f"| {code.shared_bytes} B |"
            )
            if code.spills or code.stack_bytes or code.scratch_bytes:
                wrong.append(f"{short} of {name}: {code.spills} spills, {code.stack_bytes} B stack")
    print("", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)


def test_a_spill_is_seen(tmp_path):
    """The check itself: the widest row on one warp does not fit."""
    launch = norms("llama", 16384)[0]
    code = compiled(type(launch)(launch.kernel, 1, launch.arguments, 1), (9, 0), tmp_path)
    assert code.spills or code.stack_bytes


@pytest.mark.parametrize("make", [norms, ropes, gates, embeddings], ids=lambda f: f.__name__)
def test_shapes_share_their_kernels(make):
    """A new number of tokens compiles nothing."""

    def kernels(n):
        first = {"norms": ("llama", 4096), "gates": ("silu",)}.get(make.__name__, ())
        name = {"norms": "n_rows", "gates": "n_rows", "ropes": "length"}.get(make.__name__, "n_ids")
        return {source_of(launch).hash() for launch in make(*first, **{name: n})}

    assert kernels(33) == kernels(64) == kernels(1000)
