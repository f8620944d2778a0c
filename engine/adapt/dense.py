"""Methods that train some of the model's own parameters, and keep the others bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from tilewright.adapt.methods import BitFit, Half, Mask
from tilewright.adapt.sparse import choose_linear
from tilewright.adapt.tuner import Tuner
from tilewright.files import InputError
from tilewright.half import HalfPlan
from tilewright.ops import WeightDelta, load_deltas, save_deltas
from tilewright.quantized import QuantizedLinear


class BitFitTuner(Tuner):
    """A model whose biases train."""

    def __init__(self, model: nn.Module, method: BitFit):
        super().__init__(model, method)
        self._added: list[nn.Linear] = []
        without = [m for _, m in choose_linear(model, None)[0] if m.bias is None]
        biases = [p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1].endswith("bias")]
        if not biases and not (method.add and without):
            raise ValueError(
                f"adapt: {type(model).__name__} has no bias to train; pass add=True to give its "
                f"{len(without)} linear layers one of zeros"
            )
        self._freeze()
        for layer in without if method.add else ():
            like: Any = layer.packed if isinstance(layer, QuantizedLinear) else layer.weight
            bias = torch.zeros(layer.out_features, device=like.device, dtype=like.dtype)
            layer.register_parameter("bias", nn.Parameter(bias))
            self._added.append(layer)
        self._before = [(p, p.detach().clone()) for p in biases]
        for bias in biases:
            bias.requires_grad_(True)

    @torch.no_grad()
    def remove(self) -> nn.Module:
        for parameter, value in self._before:
            parameter.copy_(value)
        for layer in self._added:
            layer.register_parameter("bias", None)
        self._before, self._added = [], []
        return super().remove()


class MaskTuner(Tuner):
    """A model of whose weights some entries train.

    masks   bool of each weight, by its name
    """

    def __init__(
        self, model: nn.Module, method: Mask, batches: Iterable[Mapping] | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
    ):  # fmt: skip
        weights, skipped = _dense_weights(model, method)
        if (method.by == "fisher" and masks is None) != (batches is not None):
            raise ValueError(
                f"adapt: mask by {method.by!r} "
                + ("needs batches, a list of arguments of the model" if batches is None
                   else "takes no batches: those are for 'fisher'")
            )  # fmt: skip
        super().__init__(model, method, skipped)
        self._freeze()
        for weight in weights.values():
            weight.requires_grad_(True)
        if masks is None:
            masks = _masks(model, weights, method, batches or ())
        self.masks = {name: masks[name].to(weight.device) for name, weight in weights.items()}
        self._weights = weights
        self._before: dict[str, torch.Tensor] | None = None
        with torch.no_grad():
            if method.by == "magnitude":
                for name, weight in weights.items():
                    weight.mul_(self.masks[name])
            else:
                self._before = {n: w[self.masks[n]] for n, w in weights.items()}
        self._hooks = [w.register_hook(_masked(self.masks[n])) for n, w in weights.items()]

    def only(self) -> dict[torch.Tensor, torch.Tensor]:
        return {weight: self.masks[name] for name, weight in self._weights.items()}

    @torch.no_grad()
    def remove(self) -> nn.Module:
        if self._before is None:
            raise ValueError(
                "remove: the pruned weights were not kept; load the model again to have them"
            )
        for hook in self._hooks:
            hook.remove()
        for name, values in self._before.items():
            self._weights[name][self.masks[name]] = values
        return super().remove()

    def save(self, path: str | os.PathLike) -> None:
        deltas = {}
        for name, weight in self._weights.items():
            places = self.masks[name].flatten().nonzero()[:, 0]
            values = weight.detach().flatten()[places]
            deltas[name] = WeightDelta.from_flat(places, values, *weight.shape)
        save_deltas(
            os.fspath(path), deltas, {"method": json.dumps(asdict(self.method)), "kind": self.name}
        )

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        saved = load_deltas(os.fspath(path)).deltas
        if saved.keys() != self._weights.keys():
            odd = sorted(saved.keys() ^ self._weights.keys())[0]
            raise InputError(f"load_adapted: {path} is of another model: {odd} differs")
        for name, weight in self._weights.items():
            if saved[name].shape != tuple(weight.shape):
                raise InputError(
                    f"load_adapted: {name} in {path} is of shape {saved[name].shape}, need "
                    f"{tuple(weight.shape)}"
                )
            if not torch.equal(mask_of(saved[name]), self.masks[name].cpu()):
                raise InputError(f"load_adapted: {path} has another mask of {name}")
            weight[self.masks[name]] = saved[name].values.to(weight)


def mask_of(delta: WeightDelta) -> torch.Tensor:
    mask = torch.zeros(delta.shape, dtype=torch.bool)
    mask.view(-1)[delta.places().cpu()] = True
    return mask


def _masked(mask: torch.Tensor):
    """For any optimizer, and for the norm of the gradient, an entry that stands still has none."""
    return lambda gradient: gradient * mask


def _dense_weights(model: nn.Module, method: Mask):
    found, skipped = choose_linear(model, method.targets)
    packed = [name for name, m in found if isinstance(m, QuantizedLinear)]
    if packed:
        raise ValueError(f"adapt: {packed[0]} is packed, and a mask needs dense weights to train")
    return {f"{name}.weight": m.weight for name, m in found}, skipped


def _masks(model, weights, method: Mask, batches) -> dict[str, torch.Tensor]:
    if method.by == "random":
        generator = torch.Generator().manual_seed(method.seed)
        scores = {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()}
    elif method.by == "magnitude":
        scores = {n: w.detach().abs() for n, w in weights.items()}
    else:
        everything = _squared_gradients(model, weights, batches)
        flat = torch.cat([t.flatten() for t in everything.values()])
        best = _largest(flat, method.density)
        sizes = [t.numel() for t in everything.values()]
        return {
            n: part.view(weights[n].shape)
            for n, part in zip(everything, best.split(sizes), strict=True)
        }
    return {n: _largest(s.flatten(), method.density).view(s.shape) for n, s in scores.items()}


def _largest(scores: torch.Tensor, density: float) -> torch.Tensor:
    n = max(1, int(density * scores.numel()))
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask[scores.topk(n).indices] = True
    return mask


def _squared_gradients(model, weights, batches) -> dict[str, torch.Tensor]:
    """Summed over the batches: what stands for the diagonal of the Fisher information."""
    sums = {name: torch.zeros(w.shape, device=w.device) for name, w in weights.items()}
    n_batches, was_training = 0, model.training
    model.eval()
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.float().square()
        n_batches += 1
    model.train(was_training)
    if not n_batches:
        raise ValueError("adapt: mask by 'fisher' got no batches, need at least one")
    return sums


class HalfTuner(Tuner):
    """A model in one round of half fine-tuning; `plan` has the others."""

    def __init__(self, model: nn.Module, method: Half):
        super().__init__(model, method)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self.plan = HalfPlan(model, method.level, method.ratio, method.seed)
        self.plan.begin(method.round)

    def remove(self) -> nn.Module:
        raise ValueError(
            "remove: half fine-tuning changes the model's own matrices, whose old values are not "
            "kept; plan.end() ends the round"
        )


DENSE: dict[type, Any] = {BitFit: BitFitTuner, Mask: MaskTuner, Half: HalfTuner}
