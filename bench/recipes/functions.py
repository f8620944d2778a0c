"""Documented functions of the standard library: what they say they do, and their code."""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Function:
    """One function of a module.

    package    the topmost folder or file below the library, such as "email" or "shutil"
    module     its file's path below the library
    summary    the first line of its docstring
    signature  its `def` line or lines
    body       the rest of its code, without the docstring
    """

    package: str
    module: str
    summary: str
    signature: str
    body: str

    @property
    def code(self) -> str:
        return f"{self.signature}\n{self.body}"


# not the library's own, or tests and an application, which not every Python comes with
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


@functools.cache
def documented_functions() -> tuple[Function, ...]:
    """Functions with a docstring whose first line has three words, and two lines of code or more.

    The order is that of a digest of each file's path: the same on every machine with one Python.
    A summary that comes twice is taken once.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p for p in library.rglob("*.py") if not SKIPPED & set(p.relative_to(library).parts)
    ]  # fmt: skip
    files.sort(key=lambda p: hashlib.sha256(p.relative_to(library).as_posix().encode()).digest())
    found: dict[str, Function] = {}
    for path in files:
        name = path.relative_to(library)
        try:
            source = path.read_bytes().decode("utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError, OSError):
            continue  # a few tests are broken on purpose
        package = name.parts[0].removesuffix(".py")
        for function in _of(tree, source.splitlines(), package, name.as_posix()):
            found.setdefault(function.summary, function)
    return tuple(found.values())


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those of a module and of its classes, not those within functions."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body)


def _of(tree: ast.Module, lines: list[str], package: str, module: str) -> Iterator[Function]:
    for node in _functions(tree.body):
        text = (ast.get_docstring(node) or "").strip()
        docstring = node.body[0]
        if len(text.split("\n")[0].split()) < 3 or len(node.body) < 2:
            continue
        end = docstring.end_lineno or docstring.lineno
        signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring.lineno - 1]))
        body = "\n".join(lines[end : node.end_lineno]).strip("\n")
        if not signature.strip() or body.count("\n") < 1:
            continue
        summary = text.split("\n")[0].strip()
        yield Function(package, module, summary, signature.strip(), body)


def is_held_out(path: Path) -> bool:
    """Whether a file below the library belongs to the fifth of the packages that is held out.

    Which ones is a digest of their names, so nothing of a held-out package is among the rest.
    """
    package = path.parts[0].removesuffix(".py")
    return hashlib.sha256(package.encode()).digest()[0] % 5 == 0


def apart(functions: Iterable[Function]) -> tuple[list[Function], list[Function]]:
    """Those to train on, and those of the held-out packages."""
    kept: tuple[list[Function], list[Function]] = ([], [])
    for function in functions:
        kept[is_held_out(Path(function.module))].append(function)
    return kept
