"""The rules of the house, read off the files: who may know whom, names, lengths, the READMEs."""

import ast
import fnmatch
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tilewright.ops
from tilewright import settings

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py"))
OPERATOR_ROOMS = [room for room in ROOMS if room != "common"]
IGNORED = [*(ROOT / ".gitignore").read_text().split(), ".git/", ".git"]  # a file in a worktree


def ignored(path: Path) -> bool:
    """Whether .gitignore leaves this file or folder out; its patterns are plain names here."""
    for pattern in IGNORED:
        if pattern.endswith("/") and not path.is_dir():
            continue
        if fnmatch.fnmatch(path.name, pattern.rstrip("/")):
            return True
    return False


def walk(folder: Path):
    for path in sorted(folder.iterdir()):
        if ignored(path):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


FILES = list(walk(ROOT))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def under(*folders: str, suffixes=(".py",)) -> list[Path]:
    return [
        path
        for path in FILES
        if path.suffix in suffixes and relative(path).split("/")[0] in folders
    ]


CPP = (".cpp", ".h", ".cu", ".cuh")


# --- who may know whom ---


def imports(path: Path, package: str = "") -> set[str]:
    """Full dotted names of all that a Python file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def foreign(names: set[str], allowed) -> list[str]:
    """What is neither in the standard library nor in `allowed`."""
    return sorted(
        name
        for name in names
        if name.split(".")[0] not in sys.stdlib_module_names and not within(name, allowed)
    )


CORE = tuple(
    f"tilewright.{name}"
    for name in ("shapes", "choose", "settings", "native", "direct", "recording", "files")
)
# what one file of a room reads a foreign format with
READS_WITH = {"kernels/quant/gguf.py": ("gguf", "numpy")}
COMPILED = ("tilewright._C", "tilewright._cuda")


def offenders(paths, wrong) -> dict[str, list]:
    """File -> what `wrong(path)` lists against it, where that is anything."""
    found = {relative(path): sorted(wrong(path)) for path in paths}
    assert found, "no file to look at"
    return {path: things for path, things in found.items() if things}


def test_a_room_knows_torch_triton_the_compiled_modules_and_the_core():
    def wrong(path):
        room = f"tilewright.ops.{path.relative_to(ROOT / 'kernels').parts[0]}"
        known = ("torch", "triton", "tilewright.ops.common", room, *COMPILED, *CORE)
        return foreign(imports(path), (*known, *READS_WITH.get(relative(path), ())))

    assert offenders(under("kernels"), wrong) == {}


IMPLEMENTATION = re.compile(r"(cpp|triton|cuda)_\w+$")


def test_inside_a_room_imports_point_from_api_to_op_to_implementations():
    def wrong(path):
        names = imports(path)
        prefix = f"tilewright.ops.{path.parent.name}."
        siblings = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
        if path.stem == "reference":
            return foreign(names, ("torch",))
        if path.stem == "op":
            return siblings & {"api"}
        if IMPLEMENTATION.match(path.stem):
            family = path.stem.split("_")[0] + "_"
            others = {s for s in siblings if IMPLEMENTATION.match(s) and not s.startswith(family)}
            return others | siblings & {"api", "op", "reference"}
        return []

    assert offenders(under("kernels"), wrong) == {}


# the part of engine/ that rooms may know must know no more than itself
CORE_FILES = {"engine/" + name.split(".")[1] + ".py" for name in CORE}


def test_the_engine_uses_the_front_desk_alone():
    rooms = [f"tilewright.ops.{room}" for room in ROOMS]

    def wrong(path):
        names = imports(path)
        if relative(path) in CORE_FILES:
            return {n for n in names if within(n, ["tilewright"]) and not within(n, CORE)}
        if relative(path) == "engine/ops/__init__.py":  # takes public names from a room's top
            return {n for n in names if within(n, rooms) and n.count(".") > 3}
        return {n for n in names if within(n, [*rooms, *COMPILED])}

    assert offenders(under("engine"), wrong) == {}


def test_nothing_knows_the_tests_or_the_benchmarks():
    test_modules = {p.stem for p in under("tests")} | {"tests", "pytest"}

    def wrong(path):
        names = imports(path)
        found = {n for n in names if n.split(".")[0] in test_modules}
        # the command line starts the benchmarks, and nothing else does
        if relative(path).split("/")[0] != "bench" and relative(path) != "engine/cli.py":
            found |= {n for n in names if within(n, ["tilewright.bench"])}
        return found

    assert offenders(under("engine", "kernels", "bench"), wrong) == {}


def test_the_import_checks_see_through_every_form(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import a.b\ndef f():\n    from tilewright.ops.x import y as z\n")
    assert imports(file) == {"a.b", "tilewright.ops.x.y"}
    assert foreign(imports(file), ["a"]) == ["tilewright.ops.x.y"]
    assert foreign({"os.path", "torchvision"}, ["torch"]) == ["torchvision"]


INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)', re.MULTILINE)
FRAMEWORK = re.compile(r"(torch|ATen|c10|caffe2)/|Python\.h|pybind11/")


def includes(path: Path) -> list[tuple[str, str]]:
    return INCLUDE.findall(path.read_text())


def test_csrc_knows_the_cpp_library_alone():
    def wrong(path):
        own = (path.relative_to(ROOT / "csrc").parts[0], "common")
        for bracket, name in includes(path):
            if FRAMEWORK.match(name) or (bracket == '"' and name.split("/")[0] not in own):
                yield name

    assert offenders(under("csrc", suffixes=CPP), wrong) == {}


def test_bindings_know_csrc_and_pybind11():
    def wrong(path):
        for _, name in includes(path):
            if FRAMEWORK.match(name) and not name.startswith("pybind11/"):
                yield name

    assert offenders(under("bindings", suffixes=CPP), wrong) == {}


# with -mavx512f, an inline function of the C++ library may become the copy that all others run
C_HEADERS = {
    "float.h", "immintrin.h", "limits.h", "math.h", "omp.h", "stddef.h", "stdint.h", "string.h",
}  # fmt: skip


def test_files_that_are_compiled_per_level_include_no_cpp_library_header():
    seen, pending = set(), [p for p in under("csrc", suffixes=(".cpp",)) if p.stem.endswith("_cpu")]
    while pending:
        path = pending.pop()
        seen.add(path)
        inner = (ROOT / "csrc" / name for bracket, name in includes(path) if bracket == '"')
        pending += [p for p in inner if p not in seen]

    def wrong(path):
        return {name for bracket, name in includes(path) if bracket == "<"} - C_HEADERS

    assert offenders(seen, wrong) == {}


LEVEL_CONDITION = re.compile(r"^\s*#\s*(?:if|elif|ifdef).*(?:__AVX|__SSE|TW_ISA_).*", re.MULTILINE)
MAY_ASK_THE_LEVEL = {
    "csrc/common/vec.h": "holds what differs between levels",
    "csrc/common/vec_codes.h": "the same for codes of packed weights",
    "csrc/common/matrix_unit.h": "the same for the one level with a matrix unit",
    "csrc/bench/ceilings_cpu.cpp": "measures one instruction that only one level has",
}


def test_few_files_ask_for_the_level():
    asking = offenders(
        under("csrc", suffixes=CPP), lambda path: LEVEL_CONDITION.findall(path.read_text())
    )
    assert set(asking) - set(MAY_ASK_THE_LEVEL) == set()


# --- names, lengths, habits ---

LONGER_THAN_600: dict[str, str] = {}  # path: reason


def test_no_file_is_longer_than_600_lines():
    code = under("engine", "kernels", "bench", "tests", "csrc", "bindings", suffixes=(".py", *CPP))
    lengths = {relative(p): len(p.read_text().splitlines()) for p in code}
    assert {p: n for p, n in lengths.items() if n > 600 and p not in LONGER_THAN_600} == {}


def test_cpp_lines_have_at_most_110_characters():
    def wrong(path):
        return [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]

    assert offenders(under("csrc", "bindings", suffixes=CPP), wrong) == {}


def test_nothing_is_left_to_do():
    mark = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    texts = [p for p in FILES if p.suffix in (".py", ".md", ".txt", ".toml", ".sh", *CPP)]
    assert offenders(texts, lambda path: mark.findall(path.read_text())) == {}


@pytest.mark.parametrize("room", OPERATOR_ROOMS)
def test_a_room_has_one_name_on_every_floor(room):
    floors = [f"kernels/{room}/{name}" for name in ("README.md", "api.py", "op.py", "reference.py")]
    floors += [f"tests/test_{room}.py", f"bench/bench_{room}.py"]
    if (ROOT / "kernels" / room / "cpp_cpu.py").exists():
        floors += [f"csrc/{room}", f"bindings/{room}.cpp"]
    assert [floor for floor in floors if not (ROOT / floor).exists()] == []


def test_every_floor_names_rooms_alone():
    known = {*ROOMS, "common"}
    csrc = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()}
    assert csrc - known == {"bench"}  # what the benchmarks measure the machine with
    bindings = {p.stem for p in (ROOT / "bindings").glob("*.cpp")}
    of_rooms = known | {f"cuda_{room}" for room in known}
    assert bindings - of_rooms == {"module", "cuda_module", "ceilings", "recording"}
    benchmarks = {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}
    # models end to end, which have no room of their own
    assert benchmarks - known == {"decoder", "encoder", "training"}


def test_a_room_and_a_public_function_never_share_a_name():
    assert set(ROOMS) & set(tilewright.ops.__all__) == set()


OPERATORS = [
    name
    for name in tilewright.ops.__all__
    if isinstance(getattr(tilewright.ops, name), types.FunctionType)
]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_docstring_of_a_public_operator_is_complete(name):
    text = inspect.getdoc(getattr(tilewright.ops, name)) or ""
    assert re.search(r"\([A-Z]\w*( \+ 1)?,", text), "no shape such as (B, L, H, D)"
    assert "Source:" in text
    assert "ValueError" in text, "does not say what is refused"
    signature = inspect.signature(getattr(tilewright.ops, name))
    unnamed = [p for p in signature.parameters if not re.search(rf"\b{p}\b", text)]
    assert unnamed == [], f"arguments that the docstring does not name: {unnamed}"


# --- environment, foreign files ---

READS_ENVIRONMENT = re.compile(r"\b(?:environ|getenv)\b")


def test_the_environment_is_read_in_settings_alone():
    code = under("engine", "kernels", "bench", "csrc", "bindings", suffixes=(".py", *CPP))
    reading = offenders(code, lambda path: READS_ENVIRONMENT.findall(path.read_text()))
    assert set(reading) == {"engine/settings.py"}


def test_the_readme_and_settings_agree_on_the_variables():
    variable = r"(?:TILEWRIGHT|TRITON)_\w+"
    read = set(re.findall(f'"({variable})"', (ROOT / "engine/settings.py").read_text()))
    assert read == set(settings.VARIABLES)
    read |= set(re.findall(f"'({variable})'", (ROOT / "setup.py").read_text()))
    assert set(re.findall(f"`({variable})", (ROOT / "README.md").read_text())) == read


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_no_file_is_ever_unpickled():
    def wrong(path):
        yield from (n for n in imports(path) if n.split(".")[0] in PICKLES)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                yield f"torch.load in line {node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                if ast.unparse(node.value) != "False":
                    yield f"allow_pickle in line {node.value.lineno}"

    assert offenders(under("engine", "kernels", "bench"), wrong) == {}


# --- the root folder must not pass for Hugging Face's package `kernels` ---


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def python_in_root(code: str, **environment):
    """Run code as a user's `python -c` in the source folder, which puts that folder on the path."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_transformers_imports_from_the_root():
    done = python_in_root("import transformers.models.llama.modeling_llama, tilewright")
    assert done.returncode == 0, done.stderr


def test_the_real_kernels_package_is_found_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("name = 'the real one'")
    done = python_in_root("import kernels; print(kernels.name)", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "the real one", done.stderr


def test_the_package_refuses_another_name():
    done = python_in_root("import engine")
    assert "imported as 'tilewright', not as 'engine'" in done.stderr


# --- the READMEs ---

READMES = [p for p in FILES if p.name == "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(path.read_text()) if name == language]


def read_tree(text: str) -> dict[str, set[str]]:
    """Folder -> the names drawn below it, from lines of `name   caption` indented by two spaces."""
    drawn: dict[str, set[str]] = {"": set()}
    parents: list[str] = []
    for line in text.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2
        folder = "/".join(part.rstrip("/") for part in parents[:depth])
        drawn.setdefault(folder, set()).add(name)
        parents = [*parents[:depth], name]
    return drawn


def on_disk(folder: Path) -> set[str]:
    return {
        path.name + "/" * path.is_dir()
        for path in folder.iterdir()
        if not ignored(path) and (path.is_file() or any(walk(path)))
    }


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_a_tree_drawn_in_a_readme_is_the_tree_on_disk(readme):
    trees = blocks(readme, "tree")
    assert trees or readme.parent != ROOT, "README.md draws no tree"
    for tree in trees:
        for folder, names in read_tree(tree).items():
            assert names == on_disk(readme.parent / folder), f"{relative(readme)}: {folder or '.'}/"


def test_the_tree_check_sees_what_is_missing_and_what_is_too_much():
    drawn = read_tree("a/   one\n  b.py   two\n  c/\n    d\ne   three\n")
    assert drawn == {"": {"a/", "e"}, "a": {"b.py", "c/"}, "a/c": {"d"}}


def test_the_example_in_the_readme_runs_as_it_stands(tmp_path):
    example = blocks(ROOT / "README.md", "python")[0]
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the example shows nothing"
