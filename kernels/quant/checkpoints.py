"""Layers of GPTQ, AWQ and compressed-tensors checkpoints, from tensors by name; no value changes.

qweight words      GPTQ (I / 8, O): eight inputs, the lowest bits first
                   AWQ  (I, O / 8): eight outputs, in nibbles 0, 4, 1, 5, 2, 6, 3, 7
                   compressed-tensors (O, ceil(I / 8)): eight inputs, the lowest bits first
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tilewright.ops.common.packed import PackedWeight, pack_codes, pack_rows
from tilewright.ops.quant.foreign import FLOATS, key, take, words

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # output of a word -> its nibble, from the lowest bits
# mean of code - stored zero over a layer: 0 if the stored one is the zero itself, 1 if it is one
# less; between or outside these, nothing can be told
GPTQ_MARGIN = 0.35


def read_gptq(
    tensors: Mapping[str, torch.Tensor],
    name: str = "",
    *,
    version: int | None = None,
    dtype: torch.dtype | None = None,
) -> PackedWeight:
    """A 4-bit or 8-bit weight of a GPTQ checkpoint (AutoGPTQ, GPTQModel, transformers).

        W[o, i] = (code[o, i] - zero[o, g_idx[i]]) * scale[o, g_idx[i]]

    tensors   qweight (I bits / 32, O) int32, scales (G, O), qzeros (G, O bits / 32) int32 and,
              after act-order, g_idx (I,) int32; W is (O, I)
    name      of the layer, such as "model.layers.0.mlp.up_proj"; "" if the names have no prefix
    version   1: qzeros hold zero - 1; 2: zero itself. None: told from the data, since files do not
              say it reliably: symmetric codes have zero 8 throughout, others the mean of the codes
    dtype     of the weight that it stands for; None: that of scales

    Inputs that act-order has spread over groups are sorted by group; input_order says where each
    belongs.
    ValueError: a tensor is missing or misshapen, groups are uneven, or the version cannot be told.

    Source: Frantar et al., GPTQ, arXiv 2210.17323; the layout is AutoGPTQ 0.7's and GPTQModel 7's.
    """
    op = "read_gptq"
    if version not in (None, 1, 2):
        raise ValueError(f"{op}: version is {version!r}, need 1, 2 or None")
    qweight, scales = (take(op, tensors, name, part) for part in ("qweight", "scales"))
    qzeros = take(op, tensors, name, "qzeros")
    groups, n_out = _matrix(op, name, "scales", scales)
    _, zero_words = _matrix(op, name, "qzeros", qzeros)
    bits = 32 * zero_words // n_out if n_out else 0
    if bits not in (4, 8) or qzeros.shape != (groups, n_out * bits // 32):
        raise ValueError(
            f"{op}: {key(name, 'qzeros')} has shape {tuple(qzeros.shape)}, need ({groups}, O / 8) "
            f"or ({groups}, O / 4) with O = {n_out} as in scales: codes of 4 or 8 bits"
        )
    if qweight.ndim != 2 or qweight.shape[1] != n_out or qweight.dtype != torch.int32:
        raise ValueError(
            f"{op}: {key(name, 'qweight')} is {qweight.dtype} {tuple(qweight.shape)}, need int32 "
            f"(I {bits} / 32, {n_out})"
        )
    codes = words(qweight.t(), bits)  # (O, I)
    n_in = codes.shape[1]
    group_size = -(-n_in // groups)
    order, codes, group = _by_group(op, tensors, name, codes, groups, group_size)
    stored = words(qzeros, bits).t()  # (O, G)
    version = version or _gptq_version(op, name, codes, stored, group, bits)
    zeros = (stored + 1) & (2**bits - 1) if version == 1 else stored
    return _affine(op, name, codes, scales.t(), zeros, bits, group_size, order, dtype)


def read_awq(
    tensors: Mapping[str, torch.Tensor], name: str = "", *, dtype: torch.dtype | None = None
) -> PackedWeight:
    """A 4-bit weight of an AWQ checkpoint, "gemm" version.

        W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],   g = i // group_size

    tensors   qweight (I, O / 8) int32, scales (G, O), qzeros (G, O / 8) int32; W is (O, I)
    name      of the layer; "" if the names have no prefix
    dtype     of the weight that it stands for; None: that of scales

    ValueError: a tensor is missing or misshapen.

    Source: Lin et al., AWQ, arXiv 2306.00978; the layout is AutoAWQ 0.2's.
    """
    op = "read_awq"
    qweight, scales = (take(op, tensors, name, part) for part in ("qweight", "scales"))
    qzeros = take(op, tensors, name, "qzeros")
    groups, n_out = _matrix(op, name, "scales", scales)
    n_in, _ = _matrix(op, name, "qweight", qweight)
    for part, tensor, rows in (("qweight", qweight, n_in), ("qzeros", qzeros, groups)):
        if tensor.dtype != torch.int32 or 8 * tensor.shape[-1] != n_out or len(tensor) != rows:
            raise ValueError(
                f"{op}: {key(name, part)} is {tensor.dtype} {tuple(tensor.shape)}, need int32 "
                f"({rows}, O / 8) with O = {n_out} as in scales"
            )
    codes, zeros = (_awq_words(t).t() for t in (qweight, qzeros))
    group_size = -(-n_in // groups)
    _check_groups(op, name, n_in, groups, group_size)
    return _affine(op, name, codes, scales.t(), zeros, 4, group_size, None, dtype)


def read_compressed_tensors(
    tensors: Mapping[str, torch.Tensor], name: str = "", *, dtype: torch.dtype | None = None
) -> PackedWeight:
    """A 4-bit or 8-bit weight of a compressed-tensors checkpoint, format "pack-quantized".

        W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],   g = i // group_size or weight_g_idx[i]

    tensors   weight_packed (O, ceil(I bits / 32)) int32, weight_scale (O, G), weight_shape (2,)
              and, where used, weight_zero_point (ceil(O bits / 32), G) int32 and
              weight_g_idx (I,); W is (O, I)
    name      of the layer; "" if the names have no prefix
    dtype     of the weight that it stands for; None: that of weight_scale

    ValueError: a tensor is missing or misshapen, or groups are uneven.

    Source: the layout of compressed-tensors 0.20, PackedQuantizationCompressor.
    """
    op = "read_compressed_tensors"
    packed = take(op, tensors, name, "weight_packed")
    scales = take(op, tensors, name, "weight_scale")
    shape = take(op, tensors, name, "weight_shape").flatten().tolist()
    if len(shape) != 2:
        raise ValueError(f"{op}: {key(name, 'weight_shape')} is {shape}, need [O, I]")
    n_out, n_in = shape
    _matrix(op, name, "weight_scale", scales)
    widths = {bits: -(-n_in * bits // 32) for bits in (8, 4)}
    fitting = [bits for bits, width in widths.items() if packed.shape == (n_out, width)]
    if not fitting or packed.dtype != torch.int32 or len(scales) != n_out:
        raise ValueError(
            f"{op}: {key(name, 'weight_packed')} is {packed.dtype} {tuple(packed.shape)} and "
            f"weight_scale {tuple(scales.shape)}, need int32 ({n_out}, {widths[4]}) for 4 bits or "
            f"({n_out}, {widths[8]}) for 8, and ({n_out}, G), with weight_shape {shape}"
        )
    bits = fitting[-1]  # of up to four inputs both fit; 4 bits are the usual case
    groups = scales.shape[1]
    codes = words(packed, bits)[:, :n_in]
    group_size = -(-n_in // groups) if groups else 8
    order, codes, _ = _by_group(op, tensors, name, codes, groups, group_size, "weight_g_idx")
    if key(name, "weight_zero_point") in tensors:
        stored = take(op, tensors, name, "weight_zero_point")
        if stored.dtype != torch.int32 or stored.shape != (-(-n_out * bits // 32), groups):
            raise ValueError(
                f"{op}: {key(name, 'weight_zero_point')} is {stored.dtype} {tuple(stored.shape)}, "
                f"need int32 ({-(-n_out * bits // 32)}, {groups})"
            )
        zeros = words(stored.t(), bits)[:, :n_out].t()  # both are stored plus 2**(bits - 1)
    else:
        zeros = torch.full((n_out, groups), 2 ** (bits - 1), device=codes.device)
    return _affine(op, name, codes, scales, zeros, bits, group_size, order, dtype)


def _matrix(op: str, name: str, part: str, tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.ndim != 2:
        raise ValueError(f"{op}: {key(name, part)} has shape {tuple(tensor.shape)}, need two axes")
    return tensor.shape[0], tensor.shape[1]


def _awq_words(tensor: torch.Tensor) -> torch.Tensor:
    """(R, O / 8) int32 -> (R, O) int32 in the order of the outputs."""
    nibbles = words(tensor, 4).unflatten(-1, (-1, 8))
    return nibbles[..., list(AWQ_NIBBLES)].flatten(-2)


def _check_groups(op: str, name: str, n_in: int, groups: int, group_size: int) -> None:
    whole_row = groups == 1
    if -(-n_in // group_size) != groups or not (whole_row or group_size % 8 == 0):
        raise ValueError(
            f"{op}: {name or 'the layer'} has {groups} groups of {n_in} inputs, need groups of "
            "a multiple of 8, or one"
        )


def _by_group(
    op: str,
    tensors: Mapping[str, torch.Tensor],
    name: str,
    codes: torch.Tensor,
    groups: int,
    group_size: int,
    part: str = "g_idx",
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """input_order or None, the codes sorted by group, and the group of each column after that."""
    n_in = codes.shape[1]
    _check_groups(op, name, n_in, groups, group_size)
    plain = torch.arange(n_in, device=codes.device) // group_size
    if key(name, part) not in tensors:
        return None, codes, plain
    of_input = take(op, tensors, name, part).flatten().long()
    if of_input.shape == plain.shape and torch.equal(of_input, plain):
        return None, codes, plain
    if bool((of_input == -1).all()):  # compressed-tensors' mark of a g_idx that is not used
        return None, codes, plain
    order = of_input.argsort(stable=True)
    if len(order) != n_in or not torch.equal(of_input[order], plain):
        counts = of_input.clamp(min=0).bincount(minlength=groups).tolist()
        raise ValueError(
            f"{op}: {key(name, part)} puts {counts[:8]}{' ...' if groups > 8 else ''} of {n_in} "
            f"inputs into {groups} groups, need {group_size} in each, the last one excepted"
        )
    return order.int(), codes[:, order], plain


def _gptq_version(
    op: str, name: str, codes: torch.Tensor, stored: torch.Tensor, group: torch.Tensor, bits: int
) -> int:
    middle = 2 ** (bits - 1)
    if bool((stored == middle).all()):
        return 2
    if bool((stored == middle - 1).all()):
        return 1
    shift = (codes.double().mean() - stored[:, group].double().mean()).item()
    for version, expected in ((2, 0.0), (1, 1.0)):
        if abs(shift - expected) < GPTQ_MARGIN:
            return version
    raise ValueError(
        f"{op}: {key(name, 'qzeros')} may hold zero points or zero points less 1: codes lie "
        f"{shift:.2f} above them on average, near 0 or 1 was expected; pass version=1 (as "
        "AutoGPTQ writes) or version=2"
    )


def _affine(
    op: str,
    name: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    order: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> PackedWeight:
    """(code - zero) * scale as a PackedWeight, (O, I) codes and (O, G) scales and zeros.

    With zero points all in the middle there are no offsets and scales stay as they are; else both
    are float32, where scale * zero is exact.
    """
    if scales.dtype not in FLOATS:
        raise ValueError(f"{op}: scales of {name or 'the layer'} are {scales.dtype}, need floats")
    middle = 2 ** (bits - 1)
    format = "uint4" if bits == 4 else "int8"
    shift = 0 if bits == 4 else middle  # of an 8-bit code to a signed one
    offsets = None
    dtype = dtype or scales.dtype
    if bool((zeros == middle).all()):
        format = "int4" if bits == 4 else "int8"
    else:
        scales = scales.float()
        offsets = pack_rows(scales * (shift - zeros))
    codes = codes.to(torch.uint8) if bits == 4 else (codes - shift).to(torch.int8)
    n_out, n_in = codes.shape
    return PackedWeight(
        format, n_out, n_in, group_size, pack_codes(codes, format), pack_rows(scales), offsets,
        order, dtype=dtype,
    )  # fmt: skip
