"""The methods of parameter-efficient tuning that `tilewright.adapt` knows, and their options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

PLACES = ("linear", "attention", "ffn")
ACTIVATIONS = ("relu", "none")
CHOICES = ("fisher", "random", "magnitude")


@dataclass(frozen=True)
class LoRA:
    """PEFT's LoRA: y = W x + alpha / rank B A x.

    alpha     None: twice the rank
    dropout   probability that the update does not see an element of x
    targets   last parts of the names of linear layers; None for all but the output embedding, and
              fused experts where PEFT reaches them
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _expect_whole(self, "rank")
        _expect_between(self, "dropout", 0, 1, with_high=False)
        if self.alpha is not None:
            _expect_between(self, "alpha", 0, math.inf, with_low=False)
        _expect_names(self, "targets")


@dataclass(frozen=True)
class DoRA(LoRA):
    """PEFT's DoRA: y = m (W + D) x / |W + D|, D = alpha / rank B A, m and the norm for each row.

    The options are LoRA's; it does not go to fused experts.
    """


@dataclass(frozen=True)
class IA3:
    """PEFT's (IA)^3: keys, values and the inner activations of the MLP times trained vectors.

    targets       last parts of the names of linear layers; None for PEFT's choice, which it has for
                  most architectures
    feedforward   those of the targets whose input is scaled, not the output; None likewise
    """

    targets: Sequence[str] | None = None
    feedforward: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _expect_names(self, "targets")
        _expect_names(self, "feedforward", may_be_empty=True)
        if self.feedforward is not None and not set(self.feedforward) <= set(self.targets or ()):
            raise ValueError(
                f"IA3: feedforward is {list(self.feedforward)}, need some of the targets, "
                f"{list(self.targets or ())}"
            )


@dataclass(frozen=True)
class Prefix:
    """PEFT's prefix tuning: keys and values that every query of every layer sees besides.

    tokens   how many
    std      of the random numbers that they begin with; the model says something else from the
             first step on, whatever they are
    seed     of these
    """

    tokens: int = 30
    std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_whole(self, "tokens")
        _expect_between(self, "std", 0, math.inf)


@dataclass(frozen=True)
class Parallel:
    """An adapter beside a layer: y = layer(x) + scale up f(down x).

    rank         rows of down
    scale        4 in the mix-and-match adapter (MAM)
    activation   f: "relu", or "none", which is LoRA
    at           "linear": each linear layer by itself, as one operator; "ffn", as in MAM, or
                 "attention": the whole MLP or attention of each layer; or several of them
    targets      with "linear": last parts of the names of the layers; None for all but the output
                 embedding
    seed         of down; up begins with zeros

    Source: He et al., Towards a unified view of parameter-efficient transfer learning, arXiv
    2110.04366.
    """

    rank: int = 16
    scale: float = 4.0
    activation: str = "relu"
    at: str | Sequence[str] = "linear"
    targets: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_whole(self, "rank")
        _expect_between(self, "scale", -math.inf, math.inf, with_low=False)
        _expect_known(self, "activation", ACTIVATIONS)
        places = (self.at,) if isinstance(self.at, str) else tuple(self.at)
        if not places or not set(places) <= set(PLACES):
            raise ValueError(f"{_name(self)}: at is {self.at!r}, need some of {', '.join(PLACES)}")
        object.__setattr__(self, "at", places)
        _expect_names(self, "targets")
        if self.targets is not None and "linear" not in places:
            raise ValueError(
                f'{_name(self)}: targets are linear layers, and at is {places}, need "linear" in it'
            )


@dataclass(frozen=True)
class Sequential(Parallel):
    """An adapter behind a layer: y = h + scale up f(down h), h = layer(x).

    rank         rows of down
    scale        1
    activation   f: "relu" or "none"
    at           "ffn" and "attention", as Houlsby et al. have it; or "linear"
    targets      as in `Parallel`
    seed         of down; up begins with zeros

    Source: Houlsby et al., Parameter-efficient transfer learning for NLP, arXiv 1902.00751.
    """

    scale: float = 1.0
    at: str | Sequence[str] = ("attention", "ffn")


@dataclass(frozen=True)
class BitFit:
    """The biases train, and nothing else.

    add   give a bias of zeros to each linear layer that has none but the output embedding

    Source: Ben Zaken et al., BitFit, arXiv 2106.10199.
    """

    add: bool = False


@dataclass(frozen=True)
class Mask:
    """Some entries of dense weights train, the others stand still.

    density   share of entries that train, 0 < density <= 1
    by        "fisher": those of the largest squared gradients, over all weights together, which
              needs `batches`; "random": drawn alike in each weight (both: child-tuning); or
              "magnitude": the largest of each weight, and the others become and stay zero: pruning
    targets   last parts of the names of linear layers; None for all but the output embedding
    seed      of "random"

    Source: Xu et al., Raise a child in large language model, arXiv 2109.05687.
    """

    density: float = 0.1
    by: str = "random"
    targets: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_between(self, "density", 0, 1, with_low=False)
        _expect_known(self, "by", CHOICES)
        _expect_names(self, "targets")


@dataclass(frozen=True)
class Half:
    """A round of `HalfPlan`, whose options these are."""

    level: str = "category"
    ratio: float = 0.5
    seed: int = 0
    round: int = 0


PEFT = (LoRA, DoRA, IA3, Prefix)  # methods whose layers and files are PEFT's


def known() -> dict[str, type]:
    """The methods by name."""
    from tilewright.adapt.sparse import SparseDelta

    return {
        "lora": LoRA, "dora": DoRA, "ia3": IA3, "prefix": Prefix, "parallel": Parallel,
        "sequential": Sequential, "bitfit": BitFit, "mask": Mask, "sparse": SparseDelta,
        "half": Half,
    }  # fmt: skip


def name_of(method: object) -> str:
    return next(name for name, kind in known().items() if type(method) is kind)


def method_of(name: str, options: dict[str, Any]):
    """A method of that name. ValueError: there is none, or it has no such option."""
    kind = known().get(name)
    if kind is None:
        raise ValueError(f"adapt: no method {name!r}. Known: {', '.join(known())}")
    options_of = [f.name for f in fields(kind)]
    for option in options:
        if option not in options_of:
            of_it = ", ".join(options_of)
            raise ValueError(f"adapt: method {name!r} has no option {option!r}. Known: {of_it}")
    return kind(**options)


def _name(method: object) -> str:
    return type(method).__name__


def _expect_whole(method: object, name: str) -> None:
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{_name(method)}: {name} is {value!r}, need a whole number of at least 1")


def _expect_between(
    method: object, name: str, low: float, high: float, with_low=True, with_high=True
) -> None:
    value = getattr(method, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = is_number and (value > low or (with_low and value == low))
    below = is_number and (value < high or (with_high and value == high and high != math.inf))
    if not (above and below):
        left = f"{low} {'<=' if with_low else '<'} " if low != -math.inf else ""
        right = f" {'<=' if with_high else '<'} {high}" if high != math.inf else ""
        need = f"{left}{name}{right}" if left or right else "a finite number"
        raise ValueError(f"{_name(method)}: {name} is {value!r}, need {need}")


def _expect_known(method: object, name: str, values: Sequence[str]) -> None:
    value = getattr(method, name)
    if value not in values:
        raise ValueError(f"{_name(method)}: no {name} {value!r}. Known: {', '.join(values)}")


def _expect_names(method: object, name: str, may_be_empty: bool = False) -> None:
    value = getattr(method, name)
    if value is None:
        return
    good = not isinstance(value, str) and all(isinstance(part, str) and part for part in value)
    if not good or not (value or may_be_empty):
        raise ValueError(f"{_name(method)}: {name} is {value!r}, need a list of names")
    object.__setattr__(method, name, tuple(value))
