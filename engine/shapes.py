"""Checks of tensor arguments, and the wording of what they refuse."""

from collections.abc import Sequence

import torch


def expect_shapes(op: str, **arguments: tuple[torch.Tensor, str | Sequence[str]]) -> dict[str, int]:
    """Check each tensor against its axis names; one name is one size throughout the call.

    arguments   name=(tensor, axes); axes is a string of one-letter names or a list of names

    Returns the size of each axis. ValueError: a wrong number of axes, or two sizes for one axis.
    """
    size: dict[str, int] = {}
    for name, (tensor, axes) in arguments.items():
        shape = tensor.shape
        if len(shape) != len(axes):
            axes = ", ".join(axes)
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, need axes ({axes})")
        for axis, n in zip(axes, shape):  # noqa: B905  lengths were just compared; called often
            if axis not in size:
                size[axis] = n
            elif size[axis] != n:
                fixed_by = next(other for other, (_, named) in arguments.items() if axis in named)
                raise ValueError(
                    f"{op}: {name} has shape {tuple(shape)}, need {axis} = {size[axis]} "
                    f"as in {fixed_by}"
                )
    return size


def expect_dtype(op: str, allowed: Sequence[torch.dtype], **tensors: torch.Tensor) -> torch.dtype:
    """Check that all tensors share one of the allowed dtypes, and return it."""
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{op}: {first_name} is {first.dtype}, need one of {names}")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}, need {first.dtype} as in {first_name}"
            )
    return first.dtype


def expect_device(op: str, **tensors: torch.Tensor | None) -> torch.device:
    """Check that all tensors that are given live on one device, and return it."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, need {first.device} as in {first_name}"
            )
    return first.device
