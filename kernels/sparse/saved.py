"""Sparse deltas in a safetensors file, their places as steps.

Each delta `name` is stored as name.values (N,), and as name.steps: the differences of its places,
less one, in units. A unit that is all ones means that the step goes on in the next, so that a step
s takes s // m + 1 units of the largest value m: those of 8 bits where the mean step is short, of 16
bits where it is long. Of a delta in blocks they are the places of blocks, and its values stand
block by block. The header's text `tilewright.deltas` is JSON: {"version": 1, "deltas": {name:
shape}, "metadata": {}}, a shape being [O, I] or [O, I, rows, columns of a block].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from tilewright.files import InputError, read_tensors, write_tensors
from tilewright.ops.common.saved_header import damaged, header_of, read_header
from tilewright.ops.common.sparse_delta import VALUE_DTYPES, WeightDelta

HEADER = "tilewright.deltas"
LONG_MEAN_STEP = 256  # from which units of 16 bits are fewer bytes


class SavedDeltas(NamedTuple):
    """What a file of sparse deltas holds.

    deltas     by name
    metadata   the texts that were saved with them
    """

    deltas: dict[str, WeightDelta]
    metadata: dict[str, str]


def encode_places(places: torch.Tensor, size: int) -> torch.Tensor:
    """Ascending flat places below `size` -> units, uint8 or uint16."""
    if not len(places):
        return torch.zeros(0, dtype=torch.uint8)
    steps = places.diff(prepend=places.new_full((1,), -1)) - 1
    kind = torch.uint16 if size >= LONG_MEAN_STEP * len(places) else torch.uint8
    most = torch.iinfo(kind).max
    more = steps // most
    ends = (more + 1).cumsum(0) - 1
    units = torch.full((int(ends[-1]) + 1,), most, dtype=torch.int64)
    units[ends] = steps - more * most
    return units.to(kind)


def decode_places(units: torch.Tensor) -> torch.Tensor:
    """The inverse of encode_places; what goes on past the last unit is left out."""
    most = torch.iinfo(units.dtype).max
    wide = units.to(torch.int64)
    ends = (wide != most).nonzero()[:, 0]
    return wide.cumsum(0)[ends] + torch.arange(len(ends))


def save_deltas(
    path: str | Path,
    deltas: Mapping[str, WeightDelta],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write sparse deltas to a safetensors file, whole or not at all.

    path       of the file; what was there before stays if anything goes wrong
    deltas     by name, such as "model.layers.0.mlp.up_proj.weight"; each is (O, I)
    metadata   texts to keep with them

    Places are stored as their differences: about one byte for a value at densities of 0.5 % and
    more, two below. The same deltas and texts give the same bytes.
    ValueError: metadata is not text by name. OSError: the file cannot be written.

    Source: the safetensors format, github.com/huggingface/safetensors.
    """
    tensors, shapes = {}, {}
    for name, delta in deltas.items():
        delta.expect_whole("save_deltas")
        size = delta.out_features * delta.in_features // math.prod(delta.block)
        shapes[name] = list(delta.shape)
        if delta.block == (1, 1):
            places, values = delta.places(), delta.values
        else:
            places, values = delta.blocks()
            shapes[name] += delta.block
        tensors[f"{name}.steps"] = encode_places(places.cpu(), size)
        tensors[f"{name}.values"] = values.detach().cpu().flatten().clone()
    write_tensors(path, tensors, header_of("save_deltas", HEADER, metadata, deltas=shapes))


def load_deltas(path: str | Path, device: torch.device | str = "cpu") -> SavedDeltas:
    """Read what `save_deltas` wrote; every shape, dtype and place is checked.

    path     of the file
    device   where the tensors go

    Returns the deltas (O, I) by name and the texts saved with them.
    ValueError: no such file; a truncated, damaged or foreign one.

    Source: the safetensors format, github.com/huggingface/safetensors.
    """
    header = read_header("load_deltas", path, HEADER, "deltas")
    try:
        shapes = {str(n): _shape_and_block(*s) for n, s in header["deltas"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header cannot be read: {error!r}") from error
    tensors = read_tensors(path)
    deltas = {name: _delta(path, name, *shape, tensors) for name, shape in shapes.items()}
    if tensors:
        raise _damaged(path, f"its header does not tell of {', '.join(sorted(tensors))}")
    return SavedDeltas({name: d.to(device) for name, d in deltas.items()}, header["metadata"])


def _shape_and_block(n_out, n_in, rows=1, columns=1) -> tuple[tuple[int, int], tuple[int, int]]:
    return (int(n_out), int(n_in)), (int(rows), int(columns))


def _delta(path, name, shape, block, tensors) -> WeightDelta:
    values, units = (tensors.pop(f"{name}.{part}", None) for part in ("values", "steps"))
    if values is None or units is None:
        raise _damaged(path, f"{name} has no {'values' if values is None else 'steps'}")
    if values.dtype not in VALUE_DTYPES or values.dim() != 1:
        raise _damaged(path, f"{name}.values is {values.dtype} of shape {tuple(values.shape)}")
    if units.dtype not in (torch.uint8, torch.uint16) or units.dim() != 1 or min(shape) < 0:
        raise _damaged(path, f"{name}.steps is {units.dtype} of shape {tuple(units.shape)}")
    places = decode_places(units)
    if len(places) * math.prod(block) != len(values) or min(block) < 1:
        raise _damaged(path, f"{name} has {len(places)} places and {len(values)} values")
    try:
        if block != (1, 1):
            values = values.view(-1, *block)
            return WeightDelta.from_blocks(places, values, shape[0], shape[1], block)
        return WeightDelta.from_flat(places, values, *shape)
    except ValueError as error:
        raise _damaged(path, f"{name}: {error}") from error


def _damaged(path, what: str) -> InputError:
    return damaged("load_deltas", path, what)
