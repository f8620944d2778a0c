"""Quantizing weights and decoding them: NF4 and int8, against plain torch and bitsandbytes.

Axes: O output rows, I inputs. What is compared is the code of each weight, or the decoded weight.
"""

from __future__ import annotations

import torch

import tilewright
from tilewright import NF4, Int8
from tilewright.bench.variant import Variant
from tilewright.ops.common.packed import (
    FORMATS,
    code_values,
    inputs_of_a_line,
    unpack_codes,
)
from tilewright.ops.quant import reference

GRADIENTS = ()
GROUP = 64  # inputs that share a scale in NF4; in int8 a row does
SMALL = dict(O=48, I=256)
DENSE = dict(O=4096, I=4096, dtypes=("bf16",), modes=("fwd",))

CASES = {
    "quantize-nf4": dict(step="quantize", format="nf4", **DENSE),
    "quantize-int8": dict(step="quantize", format="int8", **DENSE),
    "dequantize-nf4": dict(step="dequantize", format="nf4", **DENSE),
    "dequantize-int8": dict(step="dequantize", format="int8", **DENSE),
}


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """weight (O, I), normally distributed."""
    generator = torch.Generator(device).manual_seed(0)
    shape = case["O"], case["I"]
    return dict(weight=(torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype))


def small(case: dict) -> dict:
    return {**case, **SMALL}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: a product and a comparison for each weight. Bytes: weight, codes and float32
    scales once."""
    n = case["O"] * case["I"]
    of_a_scale = GROUP if case["format"] == "nf4" else case["I"]
    return 2.0 * n, n * (itemsize + FORMATS[case["format"]].bits / 8 + 4 / of_a_scale)


def _format(case: dict) -> NF4 | Int8:
    return NF4(GROUP) if case["format"] == "nf4" else Int8()


def _scaled(case: dict, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights over their scales in groups (O G, g), and the scales, by the formula."""
    groups = weight.reshape(-1, GROUP if case["format"] == "nf4" else weight.shape[1])
    groups = groups if groups.dtype == torch.float64 else groups.float()
    scales = groups.abs().amax(1, keepdim=True) / (1 if case["format"] == "nf4" else 127)
    return groups / scales, scales


def truth(case: dict, weight) -> torch.Tensor:
    """Levels of the nearest codes, times their scales when decoding, by the reference: (O I,)."""
    scaled, scales = _scaled(case, weight.double())
    levels = reference.levels(case["format"]).to(weight.device)
    values = levels[(scaled[..., None] - levels).abs().argmin(-1)]
    return (values * scales if case["step"] == "dequantize" else values).flatten()


def plain_codes(case: dict, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, one a byte, and scales in plain torch."""
    scaled, scales = _scaled(case, weight)
    if case["format"] == "int8":
        return scaled.round().to(torch.int8), scales
    levels = torch.tensor(FORMATS["nf4"].table, device=weight.device)
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8), scales


def plain_values(codes: torch.Tensor) -> torch.Tensor:
    """Levels of codes, one a byte, or a decoded weight as it is: (O I,)."""
    if codes.dtype == torch.uint8:
        codes = code_values(codes, "nf4")
    return codes.flatten()


def stock(case: dict, weight) -> torch.Tensor:
    """The truth in the arithmetic of plain torch: the yardstick of errors."""
    codes, scales = plain_codes(case, weight)
    if case["step"] == "quantize":
        return plain_values(codes)
    return (plain_values(codes).view(codes.shape) * scales).to(weight.dtype).flatten()


def quantized(case: dict, inputs: dict) -> dict:
    if case["step"] == "quantize":
        return inputs
    return dict(packed=tilewright.quantize_weight(inputs["weight"], _format(case)))


def ours(case: dict, weight=None, packed=None) -> torch.Tensor:
    """Packed codes, or the decoded weight (O, I)."""
    if packed is not None:
        return tilewright.dequantize_weight(packed)
    return tilewright.quantize_weight(weight, _format(case)).codes


def of_ours(out: torch.Tensor) -> torch.Tensor:
    if out.dtype != torch.uint8:
        return out.flatten()
    format = "nf4" if out.shape[1] == SMALL["I"] // inputs_of_a_line("nf4") else "int8"
    return code_values(unpack_codes(out, format, *SMALL.values()), format).flatten()


def plain_quantized(case: dict, inputs: dict) -> dict:
    if case["step"] == "quantize":
        return inputs
    codes, scales = plain_codes(case, inputs["weight"])
    return dict(codes=codes, scales=scales, dtype=inputs["weight"].dtype)


def plain(case: dict, weight=None, codes=None, scales=None, dtype=None) -> torch.Tensor:
    if weight is not None:
        return plain_codes(case, weight)[0]
    return (code_values(codes.view(torch.uint8), case["format"]) * scales).to(dtype)


def bnb_quantized(case: dict, inputs: dict) -> dict:
    import bitsandbytes.functional as bnb

    if case["step"] == "quantize":
        return dict(bnb=bnb, **inputs)
    codes, state = bnb.quantize_4bit(inputs["weight"], blocksize=GROUP, quant_type="nf4")
    return dict(bnb=bnb, codes=codes, state=state)


def bitsandbytes(case: dict, bnb, weight=None, codes=None, state=None) -> torch.Tensor:
    if weight is not None:
        return bnb.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")[0]
    return bnb.dequantize_4bit(codes, state)


def of_bitsandbytes(out: torch.Tensor) -> torch.Tensor:
    if out.dtype != torch.uint8:
        return out.flatten()
    return code_values(torch.cat([out >> 4, out & 15], 1), "nf4").flatten()


def is_nf4(case: dict) -> bool:
    return case["format"] == "nf4"


VARIANTS = {
    "tilewright": Variant(ours, prepare=quantized, restore=of_ours),
    "torch": Variant(plain, prepare=plain_quantized, restore=plain_values),
    "bitsandbytes": Variant(
        bitsandbytes, prepare=bnb_quantized, restore=of_bitsandbytes, applies=is_nf4
    ),
}
