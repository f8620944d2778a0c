"""Half fine-tuning: a round trains half of each layer's matrices, another half each time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

ATTENTION, FFN, NORM = "attention", "ffn", "norm"
CATEGORIES = (ATTENTION, FFN, NORM)
LEVELS = ("category", "layer", "model")


@dataclass(frozen=True, eq=False)
class Unit:
    """What trains or stands still as one: a matrix with its bias, a norm, one matrix of experts.

    layer     number of the layer that it belongs to, over all stacks of layers of the model
    """

    name: str
    layer: int
    category: str
    parameters: tuple[nn.Parameter, ...] = field(repr=False)

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)


@dataclass(frozen=True)
class HalfReport:
    """What a round trains.

    round      its number
    trained    elements that train; `total` elements are in the model
    share      trained / total, what of the model truly trains
    of_layers  the same of what the plan draws from, the layers without what always trains
    counts     for each layer, category -> (units that train, units)
    """

    round: int
    trained: int
    total: int
    of_layers: float
    counts: tuple[dict[str, tuple[int, int]], ...]

    @property
    def share(self) -> float:
        return self.trained / max(self.total, 1)

    def __str__(self) -> str:
        lines = [
            f"round {self.round}: {self.trained} of {self.total} weights train, "
            f"{100 * self.share:.1f} %; of the layers' {100 * self.of_layers:.1f} %"
        ]
        for number, counts in enumerate(self.counts):
            parts = (f"{name} {some} of {n}" for name, (some, n) in counts.items())
            lines.append(f"  layer {number}: {', '.join(parts)}")
        return "\n".join(lines)


class HalfPlan:
    """Which matrices train in which round.

    model   a transformer of transformers' kind: layers in a list, attention in them
    level   "category": in each layer, a share of the attention's matrices, of the MLP's and of the
            norms, each by itself; where that is no whole number, some layers have one more, so that
            the share is met over all layers (of 3 matrices, 2 in a random half of the layers and 1
            in the other). "layer": a share of each layer's matrices and norms whatever they are;
            "model": a share of those of all layers
    ratio   the share that trains, 0 to 1
    seed    of the draws; a round's draw depends on the seed and its number alone

        plan = tilewright.HalfPlan(model)
        optimizer = tilewright.AdamW(model.parameters(), lr=2e-5)
        for t, stage in enumerate(stages):
            with plan.round(t, optimizer):
                train(model, optimizer, stage)

    A router of experts counts as a matrix of the MLP, and each fused matrix of experts as one.
    Embeddings, the output head, the norm after the last layer and vectors that are neither bias nor
    norm always train. What did not require a gradient when the plan was made stays so. For what
    stands still autograd computes no weight gradient and keeps no activation, and the optimizer
    has no state.
    ValueError: an option outside the above, or a model without layers that have attention.

    Source: Hui et al., HFT: half fine-tuning for large language models, arXiv 2404.18466.
    """

    def __init__(self, model: nn.Module, level: str = "category", ratio: float = 0.5,
                 seed: int = 0):  # fmt: skip
        if level not in LEVELS:
            raise ValueError(f"HalfPlan: no level {level!r}. Known: {', '.join(LEVELS)}")
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"HalfPlan: ratio is {ratio}, need 0 <= ratio <= 1")
        self.model, self.level, self.ratio, self.seed = model, level, ratio, seed
        self.units = find_units(model)
        self.n_layers = 1 + max(unit.layer for unit in self.units)
        self._active: frozenset[Unit] | None = None
        self._round: int | None = None

    # --- drawing ---

    def draw(self, t: int) -> frozenset[Unit]:
        """What trains in round t, besides what always does."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + t)
        if self.level == "model":
            return frozenset(self._some([list(self.units)], generator))
        by_layer: dict[tuple, list[list[Unit]]] = {}
        for unit in self.units:
            kind = (unit.category,) if self.level == "category" else ()
            layers = by_layer.setdefault(kind, [[] for _ in range(self.n_layers)])
            layers[unit.layer].append(unit)
        drawn: list[Unit] = []
        for kind in sorted(by_layer):
            drawn += self._some(by_layer[kind], generator)
        return frozenset(drawn)

    def _some(self, layers: Sequence[list[Unit]], generator: torch.Generator) -> Iterator[Unit]:
        """`ratio` of the units of each layer; what is left of a unit goes to random layers."""
        counts = [int(self.ratio * len(units)) for units in layers]
        more = round(self.ratio * sum(map(len, layers))) - sum(counts)
        order = torch.randperm(len(layers), generator=generator).tolist()
        for number in [n for n in order if self.ratio * len(layers[n]) > counts[n]][:more]:
            counts[number] += 1
        for units, count in zip(layers, counts, strict=True):
            for place in torch.randperm(len(units), generator=generator)[:count].tolist():
                yield units[place]

    # --- rounds ---

    @contextmanager
    def round(self, t: int, *optimizers: torch.optim.Optimizer):
        """Train round t's part of the model inside; afterwards all of it requires gradients again.

        optimizers   whose state moves along: it is dropped for what stands still, so that what
                     trains again after a round of standing still begins with fresh moments. Keep
                     them from round to round, or make new ones inside

        Under DistributedDataParallel wrap the model inside: it looks at what requires gradients
        once.
        """
        self.begin(t, *optimizers)
        try:
            yield self
        finally:
            self.end()

    def begin(self, t: int, *optimizers: torch.optim.Optimizer) -> None:
        """The entry of `round`, for code that is not a block."""
        drawn, before = self.draw(t), self._active
        for unit in self.units:
            is_active = unit in drawn
            is_new = before is not None and is_active and unit not in before
            for p in unit.parameters:
                p.requires_grad_(is_active)
                if not is_active:
                    p.grad = None
                if not is_active or is_new:
                    for optimizer in optimizers:
                        optimizer.state.pop(p, None)
        self._active, self._round = drawn, t

    def end(self) -> None:
        """The exit of `round`."""
        for unit in self.units:
            for p in unit.parameters:
                p.requires_grad_(True)

    def report(self) -> HalfReport:
        """Of the round that is on, or was last; ValueError before the first."""
        if self._active is None or self._round is None:
            raise ValueError("HalfPlan: report() before the first round, need begin() or round()")
        counts: list[dict[str, tuple[int, int]]] = [{} for _ in range(self.n_layers)]
        for unit in self.units:
            some, n = counts[unit.layer].get(unit.category, (0, 0))
            counts[unit.layer][unit.category] = some + (unit in self._active), n + 1
        drawn_from = sum(unit.numel() for unit in self.units)
        active = sum(unit.numel() for unit in self._active)
        planned = {p for unit in self.units for p in unit.parameters}
        always = sum(
            p.numel() for p in self.model.parameters() if p.requires_grad and p not in planned
        )
        total = sum(p.numel() for p in self.model.parameters())
        return HalfReport(
            self._round, always + active, total, active / max(drawn_from, 1), tuple(counts)
        )


def find_units(model: nn.Module) -> list[Unit]:
    """What a plan draws from, in the model's order."""
    units: list[Unit] = []
    seen: set[nn.Parameter] = set()
    for number, (prefix, layer) in enumerate(layers_with_attention(model)):
        for name, module in layer.named_modules():
            own = {
                n: p
                for n, p in module.named_parameters(recurse=False)
                if p.requires_grad and p not in seen
            }
            category = _category(name, module)
            for part, parameters in _parts(own, category):
                seen.update(parameters)
                full = ".".join(filter(None, (prefix, name, part)))
                units.append(Unit(full, number, category, parameters))
    if not units:
        raise ValueError(
            f"HalfPlan: {type(model).__name__} has no list of layers with attention in them whose "
            "weights require gradients"
        )
    return units


def layers_with_attention(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of every outermost list that holds attention."""
    found: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") for outer in inside):
            continue
        if isinstance(module, nn.ModuleList) and _holds_attention(module):
            inside.append(name)
            found += [(f"{name}.{n}", layer) for n, layer in module.named_children()]
    return found


def _holds_attention(module: nn.Module) -> bool:
    return any(re.search("attn|attention", name.lower()) for name, _ in module.named_modules())


def _category(name: str, module: nn.Module) -> str:
    last = name.rsplit(".", 1)[-1].lower()
    if "norm" in type(module).__name__.lower() or "norm" in last or re.match(r"ln_?\d*$", last):
        return NORM
    return ATTENTION if re.search("attn|attention", name.lower()) else FFN


def _parts(own: dict[str, nn.Parameter], category: str):
    """A module's own parameters as units: (name of the part, parameters)."""
    matrices = [n for n, p in own.items() if p.dim() >= 2]
    if category == NORM and own:
        yield "", tuple(own.values())
    elif len(matrices) == 1:
        yield "", tuple(own.values())
    elif matrices:  # such as fused experts: each matrix with what is named after it
        for matrix in matrices:
            yield matrix, tuple(p for n, p in own.items() if n == matrix or n == matrix + "_bias")
