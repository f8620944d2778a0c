"""Sparse fine-tuning of a model: a few values beside each weight, which move to where they serve.

The weights stay as they are, dense or packed. Source of the method: Ansell et al., Scaling sparse
fine-tuning to large language models (SpIEL), arXiv 2401.16405.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tilewright.adapt import sparse_layers as layers
from tilewright.adapt.report import Skipped
from tilewright.adapt.sparse_optim import DeltaAdamW, DeltaSM3
from tilewright.adapt.tuner import Tuner
from tilewright.files import InputError
from tilewright.ops import (
    Regrowth,
    WeightDelta,
    load_deltas,
    regrow_by_extremes,
    regrow_by_gradient,
    save_deltas,
    share_to_regrow,
)
from tilewright.quantized import QuantizedLinear, choose_layers, quantized_layers

RULES = ("gradient", "extremes", "none")
SCHEDULES = ("linear", "cosine")
VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SparseDelta:
    """How a model is tuned sparsely.

    density    share of each weight's entries that get a value, 0 < density <= 1
    targets    last parts of the names of linear layers; None for all but the output embedding
    values     "float32" or "bfloat16"
    seed       of the places to begin with
    rule       what useless values give way to: "gradient" (SpIEL-AG), "extremes" (SpIEL-MA, whose
               optimizer is SM3), or "none": places stay
    every      optimizer steps from one exchange to the next
    window     steps whose gradients are watched for it, at most `every`
    last_step  after which places stay; needed by a rule
    schedule   "linear" or "cosine", how the share that gives way falls
    share      that gives way, to begin with
    """

    density: float = 0.01
    targets: Sequence[str] | None = None
    values: str = "float32"
    seed: int = 0
    rule: str = "none"
    every: int = 20
    window: int = 5
    last_step: int | None = None
    schedule: str = "linear"
    share: float = 0.2

    def __post_init__(self) -> None:
        for name, known in (("values", VALUES), ("rule", RULES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"SparseDelta: no {name} {getattr(self, name)!r}. Known: {', '.join(known)}"
                )
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"SparseDelta: density is {self.density}, need 0 < density <= 1")
        if not 1 <= self.window <= self.every:
            raise ValueError(
                f"SparseDelta: window is {self.window} of {self.every} steps, need 1 to every"
            )
        if isinstance(self.targets, str):
            raise ValueError(f"SparseDelta: targets is {self.targets!r}, need a list of names")
        if self.rule != "none" and (self.last_step is None or self.last_step < 1):
            raise ValueError(
                f"SparseDelta: rule {self.rule!r} with last_step {self.last_step}, need the number "
                "of the last step that may exchange places, at least 1"
            )
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"SparseDelta: share is {self.share}, need 0 <= share <= 1")


class SparseTuner(Tuner):
    """A model with sparse deltas, and what is done to all of them at once.

    model     the model, changed in place: its other parameters do not train
    method    how it is tuned
    layers    the layers with a delta, by name
    skipped   linear layers without one, each with the reason
    """

    def __init__(self, model: nn.Module, method: SparseDelta, found, skipped):
        super().__init__(model, method, skipped)
        self.layers: dict[str, Any] = dict(found)
        self.steps_done, self.exchanges = 0, 0
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._watch_if_due()

    def __str__(self) -> str:
        trained = sum(p.numel() for p in self.parameters())
        everything = sum(p.numel() for p in self.model.parameters())
        everything += sum(m.in_features * m.out_features
                          for _, m in quantized_layers(self.model))  # fmt: skip
        lines = [
            f"{type(self.model).__name__}: {len(self.layers)} layers with a sparse delta, "
            f"{trained} values train, {100 * trained / max(everything - trained, 1):.3f} % of the "
            "weights"
        ]
        return "\n".join(
            [*lines, *(f"  {s.name}: {s.was} stays: {s.reason}" for s in self.skipped)]
        )

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [layer.delta_values for layer in self.layers.values()]

    def deltas(self) -> dict[str, WeightDelta]:
        """The delta of each weight, by the weight's name."""
        return {f"{name}.weight": layer.delta for name, layer in self.layers.items()}

    def optimizer(self, **options) -> DeltaAdamW | DeltaSM3:
        """The optimizer that goes with the rule: SM3 for "extremes", else AdamW."""
        if self.method.rule == "extremes":
            return DeltaSM3(self.layers.values(), **options)
        return DeltaAdamW(self.parameters(), **options)

    def after_step(self, optimizer: DeltaAdamW | DeltaSM3) -> bool:
        """Call it after each step of the optimizer; it exchanges places when that is due.

        Returns whether it did. Under torch.distributed, rank 0's gradients decide for all ranks.
        ValueError: "extremes" with another optimizer than `DeltaSM3`.
        """
        method = self.method
        if method.rule == "none":
            return False
        self.steps_done += 1
        for layer in self.layers.values():
            if layer.watch is not None:
                layer.watch.end_step()
        is_due = self.steps_done % method.every == method.window % method.every
        if is_due and self.steps_done <= (method.last_step or 0):
            self._exchange(optimizer)
        self._watch_if_due()
        return is_due and self.steps_done <= (method.last_step or 0)

    def _watch_if_due(self) -> None:
        method, begins = self.method, self.steps_done % self.method.every == 0
        if method.rule != "gradient" or not begins or self.steps_done >= (method.last_step or 0):
            return
        for layer in self.layers.values():
            layer.watch = layers.Watch(layer.out_features, layer.in_features, layer.delta.nnz)

    def _exchange(self, optimizer) -> None:
        method = self.method
        share = share_to_regrow(
            self.steps_done, method.last_step or 1, schedule=method.schedule, share=method.share,
            is_first=self.exchanges == 0,
        )  # fmt: skip
        self.exchanges += 1
        if method.rule == "extremes" and not isinstance(optimizer, DeltaSM3):
            raise ValueError(
                f"after_step: the rule is 'extremes' and the optimizer {type(optimizer).__name__}, "
                "need DeltaSM3, whose extremes they are"
            )
        for layer in self.layers.values():
            delta, watch = layer.delta, layer.watch
            count = int(share * delta.nnz)
            if method.rule == "extremes":
                row, column = _agreed(*optimizer.extremes(layer.delta_values))
                layers.set_delta(layer, regrow_by_extremes(delta, row, column, count))
                continue
            layer.watch = None
            if watch is None or watch.candidates is None:
                continue  # no gradient has passed through this layer
            watch.candidates, watch.sums, watch.squares = _agreed(
                watch.candidates, watch.sums, watch.squares
            )
            regrown = regrow_by_gradient(delta, watch.candidates, watch.sums, count)
            layers.set_delta(layer, regrown)
            _carry(optimizer, layer.delta_values, regrown, watch)

    # --- merging, files ---

    def merge(self) -> None:
        """Add the deltas to dense weights; a packed one is refused. `unmerge` takes them out."""
        try:
            for layer in self.layers.values():
                layers.merge(layer)
        except ValueError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """The weights have the bits from before `merge`."""
        for layer in self.layers.values():
            layers.unmerge(layer)

    def remove(self) -> dict[str, WeightDelta]:
        """Make the model what it was, and return the deltas by their weights' names."""
        removed = {f"{n}.weight": layers.detach(m) for n, m in self.layers.items()}
        self.layers = {}
        for parameter, flag in self._frozen:
            parameter.requires_grad_(flag)
        return removed

    def save(self, path: str | os.PathLike) -> None:
        """Write the deltas to a safetensors file, and how they were trained beside them."""
        method = asdict(self.method)
        if method["targets"] is not None:
            method["targets"] = list(method["targets"])
        save_deltas(os.fspath(path), self.deltas(), {"method": json.dumps(method)})

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Take the values and places of a file, which has as many for each layer."""
        saved = load_deltas(os.fspath(path)).deltas
        for name, layer in self.layers.items():
            delta = saved.get(f"{name}.weight")
            if delta is None or delta.shape != layer.delta.shape or delta.nnz != layer.delta.nnz:
                raise InputError(f"load_adapted: {path} has no delta like that of {name}")
            layer.delta_offsets.copy_(delta.row_offsets)
            layer.delta_columns.copy_(delta.short().columns.view(torch.uint8))
            layer.delta_values.copy_(delta.values)

    # --- resuming ---

    def state_dict(self) -> dict[str, Any]:
        """Where the tuning stands, beside the model's and the optimizer's own state dicts."""
        watched = {
            name: {"steps": layer.watch.steps, "tensors": layer.watch.tensors()}
            for name, layer in self.layers.items()
            if layer.watch is not None
        }
        return {"steps_done": self.steps_done, "exchanges": self.exchanges, "watched": watched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, between two optimizer steps, in the middle of a window as well."""
        self.steps_done, self.exchanges = state["steps_done"], state["exchanges"]
        for name, layer in self.layers.items():
            layer.watch = None
            if name in state["watched"]:
                layer.watch = layers.Watch(layer.out_features, layer.in_features, layer.delta.nnz)
                layer.watch.restore(**state["watched"][name])


def attach_new(model: nn.Module, method: SparseDelta) -> SparseTuner:
    """Give a model's linear layers deltas of zeros, whose places are drawn alike."""
    found, skipped = _choose(model, method.targets)
    generator = torch.Generator().manual_seed(method.seed)
    deltas = {}
    for name, layer in found:
        size = layer.out_features * layer.in_features
        n = max(1, int(method.density * size))
        places = _draw(size, n, generator)
        values = torch.zeros(n, dtype=VALUES[method.values])
        delta = WeightDelta.from_flat(places, values, layer.out_features, layer.in_features)
        deltas[name] = delta
    return _attach(model, method, found, skipped, deltas)


def attach_deltas(
    model: nn.Module, deltas: dict[str, WeightDelta], method: SparseDelta | None = None
) -> SparseTuner:
    """Give a model these deltas, by the names of their weights, such as "lm_head.weight"."""
    found, skipped = _choose(model, None, with_head=True)
    by_name = dict(found)
    wanted = {name.removesuffix(".weight"): delta for name, delta in deltas.items()}
    for name, delta in wanted.items():
        layer = by_name.get(name)
        if layer is None:
            raise ValueError(f"attach_deltas: the model has no linear layer {name!r} to change")
        if delta.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"attach_deltas: the delta of {name} is of shape {delta.shape}, the layer's weight "
                f"of {(layer.out_features, layer.in_features)}"
            )
    chosen = [(n, m) for n, m in found if n in wanted]
    return _attach(model, method or SparseDelta(), chosen, skipped, wanted)


def _attach(model, method, found, skipped, deltas) -> SparseTuner:
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for name, layer in found:
        device = next(t for t in (*layer.buffers(), *layer.parameters())).device
        layers.attach(layer, deltas[name].to(device))
    tuner = SparseTuner(model, method, found, skipped)
    tuner._frozen = frozen
    return tuner


def _choose(model, targets, with_head=False) -> tuple[list[tuple[str, nn.Linear]], list[Skipped]]:
    if any(isinstance(m, layers.SparseForward) for m in model.modules()):
        raise ValueError("adapt: the model has sparse deltas already; remove() them first")
    return choose_linear(model, targets, with_head)


def choose_linear(
    model: nn.Module, targets: Sequence[str] | None, with_head: bool = False
) -> tuple[list[tuple[str, nn.Linear]], list[Skipped]]:
    """The linear layers, dense or packed, that a method goes to, and those that it leaves out.

    targets     last parts of their names; None for all but the output embedding, which `with_head`
                adds
    ValueError: no layer fits, or none fits one of the targets.
    """
    is_wanted = None
    if targets is not None:

        def is_wanted(name, module):
            return any(name == t or name.endswith("." + t) for t in targets)  # fmt: skip
    elif with_head:

        def is_wanted(name, module):
            return True  # fmt: skip

    found, skipped = choose_layers(model, is_wanted)
    packed = [
        (n, m)
        for n, m in quantized_layers(model)
        if type(m) is QuantizedLinear and (is_wanted is None or is_wanted(n, m))
    ]
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    found = sorted([*found, *packed], key=lambda pair: order[pair[0]])
    names = {name for name, _ in found}
    skipped = [s for s in skipped if s.name not in names]
    for target in targets or ():
        if not any(n == target or n.endswith("." + target) for n in names):
            known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in order if n}))
            raise ValueError(
                f"adapt: target {target!r} is no linear layer that fits. Known: {known}"
            )
    if not found:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped) or "there are none"
        raise ValueError(f"adapt: no linear layer of the model fits: {reasons}")
    return found, skipped


def _draw(size: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """n different places out of `size`, without a permutation of all of them where n is small."""
    if n > size // 8:
        return torch.randperm(size, generator=generator)[:n]
    places = torch.zeros(0, dtype=torch.int64)
    while len(places) < n:
        more = torch.randint(size, (n - len(places) + n // 8 + 8,), generator=generator)
        places = torch.cat([places, more]).unique()
    # unique() has sorted them: those left out must not be the last
    return places[torch.randperm(len(places), generator=generator)[:n]]


def _carry(optimizer, parameter, regrown: Regrowth, watch) -> None:
    if isinstance(optimizer, DeltaAdamW):
        optimizer.carry(parameter, regrown, watch)
        return
    # of another optimizer: what it holds for each value moves along, new ones begin with nothing
    state = optimizer.state.get(parameter, {})
    for name, held in state.items():
        if isinstance(held, torch.Tensor) and held.shape == parameter.shape:
            state[name].copy_(regrown.carry(held))


def _agreed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What rank 0 has, on every rank."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.broadcast(tensor, 0)
    return list(tensors)
