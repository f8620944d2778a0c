"""The only reader of environment variables. `tilewright doctor` prints all of them.

TILEWRIGHT_IMPL   an implementation's name; takes the place of impl="auto" everywhere
TILEWRIGHT_ISA    a CPU level at or below the machine's own: portable, avx2, avx512, avx512_bf16,
                  amx
TRITON_INTERPRET  Triton's own switch: "1" runs its kernels in the interpreter, on the CPU
"""

import os

VARIABLES = ("TILEWRIGHT_IMPL", "TILEWRIGHT_ISA", "TRITON_INTERPRET")


def forced_impl() -> str | None:
    """The implementation that takes the place of "auto", or None."""
    return os.environ.get("TILEWRIGHT_IMPL") or None


def forced_isa() -> str | None:
    """The CPU level to use instead of the best one, or None."""
    return os.environ.get("TILEWRIGHT_ISA") or None


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter; fixed when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def describe() -> dict[str, str]:
    """Each variable that is set, with its value."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
