"""Compile a Triton launch for a GPU that is not here, and read the machine code.

Triton's wheel brings the assembler and the disassembler, so neither a driver nor a device is
needed. What the launcher would derive from its arguments (types, divisibility by 16, ones as
constants) is derived here from the same arguments, on the meta device: other facts give another
kernel.
"""

import re
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0)}  # that kernels are compiled for
# how SASS names what we count: local memory (spills), tensor cores, bulk and asynchronous copies
COUNTED = ("STL", "LDL", "HGMMA", "IGMMA", "HMMA", "IMMA", "UTMALDG", "LDGSTS", "MUFU")
# bytes of shared memory that one block can be given; 8.0 stands for 8.6, 8.9 and 12.0 too, which
# have less of it than the 163 KiB of an A100
SHARED_BYTES = {(8, 0): 99 * 1024, (9, 0): 227 * 1024}
# elements of a tile that one instruction of the copy engine moves, on each axis
BOX_ELEMENTS = 256


def _parse_in_turn():
    """CPython 3.11 counts the depth of a syntax tree for all threads at once, and fails where two
    of them make one: compilers run side by side, but parse one after the other."""
    owner = next(c for c in JITFunction.__mro__ if "parse" in vars(c))
    parse, turn = owner.parse, threading.Lock()

    def parse_alone(self):
        with turn:
            return parse(self)

    owner.parse = parse_alone


_parse_in_turn()


def missing_tool() -> str | None:
    """Why machine code cannot be made or read here, or None."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return None if tool.is_file() else f"triton {triton.__version__} brings no {tool.name}"


@dataclass(frozen=True)
class MachineCode:
    """What became of a launch. Counts are of instructions in the code, not of those executed.

    boxes           what each descriptor moves at once, on each of its axes
    scratch_bytes   memory that the kernel asks triton.set_allocator for at each launch
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    counts: Counter
    boxes: tuple[tuple[int, ...], ...]
    scratch_bytes: int

    @property
    def spills(self) -> int:
        return self.counts["STL"] + self.counts["LDL"]


def _specialised(value, parameter):
    """(type, constant, divisible by 16) as Triton's launcher would say of an argument."""
    if isinstance(value, TensorDescriptor):
        extents = ",".join(str(n) for n in value.block_shape)
        return f"tensordesc<{DTYPE_NAMES[value.base.dtype]}[{extents}]>", None, False
    if isinstance(value, torch.Tensor):
        return f"*{DTYPE_NAMES[value.dtype]}", None, True
    if isinstance(value, float):
        return "fp32", None, False
    if value is None:
        return "constexpr", None, False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return kind, None, False
    return ("constexpr", 1, False) if value == 1 else (kind, None, value % 16 == 0)


def source_of(launch) -> ASTSource:
    """What Triton compiles for a launch; two launches that agree in it share a kernel."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, constant, is_divisible = "constexpr", value, False
        else:
            kind, constant, is_divisible = _specialised(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = constant
        if is_divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(launch, capability: tuple[int, int], folder: Path) -> MachineCode:
    """The machine code of `launch` for a GPU of this compute capability."""
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    kernel = triton.compile(source_of(launch), target=target, options=options)
    cubin = folder / f"{kernel.hash}.cubin"  # launches are compiled side by side
    cubin.write_bytes(kernel.asm["cubin"])
    usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    words = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\w+)", sass, re.M))
    return MachineCode(
        registers=int(registers),
        stack_bytes=int(stack),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        counts=Counter({name: words[name] for name in COUNTED}),
        boxes=tuple(tuple(d["block_size"]) for d in kernel.metadata.tensordesc_meta or ()),
        scratch_bytes=kernel.metadata.global_scratch_size,
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [tool, option, cubin], check=True, capture_output=True, text=True, timeout=600
    ).stdout
