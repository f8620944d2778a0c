"""The one text that our safetensors files keep in their header: JSON with a version and texts.

It is the only one, because safetensors writes several in no fixed order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.files import InputError, read_metadata

VERSION = 1


def header_of(function: str, key: str, metadata: Mapping[str, str] | None, **entries) -> dict:
    """The header's texts: `entries` and `metadata` under `key`.

    ValueError: metadata is not text by name.
    """
    texts = dict(metadata or {})
    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{function}: metadata has {name!r}: {text!r}, need texts by name")
    header = {"version": VERSION, **entries, "metadata": texts}
    return {key: json.dumps(header, allow_nan=False)}


def read_header(function: str, path: str | Path, key: str, what: str) -> dict[str, Any]:
    """What `header_of` made, from a file; "metadata" is a dictionary of texts.

    what   the file holds, in words
    ValueError: it holds none, or the header is damaged or of another version.
    """
    texts = read_metadata(path)
    if key not in texts:
        raise InputError(f"{function}: {path} holds no {what} (no {key} in its header)")
    try:
        header = dict(json.loads(texts[key]))
        version = header["version"]
        header["metadata"] = {str(n): str(text) for n, text in header["metadata"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(function, path, f"its header cannot be read: {error!r}") from error
    if version != VERSION:
        raise InputError(
            f"{function}: {path} has version {version}, need {VERSION}; write it again"
        )
    return header


def damaged(function: str, path: str | Path, reason: str) -> InputError:
    return InputError(f"{function}: {path} is damaged: {reason}; copy or write it again")
