"""What the launchers of Triton kernels share: a launch as a value, and whether one can be."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from triton.runtime.jit import KernelInterface

from tilewright import settings


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with; tests compile it without starting it."""

    kernel: KernelInterface
    programs: int
    arguments: dict
    num_warps: int = 4
    num_stages: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self) -> None:
        if self.programs == 0:
            return
        options = {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip
        on_device = (
            torch.cuda.device(self.device)
            if self.device.type == "cuda"
            else contextlib.nullcontext()
        )
        with on_device:
            self.kernel[(self.programs,)](**self.arguments, **options)


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """None if Triton kernels can run here on tensors of this kind, else the reason."""
    interpreted = settings.triton_is_interpreted()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is not among float32, bfloat16, float16"
    if interpreted:
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return None
    if device != "cuda":
        return f"tensors are on {device}, and TRITON_INTERPRET is not 1"
    if torch.version.hip:
        return "written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "needs compute capability 8.0, this GPU has {}.{}".format(*capability)
    return None


def capability_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The GPU's compute capability, None under the interpreter."""
    if settings.triton_is_interpreted():
        return None
    return torch.cuda.get_device_capability(tensor.device)


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """The small tensors of a call, whose strides the kernels do not take."""
    return None if t is None else t.contiguous()


def seed_on(seed: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The dropout seed on the device. A copy from the CPU would wait for all that is queued there,
    and could not be captured in a graph; filling in the number does neither."""
    if seed is None:
        return None
    if seed.device.type == "cpu" and device.type != "cpu":
        return torch.full((1,), int(seed.item()), dtype=torch.int64, device=device)
    return seed.to(device)


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """(blocks, lines, 64) bytes as (blocks, lines, 16) words."""
    codes = codes.contiguous()
    if codes.storage_offset() % 4:
        codes = codes.clone()
    return codes.view(torch.int32)
