"""What was compiled: no wide instruction reaches a machine that lacks it, no library too many."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def output_of(*command) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, list[Path]]:
    """Level -> its object files; those older than the source are compiled again, as CMake does."""
    commands = BUILD / "compile_commands.json"
    if not commands.exists():
        pytest.skip(f"no build in {BUILD}: tilewright was not installed from this folder")
    newest_source = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.is_file())
    fresh = tmp_path_factory.mktemp("objects")
    found: dict[str, list[Path]] = {}
    for entry in json.loads(commands.read_text()):
        command = shlex.split(entry["command"])
        output = command[command.index("-o") + 1]  # older CMakes do not name it beside
        level = re.search(r"tw_cpu_(\w+)\.dir", output)
        if level is None or not Path(entry["file"]).exists():
            continue
        built = Path(entry["directory"]) / output
        if not built.exists() or built.stat().st_mtime < newest_source:
            built = fresh / f"{level[1]}-{Path(entry['file']).stem}.o"
            if shutil.which(command[0]) is None:
                pytest.skip(f"the compiler {command[0]} is gone")
            command[command.index("-o") + 1] = str(built)
            subprocess.run(command, check=True, cwd=entry["directory"])
        found.setdefault(level[1], []).append(built)
    return found


# a leading v is a VEX or EVEX encoding; verr and verw are old and harmless
WIDE = re.compile(r"\t(?!verr|verw)v\w+|%[yz]mm\d|%k[0-7]\b")
EVEX = re.compile(r"%zmm\d|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])\b")
DOTS = re.compile(r"\tv(?:dpbf16ps|cvtneps2bf16|cvtne2ps2bf16|pdpbusds?|pdpwssds?)\b")
TILES = re.compile(r"\t(?:tile\w+|tdp\w+|ldtilecfg|sttilecfg)\b|%tmm\d")

# level: what none of its objects may hold
FORBIDDEN = {"portable": WIDE, "avx2": EVEX, "avx512": DOTS, "avx512_bf16": TILES}


@pytest.mark.parametrize("level", FORBIDDEN)
def test_a_level_holds_no_instruction_of_a_higher_one(objects, level):
    if level not in objects:
        pytest.skip(f"level {level} is not built on this processor family")
    for path in objects[level]:
        code = output_of("objdump", "-d", "--no-show-raw-insn", path)
        wide = [line for line in code.splitlines() if FORBIDDEN[level].search(line)]
        assert wide == [], f"{path.name} at level {level}"


def test_the_patterns_recognise_what_they_forbid(objects):
    if "amx" not in objects:
        pytest.skip("no wide level is built on this processor family")
    wider = {"portable": "avx2", "avx2": "avx512", "avx512": "avx512_bf16", "avx512_bf16": "amx"}
    for level, above in wider.items():
        code = [output_of("objdump", "-d", "--no-show-raw-insn", p) for p in objects[above]]
        assert any(FORBIDDEN[level].search(text) for text in code)


def leaking_symbols(symbols: str, level: str) -> list[str]:
    """Lines of `nm -C --defined-only` that the linker could share between levels.

    Lower case is local to the object. Weak ones (W, V, u) are merged with those of other objects.
    """
    leaks = []
    for line in symbols.splitlines():
        match = re.match(r"[0-9a-f]* +(\w) (.*)", line)
        if match is None:
            continue
        kind, name = match.groups()
        if kind in "WwVvu" or (kind.isupper() and not name.startswith(f"tw::{level}::")):
            leaks.append(line)
    return leaks


def test_objects_define_nothing_but_their_levels_own_symbols(objects):
    for level, paths in objects.items():
        for path in paths:
            symbols = output_of("nm", "-C", "--defined-only", path)
            assert f"tw::{level}::" in symbols, f"{path.name} defines no kernel"
            assert leaking_symbols(symbols, level) == [], f"{path.name} at level {level}"


def test_a_shared_inline_function_is_called_a_leak(tmp_path):
    source = tmp_path / "leak.cpp"
    source.write_text(
        "inline int shared(int x) { static int n; return n += x; }\n"
        "namespace tw { namespace avx2 { int kernel(int x) { return shared(x); } } }\n"
        "namespace tw { int helper(int x) { return x; } }\n"
    )
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path / "leak.o"
    subprocess.run([compiler, "-O0", "-c", source, "-o", built], check=True)
    leaks = leaking_symbols(output_of("nm", "-C", "--defined-only", built), "avx2")
    assert {line.split(maxsplit=2)[2] for line in leaks} >= {"shared(int)", "tw::helper(int)"}
    assert not any("kernel" in line for line in leaks)


def needed_libraries(path: str) -> set[str]:
    dynamic = output_of("readelf", "-d", path)
    return {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic)}


ALWAYS_THERE = {"libc", "libm", "libgcc_s", "libstdc++", "libpthread", "libdl", "librt"}


def is_system_library(name: str) -> bool:
    return name in ALWAYS_THERE or name.startswith("ld-linux")


def test_the_cpu_module_needs_the_cpp_and_openmp_libraries_alone():
    libraries = needed_libraries(native.native().__file__)
    assert {name for name in libraries if not is_system_library(name)} <= {"libgomp", "libomp"}


def test_the_cpu_module_asks_openmp_for_nothing_newer_than_torchs_copy_has():
    versions = output_of("objdump", "-T", native.native().__file__)
    newer = [v for v in re.findall(r"\bGOMP_(\d+\.\d+)", versions) if float(v) > 5.0]
    assert newer == []


def test_the_cuda_module_needs_no_driver():
    built = sorted(Path(native.__file__).parent.glob("_cuda.*.so"))
    if not built:
        pytest.skip(
            "tilewright._cuda is not built: no nvcc at install time, or TILEWRIGHT_CUDA=OFF"
        )
    for path in built:
        libraries = needed_libraries(str(path))
        assert {name for name in libraries if not is_system_library(name)} == set()


def test_why_cuda_cannot_run_is_said_in_words():
    why_not = native.why_not_cuda()
    if why_not is None:
        assert native.native_cuda().why_not() is None
        return
    with pytest.raises(RuntimeError, match=re.escape(why_not)):
        native.native_cuda()
    assert native.why_not_cuda(device=99) is not None
