"""The CUDA kernels' machine code, read without a GPU: tensor cores, copy engine, spills, registers.

The code is that of the build, or is compiled again from newer sources, as CMake would do.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton, which brings the disassembler, is not installed")

from triton_ahead_of_time import _cuobjdump, missing_tool

from tilewright.ops.linear import cuda_hopper

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S.*?);", re.MULTILINE)
# template arguments of packed_linear_kernel: TABLE, SUMS, TOKENS
KERNEL = re.compile(r"packed_linear_kernelILb([01])ELb([01])ELi(\d+)E")


@dataclass(frozen=True)
class Kernel:
    """Code of one kernel: its instructions in order, without predicates."""

    name: str
    registers: int
    stack_bytes: int
    code: tuple[str, ...]

    def named(self, *names: str) -> list[str]:
        return [line for line in self.code if re.split(r"[. ]", line)[0] in names]


def cuda_object(name: str, folder: Path) -> Path:
    """The object file of csrc/.../<name>.cu."""
    commands = BUILD / "compile_commands.json"
    if not commands.exists():
        pytest.skip(f"no build in {BUILD}: tilewright was not installed from this folder")
    entries = [e for e in json.loads(commands.read_text()) if Path(e["file"]).name == f"{name}.cu"]
    if not entries:
        pytest.skip(
            "tilewright._cuda is not built: no nvcc at install time, or TILEWRIGHT_CUDA=OFF"
        )
    entry = entries[0]
    built = Path(entry["directory"]) / entry["output"]
    newest_source = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.is_file())
    if not built.exists() or built.stat().st_mtime < newest_source:
        command = shlex.split(entry["command"])
        if shutil.which(command[0]) is None:
            pytest.skip(f"the compiler {command[0]} is gone, and {built.name} is older than csrc/")
        built = folder / f"{name}.o"
        command[command.index("-o") + 1] = str(built)
        subprocess.run(command, check=True, cwd=entry["directory"], timeout=600)
    return built


def kernels_of(path: Path) -> list[Kernel]:
    usage = dict(
        re.findall(r"Function (\w+):\s+(REG:\d+ STACK:\d+)", _cuobjdump("-res-usage", path))
    )
    found = []
    for part in _cuobjdump("-sass", path).split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        registers, stack = re.findall(r":(\d+)", usage[name.strip()])
        lines = tuple(INSTRUCTION.findall(code))
        found.append(Kernel(name.strip(), int(registers), int(stack), lines))
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> list[Kernel]:
    missing = missing_tool()
    if missing is not None:
        pytest.skip(missing)
    return kernels_of(cuda_object("packed_hopper", tmp_path_factory.mktemp("cuda")))


@pytest.fixture(scope="module")
def products(packed) -> dict[tuple[bool, bool, int], Kernel]:
    """(TABLE, SUMS, TOKENS) -> the kernel."""
    found = {}
    for kernel in packed:
        match = KERNEL.search(kernel.name)
        if match:
            found[match[1] == "1", match[2] == "1", int(match[3])] = kernel
    return found


def test_the_table_of_built_kernels_is_what_was_compiled(products):
    tokens = {True: cuda_hopper.SUM_TILES, False: cuda_hopper.WEIGHT_TILES}
    expected = {(table, sums, n) for table in (0, 1) for sums in (0, 1) for n in tokens[bool(sums)]}
    assert set(products) == expected


def test_nothing_spills(packed):
    for kernel in packed:
        assert kernel.stack_bytes == 0, kernel.name
        assert kernel.named("STL", "LDL") == [], kernel.name


def test_registers_leave_room_for_the_blocks(products):
    """9 warps a block, on 4 register files of 16384: two blocks at 96, one at 168. With 256 tokens
    a warp-group gives its registers away, and the others have 232."""
    for (_, _, tokens), kernel in products.items():
        assert kernel.registers <= (96 if tokens <= 32 else 168), kernel.name
        moves = kernel.named("USETMAXREG")
        assert len(moves) == (2 if tokens == 256 else 0), kernel.name
    alloc = [m for m in products[True, False, 256].named("USETMAXREG") if "ALLOC.CTAPOOL UP" in m]
    assert [m.split()[-1] for m in alloc] == [hex(232)]


def test_products_are_on_the_tensor_cores_with_the_weights_in_registers(products):
    for (_, _, tokens), kernel in products.items():
        instruction = min(tokens, 128)
        found = kernel.named("HGMMA")
        # the two halves of the unrolled loop, and the low-rank update; 4 times 16 inputs each
        assert len(found) == 3 * 4 * (tokens // instruction), kernel.name
        form = re.compile(rf"HGMMA\.64x{instruction}x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]")
        assert all(form.match(line) for line in found), kernel.name
        assert kernel.named("HMMA") == []


def test_products_of_a_step_are_waited_for_once(products):
    """One group a step: the compiler has not put a wait behind each product, and decoding of the
    next step stands between the last product and the wait."""
    for kernel in products.values():
        closing = [i for i, line in enumerate(kernel.code) if "gsb0" in line and "HGMMA" in line]
        waits = [i for i, line in enumerate(kernel.code) if "WARPGROUP.DEPBAR" in line]
        assert len(closing) == len(waits) == 3, kernel.name
        for start, end in zip(closing[:2], waits[:2], strict=True):
            between = [line.split()[0] for line in kernel.code[start:end]]
            assert "LDS.64" in between and len(between) > 64, kernel.name


def test_tiles_come_through_the_copy_engine(products):
    for kernel in products.values():
        # codes, scales, offsets, x, and the update's hidden
        assert len(kernel.named("UTMALDG")) == 5, kernel.name
        assert kernel.named("LD") == [], f"{kernel.name}: shared memory through generic addresses"


# 16 registers of two weights: shift and and-or for counting codes, rotate, shift and two and-ors
# for a lookup. Twice that, with the room that addresses and masks take, would mean that a constant
# no longer fits where it did.
DECODING = {False: ("SHF", "LOP3", 2), True: ("SHF", "LOP3", 4)}


@pytest.mark.parametrize("table", [False, True])
def test_decoding_costs_what_the_prediction_counts(products, table):
    kernel = products[table, True, 16]
    start = next(i for i, line in enumerate(kernel.code) if "gsb0" in line)
    end = next(i for i, line in enumerate(kernel.code) if "WARPGROUP.DEPBAR" in line)
    counts = Counter(re.split(r"[. ]", line)[0] for line in kernel.code[start:end])
    *names, each = DECODING[table]
    assert sum(counts[name] for name in names) <= 16 * each + 8, counts
    assert counts["LDS"] == 8 + 2 + 16 * table, counts  # words, scales of two kinds, lookups
    assert end - start <= (160 if table else 128), counts


def test_a_spill_and_a_missing_instruction_are_seen(packed):
    """The checks themselves, on a kernel that spills and has no tensor core instruction."""
    kernel = Kernel("spoilt", 255, 8, ("STL [R1], R2 ", "FFMA R0, R1, R2, R3 "))
    with pytest.raises(AssertionError):
        test_nothing_spills([kernel])
    for check in (
        test_products_are_on_the_tensor_cores_with_the_weights_in_registers,
        test_products_of_a_step_are_waited_for_once,
        test_tiles_come_through_the_copy_engine,
        test_registers_leave_room_for_the_blocks,
    ):
        with pytest.raises(AssertionError):
            check({(True, False, 256): kernel})
