"""What a tuned model can be asked for, whatever the method."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright import files
from tilewright.adapt.methods import known, method_of, name_of
from tilewright.adapt.report import Skipped
from tilewright.files import InputError
from tilewright.ops import AdamW
from tilewright.quantized import quantized_layers

HEADER = "tilewright.adapter"


class Tuner:
    """A model with the parameters of a method, and what is done to all of them at once.

    model     what trains, changed in place; a PeftModel around it where the method is PEFT's
    method    how it is tuned
    skipped   layers that the method leaves out, each with the reason
    """

    def __init__(self, model: nn.Module, method: Any, skipped: Sequence[Skipped] = ()):
        self.model, self.method, self.skipped = model, method, tuple(skipped)
        self.name = name_of(method)
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def __str__(self) -> str:
        trained = self.n_trained()
        everything = sum(p.numel() for p in self.model.parameters())
        everything += sum(m.in_features * m.out_features
                          for _, m in quantized_layers(self.model))  # fmt: skip
        lines = [
            f"{type(self.model).__name__}: {self.name}, {trained} values train, "
            f"{100 * trained / max(everything, 1):.3f} % of all"
        ]
        return "\n".join(
            [*lines, *(f"  {s.name}: {s.was} stays: {s.reason}" for s in self.skipped)]
        )

    def n_trained(self) -> int:
        """How many values train."""
        only = self.only()
        return sum(int(only[p].sum()) if p in only else p.numel() for p in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def only(self) -> dict[torch.Tensor, torch.Tensor]:
        """Parameter -> bool mask of its entries that train, where that is not the whole of it."""
        return {}

    def optimizer(self, **options) -> torch.optim.Optimizer:
        """AdamW over what trains."""
        return AdamW(self.parameters(), only=self.only() or None, **options)

    def after_step(self, optimizer: Any) -> bool:
        """Call it after each step of the optimizer; whether it has moved anything."""
        return False

    def merge(self) -> None:
        """Put the update into the dense weights; `unmerge` gives them back their bits.

        ValueError: no weight says the same.
        """
        raise ValueError(f"merge: {self.name} {self._why_not_merged()}")

    def _why_not_merged(self) -> str:
        return "changes the model's own parameters: there is nothing to merge"

    def unmerge(self) -> None:
        """The weights have the bits from before `merge`; nothing is done to others."""

    def remove(self) -> Any:
        """Make the model what it was, and return it."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        return self.model

    def save(self, path: str | os.PathLike) -> None:
        """Write what was trained to a safetensors file, and how. WriteError: the disk."""
        files.write_tensors(Path(path), self.tensors(), {HEADER: self.description()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file of the method holds, by the names of the parameters."""
        trained = {id(p) for p in self.parameters()}
        return {
            name: p.detach() for name, p in self.model.named_parameters() if id(p) in trained
        }  # fmt: skip

    def load(self, path: str | os.PathLike) -> None:
        """Take the values of a file that a tuner of the same method and model has written."""
        saved, ours = files.read_tensors(Path(path)), self.tensors()
        odd = next((n for n in {**ours, **saved} if n not in saved or n not in ours), None)
        if odd is not None:
            where = "has no" if odd not in saved else "is not of this model: it has"
            raise InputError(f"load_adapted: {path} {where} {odd}")
        for name, value in saved.items():
            if value.shape != ours[name].shape:
                raise InputError(
                    f"load_adapted: {name} in {path} is of shape {tuple(value.shape)}, "
                    f"need {tuple(ours[name].shape)}"
                )
        with torch.no_grad():
            for name, value in saved.items():
                ours[name].copy_(value)

    def description(self) -> str:
        """The method as JSON text."""
        return json.dumps({"kind": self.name, "method": asdict(self.method)})

    def _freeze(self) -> None:
        """Nothing of the model trains any more; `remove` gives the flags back."""
        self._flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.requires_grad_(False)


def described(path: str | os.PathLike, text: str):
    """The method that `Tuner.description` told of. InputError: it is none of ours."""
    try:
        told = json.loads(text)
        if told["kind"] not in known():
            raise ValueError(f"no method {told['kind']!r}")
        return method_of(told["kind"], told["method"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"load_adapted: {path}: its header cannot be read: {error}") from error
