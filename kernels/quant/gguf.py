"""Tensors of GGUF files in the types Q4_0, Q8_0 and Q4_K, without unpacking them to floats.

Q4_0   32 weights in 18 bytes: float16 d; byte j holds weight j low and weight j + 16 high
       w = d (q - 8)
Q8_0   32 weights in 34 bytes: float16 d, then a signed byte each          w = d q
Q4_K   256 weights in 144 bytes: float16 d and dmin; 12 bytes with a 6-bit scale and a 6-bit
       minimum for each 32 weights; then for each 64 weights 32 bytes, the first 32 weights
       low and the next 32 high                                           w = d s q - dmin m
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from tilewright.files import InputError
from tilewright.ops.common.packed import PackedWeight, pack_codes, pack_rows

GROUP = 32  # weights that share a scale, in all three types
PACKED = ("Q4_0", "Q8_0", "Q4_K")
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_gguf(
    path: str | Path, names: Iterable[str] | None = None
) -> dict[str, PackedWeight | torch.Tensor]:
    """Tensors of a GGUF file by name: quantized matrices packed, floats as they are.

        W[o, i] = scale[o, i // 32] * code[o, i] + offset[o, i // 32]

    path    of the file
    names   of the tensors to read; None: all

    A matrix (O, I) of type Q4_0, Q8_0 or Q4_K becomes a PackedWeight; of type F32, F16 or BF16 a
    tensor of any shape. No value changes: Q4_K, which nests its scales in 6 bits, takes 6 bits a
    weight instead of 4.5, with float32 scales and offsets. Rows stand as in the file; llama.cpp
    reorders those of q and k of some architectures.
    ValueError: no such file or tensor, a damaged file, or a tensor of another type or more axes.
    ImportError: the package gguf is not installed.

    Source: llama.cpp, gguf-py 0.19, and ggml-quants.c for the layouts.
    """
    op = "read_gguf"
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{op}: reading {path} needs the package gguf; pip install 'tilewright[gguf]'"
        ) from error
    if not Path(path).is_file():
        raise InputError(f"{op}: {path} does not exist")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeError) as error:
        raise InputError(
            f"{op}: {path} is truncated, damaged or no GGUF file ({error}); "
            "copy or download it again"
        ) from error
    if reader.byte_order != "I":
        raise InputError(f"{op}: {path} has the byte order of another kind of machine")
    there = {tensor.name: tensor for tensor in reader.tensors}
    wanted = list(there) if names is None else list(names)
    missing = [name for name in wanted if name not in there]
    if missing:
        shown = ", ".join([*there][:8]) + (", ..." if len(there) > 8 else "")
        raise InputError(f"{op}: {path} has no tensor {', '.join(missing)}; it has {shown}")
    return {name: _read(op, path, there[name]) for name in wanted}


def _read(op: str, path: str | Path, tensor) -> PackedWeight | torch.Tensor:
    kind = tensor.tensor_type.name
    shape = [int(n) for n in reversed(tensor.shape)]
    data = torch.from_numpy(tensor.data.copy())
    if kind in PLAIN:
        return data.view(torch.uint8).view(PLAIN[kind]).view(shape)
    if kind not in PACKED:
        known = ", ".join((*PACKED, *PLAIN))
        raise InputError(
            f"{op}: {tensor.name} of {path} is {kind}, need one of {known}; "
            "pass names= to read others"
        )
    if len(shape) != 2:
        raise InputError(f"{op}: {tensor.name} of {path} has shape {tuple(shape)}, need (O, I)")
    decode = {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k}[kind]
    n_out, n_in = shape
    format, codes, scales, offsets = decode(data.view(n_out, data.numel() // max(n_out, 1)))
    return PackedWeight(
        format, n_out, n_in, GROUP, pack_codes(codes.reshape(n_out, n_in), format),
        pack_rows(scales.reshape(n_out, n_in // GROUP)),
        None if offsets is None else pack_rows(offsets.reshape(n_out, n_in // GROUP)),
        dtype=torch.float32,
    )  # fmt: skip


def _blocks(rows: torch.Tensor, n_bytes: int) -> torch.Tensor:
    return rows.view(rows.shape[0], rows.shape[1] // n_bytes, n_bytes)


def _half(two_bytes: torch.Tensor) -> torch.Tensor:
    return two_bytes.contiguous().view(torch.float16)


def _q4_0(rows: torch.Tensor):
    blocks = _blocks(rows, 18)
    low_high = blocks[..., 2:]
    return "int4", torch.cat([low_high & 15, low_high >> 4], -1), _half(blocks[..., :2]), None


def _q8_0(rows: torch.Tensor):
    blocks = _blocks(rows, 34)
    return "int8", blocks[..., 2:].contiguous().view(torch.int8), _half(blocks[..., :2]), None


def _q4_k(rows: torch.Tensor):
    blocks = _blocks(rows, 144)
    d, dmin = (_half(blocks[..., i : i + 2]).float() for i in (0, 2))
    scale, least = _six_bits(blocks[..., 4:16])
    quads = blocks[..., 16:].unflatten(-1, (4, 32))
    codes = torch.stack([quads & 15, quads >> 4], -2)  # (..., 4, 2, 32)
    return "uint4", codes, d * scale, -dmin * least


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes -> eight scales and eight minima.

    byte      0 to 3                  4 to 7                  8 to 11
    bits 5-0  scale 0 to 3            minimum 0 to 3          minimum 4 to 7 (7-4), scale (3-0)
    bits 7-6  scale 4 to 7, upper     minimum 4 to 7, upper
    """
    first, second, third = packed.split(4, -1)
    scale = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], -1)
    least = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], -1)
    return scale.float(), least.float()
