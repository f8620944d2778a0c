"""Packed weights in a safetensors file, the same bytes on every machine.

Each weight `name` is stored as the tensors name.codes, name.scales and those of offsets,
input_order, nested_table and nested_absmax that it has. The header's text `tilewright.packed` is
JSON: {"version": 1, "weights": {name: {format, shape, group_size, dtype, nested}}, "metadata": {}},
where nested is null or {offset, block}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tilewright.files import InputError, read_tensors, write_tensors
from tilewright.ops.common.packed import (
    ROWS,
    NestedScales,
    PackedWeight,
    inputs_of_a_line,
)
from tilewright.ops.common.saved_header import damaged, header_of, read_header

HEADER = "tilewright.packed"
SCALES = (torch.float32, torch.float16, torch.bfloat16)


class SavedWeights(NamedTuple):
    """What a file of packed weights holds.

    weights    by name
    metadata   the texts that were saved with them
    """

    weights: dict[str, PackedWeight]
    metadata: dict[str, str]


def save_packed(
    path: str | Path,
    weights: Mapping[str, PackedWeight],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write packed weights to a safetensors file, whole or not at all.

    path       of the file; what was there before stays if anything goes wrong
    weights    by name, such as "model.layers.0.mlp.up_proj.weight"; each is (O, I)
    metadata   texts to keep with them

    The same weights and texts give the same bytes.
    ValueError: metadata is not text by name. OSError: the file cannot be written.

    Source: the safetensors format, github.com/huggingface/safetensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    entries = {}
    written: set[int] = set()
    for name, packed in weights.items():
        for part, tensor in packed.tensors().items():
            # the format knows no shared memory: a tied weight is written twice
            shared = tensor.untyped_storage().data_ptr() in written
            tensors[f"{name}.{part}"] = tensor.clone() if shared else tensor
            written.add(tensor.untyped_storage().data_ptr())
        nested = packed.nested
        entries[name] = {
            "format": packed.format,
            "shape": list(packed.shape),
            "group_size": packed.group_size,
            "dtype": str(packed.dtype).removeprefix("torch."),
            "nested": nested and {"offset": nested.offset, "block": nested.block},
        }
    write_tensors(path, tensors, header_of("save_packed", HEADER, metadata, weights=entries))


def load_packed(path: str | Path, device: torch.device | str = "cpu") -> SavedWeights:
    """Read what `save_packed` wrote; every shape, dtype and index is checked.

    path     of the file
    device   where the tensors go

    Returns the weights (O, I) by name and the texts saved with them.
    ValueError: no such file; a truncated, damaged or foreign one.

    Source: the safetensors format, github.com/huggingface/safetensors.
    """
    header = read_header("load_packed", path, HEADER, "packed weights")
    try:
        entries = dict(header["weights"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its header cannot be read: {error!r}") from error
    tensors = read_tensors(path)
    weights = {name: _weight(path, name, entry, tensors) for name, entry in entries.items()}
    if tensors:
        raise _damaged(path, f"{', '.join(sorted(tensors)[:4])} belong to no weight")
    return SavedWeights({name: w.to(device) for name, w in weights.items()}, header["metadata"])


def _damaged(path: str | Path, reason: str) -> InputError:
    return damaged("load_packed", path, reason)


def _weight(
    path: str | Path, name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> PackedWeight:
    """Build one weight, taking its tensors out of `tensors`."""
    try:
        n_out, n_in = (int(n) for n in entry["shape"])
        format, group_size = str(entry["format"]), int(entry["group_size"])
        dtype, nested = getattr(torch, str(entry["dtype"])), entry["nested"]
        block, offset = (int(nested["block"]), float(nested["offset"])) if nested else (1, 0.0)
        codes_a_line = inputs_of_a_line(format)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"the entry of {name} cannot be read: {error!r}") from error
    if not (n_out >= 0 <= n_in and group_size > 0 < block and dtype in SCALES):
        raise _damaged(path, f"the entry of {name} is impossible: {entry}")
    if group_size % 8 and group_size != n_in:
        raise _damaged(path, f"{name} has groups of {group_size}, neither 8 k nor the row {n_in}")

    blocks, groups = -(-n_out // ROWS), -(-n_in // group_size)
    kinds = (torch.uint8,) if nested else SCALES
    needed = {
        "codes": ((torch.uint8,), (blocks, -(-n_in // codes_a_line), 64)),
        "scales": (kinds, (blocks, groups, ROWS)),
        "offsets": (SCALES, (blocks, groups, ROWS)),
        "input_order": ((torch.int32,), (n_in,)),
    }
    if nested:
        needed["nested_table"] = ((torch.float32,), (256,))
        needed["nested_absmax"] = ((torch.float32,), (-(-n_out * groups // block),))
    optional = ("offsets", "input_order")
    found: dict[str, torch.Tensor] = {}
    for part, (dtypes, shape) in needed.items():
        tensor = tensors.pop(f"{name}.{part}", None)
        if tensor is None and part in optional:
            continue
        if tensor is None or tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            came = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise _damaged(path, f"{name}.{part} is {came}, need {dtypes[0]} {shape}")
        found[part] = tensor
    order = found.get("input_order")
    if order is not None and not torch.equal(
        order.sort().values, torch.arange(n_in, dtype=torch.int32)
    ):
        raise _damaged(path, f"{name}.input_order does not name each of {n_in} inputs once")
    second = None
    if nested:
        second = NestedScales(found["nested_table"], found["nested_absmax"], offset, block)
    return PackedWeight(
        format, n_out, n_in, group_size, found["codes"], found["scales"], found.get("offsets"),
        order, second, dtype,
    )  # fmt: skip
