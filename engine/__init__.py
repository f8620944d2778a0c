"""tilewright: hand-written kernels behind the operators of PyTorch and Hugging Face models."""

if __name__ != "tilewright":
    raise ImportError(
        f"this package is imported as 'tilewright', not as {__name__!r}; "
        "leave the source folder or install it with `pip install -e .`"
    )

# torch first: the kernels' OpenMP regions must bind to the runtime that torch has loaded
import torch  # noqa: F401

from tilewright.adapt import accelerate, restore
from tilewright.choose import explain
from tilewright.generate import generate
from tilewright.ops import (
    ShiftedSegments,
    flash_attention,
    flash_decode,
)
from tilewright.train import finetune

__version__ = "0.1.0"

__all__ = [
    "ShiftedSegments",
    "__version__",
    "accelerate",
    "explain",
    "finetune",
    "flash_attention",
    "flash_decode",
    "generate",
    "restore",
]
