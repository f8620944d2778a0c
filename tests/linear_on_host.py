"""The Hopper kernel over packed weights, run on the host; see hopper_on_host/ beside this.

Offers what tilewright._cuda offers to cuda_hopper.run, over tensors on the CPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests/hopper_on_host"
REAL = ("float32", "bfloat16", "float16")  # tw::Real


def missing_tool() -> str | None:
    """Why it cannot be built here, or None: it needs CUDA's headers, which come with nvcc."""
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


class RealArray(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int))


I64, PTR, INT, F32 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class PackedLinear(ctypes.Structure):
    """tw::PackedLinear, field by field."""

    _fields_ = (
        ("tokens", I64), ("in_features", I64), ("out_features", I64), ("x", PTR),
        ("x_stride", I64), ("codes", PTR), ("scales", RealArray), ("offsets", RealArray),
        ("group_size", I64), ("groups", I64), ("values", F32 * 16), ("counts", ctypes.c_bool),
        ("bias", RealArray), ("out_scale", RealArray), ("hidden", PTR), ("hidden_stride", I64),
        ("up", PTR), ("rank", INT), ("scale", F32), ("y", PTR), ("partial", PTR), ("tile", INT),
        ("sums", ctypes.c_bool), ("splits", INT), ("device", INT), ("stream", PTR),
    )  # fmt: skip


class NestedScales(ctypes.Structure):
    """tw::NestedScales, field by field."""

    _fields_ = (
        ("codes", PTR), ("table", PTR), ("absmax", PTR), ("offset", F32), ("block", I64),
        ("out_features", I64), ("groups", I64), ("scales", PTR), ("device", INT), ("stream", PTR),
    )  # fmt: skip


def build(folder: Path) -> ctypes.CDLL:
    library = folder / "packed_linear.so"
    subprocess.run(
        [
            "nvcc", "-x", "c++", "-std=c++17", "-O2", "-shared",
            "-Xcompiler=-fPIC,-pthread,-Wall,-Wno-attributes,-Wno-unknown-pragmas",
            "-D__launch_bounds__(...)=", "-D__grid_constant__=", f"-I{SOURCES}",
            f"-I{ROOT / 'csrc'}", SOURCES / "packed_linear.cpp", "-o", library,
        ],
        check=True, timeout=600,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.packed_linear.argtypes = [ctypes.POINTER(PackedLinear), ctypes.c_bool]
    loaded.resolve_nested_scales.argtypes = [ctypes.POINTER(NestedScales)]
    loaded.resolve_nested_scales.restype = None
    assert loaded.packed_linear_bytes() == ctypes.sizeof(PackedLinear)
    assert loaded.nested_scales_bytes() == ctypes.sizeof(NestedScales)
    return loaded


def _array(given) -> RealArray:
    return RealArray(None, 0) if given is None else RealArray(given[0], REAL.index(given[1]))


class HostModule:
    """In place of tilewright._cuda.

    late_products   products run when they are waited for, and not when they are issued
    calls           the arguments of each call of packed_linear
    """

    WRONG = ("", "a tensor map was refused", "the kernel was stuck or broke a rule")

    def __init__(self, library: ctypes.CDLL, late_products: bool):
        self.library, self.late_products, self.calls = library, late_products, []

    def packed_linear(self, *, x, hidden, scales, offsets, values, bias, out_scale, **rest):
        counts = all(v == values[0] + c and v.is_integer() for c, v in enumerate(values))
        call = PackedLinear(
            x=x[0], x_stride=x[1], hidden=hidden[0], hidden_stride=hidden[1],
            scales=_array(scales), offsets=_array(offsets), values=(F32 * 16)(*values),
            counts=counts, bias=_array(bias), out_scale=_array(out_scale), **rest,
        )  # fmt: skip
        self.calls.append(call)
        status = self.library.packed_linear(call, self.late_products)
        if status:
            raise RuntimeError(self.WRONG[status])

    def resolve_nested_scales(self, **arguments):
        self.library.resolve_nested_scales(NestedScales(**arguments))
