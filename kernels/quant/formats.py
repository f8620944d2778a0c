"""What can be asked of `quantize_weight`: one small record for each family of formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

SOLVERS = ("hqq", "minmax")
SCALINGS = ("tensor", "row", "block")
BLOCK = 128  # rows and columns of a block of FP8(scaling="block")


def _check_group_size(name: str, group_size: int | None) -> None:
    if group_size is None:
        return
    if type(group_size) is not int or group_size < 8 or group_size % 8:
        raise ValueError(
            f"{name}: group_size is {group_size!r}, need a positive multiple of 8, "
            "or None for one scale a row"
        )


def _check_choice(name: str, argument: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {argument} is {value!r}, need one of {', '.join(known)}")


def _check_bool(name: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {argument} is {value!r}, need True or False")


@dataclass(frozen=True)
class Int8:
    """Whole numbers from -127 to 127 times absmax / 127.

    group_size   inputs that share a scale, a multiple of 8; None for one scale a row
    """

    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_group_size("Int8", self.group_size)


@dataclass(frozen=True)
class Int4:
    """Sixteen equal steps: -8 to 7 times a scale, or 0 to 15 times a scale plus an offset.

    group_size   inputs that share a scale, a multiple of 8; None for one scale a row
    symmetric    False: a group has an offset as well, of the scale's dtype
    solver       "hqq" fits scale or offset to the weights, without data; "minmax" spans them
    """

    group_size: int | None = 64
    symmetric: bool = True
    solver: str = "hqq"

    def __post_init__(self) -> None:
        _check_group_size("Int4", self.group_size)
        _check_bool("Int4", "symmetric", self.symmetric)
        _check_choice("Int4", "solver", self.solver, SOLVERS)


@dataclass(frozen=True)
class _Table:
    group_size: int | None = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_group_size(name, self.group_size)
        _check_bool(name, "double_quant", self.double_quant)


@dataclass(frozen=True)
class NF4(_Table):
    """Sixteen quantiles of the normal distribution times absmax (QLoRA).

    group_size     inputs that share a scale, a multiple of 8; None for one scale a row
    double_quant   scales in 8 bits, with one float32 for 256 of them
    """

    code: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(_Table):
    """Sixteen floating-point values, as bitsandbytes has them, times absmax.

    group_size     inputs that share a scale, a multiple of 8; None for one scale a row
    double_quant   scales in 8 bits, with one float32 for 256 of them
    """

    code: ClassVar[str] = "fp4"


@dataclass(frozen=True)
class FP8:
    """float8_e4m3fn times absmax / 448.

    scaling   what shares an absmax: the whole "tensor", a "row", or a "block" of 128 x 128
    """

    scaling: str = "row"

    def __post_init__(self) -> None:
        _check_choice("FP8", "scaling", self.scaling, SCALINGS)


@dataclass(frozen=True)
class MXFP4:
    """float4_e2m1 times a power of two, one for 32 inputs (OCP Microscaling Formats 1.0)."""

    group_size: ClassVar[int] = 32


QuantFormat = Int8 | Int4 | NF4 | FP4 | FP8 | MXFP4


def expect_format(op: str, format: object, allowed: tuple[type, ...]) -> None:
    if not isinstance(format, allowed):
        names = ", ".join(f"{kind.__name__}()" for kind in allowed)
        raise ValueError(f"{op}: format is {format!r}, need one of {names}")
