"""Files that are whole or absent: written beside, flushed to the disk, renamed; and what is read
from elsewhere, checked before use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(ValueError):
    """Something that the user gave cannot be used; one sentence says what to do."""


class WriteError(OSError):
    """A file could not be written; what was there before is unchanged."""

    def __init__(self, path: Path, error: Exception):
        while isinstance(error.__cause__, Exception) and isinstance(error, WriteError):
            error = error.__cause__  # a file of a folder: the folder is what the user knows
        reason = getattr(error, "strerror", None) or str(error)
        super().__init__(
            f"cannot write {path}: {reason}; free space or choose another folder, "
            "what was there before is unchanged"
        )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it becomes `path` if the block ends.

    On any error the half-written thing is removed and what was at `path` stays. A folder with
    something in it is never replaced. WriteError: a full disk, a read-only folder and the like.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _writing(path, beside):
        yield beside
        _flush(beside)
        os.replace(beside, path)
        _flush_one(path.parent)


@contextmanager
def replacing_files(folder: str | Path, last: str) -> Iterator[Path]:
    """A new folder whose files replace those of the same name in `folder` if the block ends well.

    last   the name of the file that is moved at the end, when the others are in their places
    """
    folder = Path(folder)
    beside = folder / f".{os.getpid()}.partial"
    with _writing(folder, beside):
        beside.mkdir(parents=True)
        yield beside
        _flush(beside)
        for path in sorted(beside.iterdir(), key=lambda p: (p.name == last, p.name)):
            os.replace(path, folder / path.name)
        _flush_one(folder)


@contextmanager
def _writing(path: Path, beside: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(path, error) from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    for inner in sorted(path.rglob("*")) if path.is_dir() else []:
        _flush_one(inner)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def write_tensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    with replacing(path) as beside:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, beside, metadata=metadata)


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. InputError: no such file, or not a JSON object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); restore it from its source"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, need an object")
    return value


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, after `check_safetensors`."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors file's header, after `check_safetensors`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(
            f"{path} is damaged, though of the right length ({error}); copy or download it again"
        ) from error


def check_safetensors(path: str | Path) -> None:
    """Compare the header's promise with the file's length; no tensor is read.

    Layout: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
    InputError: the file is absent, cut short, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes < 8 or header_bytes > n_bytes - 8:
            raise InputError(
                f"{path} is truncated or not a safetensors file ({n_bytes} bytes, its header alone "
                f"needs {8 + header_bytes}); copy or download it again"
            )
        try:
            header = json.loads(file.read(header_bytes))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} has a damaged safetensors header ({error}); copy or download it again"
            ) from error
    needed = 8 + header_bytes + max(ends, default=0)
    if n_bytes != needed:
        raise InputError(
            f"{path} is truncated or damaged: its header describes {needed} bytes, the file has "
            f"{n_bytes}; copy or download it again"
        )
