"""Which implementation of an operator runs, and why not the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewright import settings


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    why_not   takes the operator's problem record and returns None if this implementation can run
              it here, else the reason in a few words
    """

    name: str
    why_not: Callable[[object], str | None]


REFERENCE = Implementation("reference", lambda problem: None)  # runs everywhere


def implementation_of(room: str, name: str) -> Implementation:
    """The module `name` of a room, imported when it is first asked: neither triton nor a compiled
    module is loaded before. Triton is not asked about tensors that it cannot reach."""

    def why_not(problem) -> str | None:
        is_triton = name.startswith("triton")
        if is_triton and problem.device != "cuda" and not settings.triton_is_interpreted():
            return f"tensors are on {problem.device}, and TRITON_INTERPRET is not 1"
        return importlib.import_module(f"tilewright.ops.{room}.{name}").why_not(problem)

    return Implementation(name, why_not)


@dataclass(frozen=True)
class Operator:
    """An operator as `explain` and `doctor` know it.

    candidates   best first
    problem      builds the problem record from the public function's arguments
    sample       builds the problem records that `doctor` asks about, by a short description
    """

    name: str
    candidates: tuple[Implementation, ...]
    problem: Callable[..., object]
    sample: Callable[[], dict[str, object]]


@dataclass(frozen=True)
class Explanation:
    """What "auto" takes for a call, and the reason against each other implementation."""

    operator: str
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'nothing can run this here'}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def usual_types() -> list[tuple[str, str, torch.dtype]]:
    """What samples are made for: (label, device, dtype) for each device that is here."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(f"{d} {str(t).removeprefix('torch.')}", d, t) for d in devices for t in dtypes]


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    OPERATORS[operator.name] = operator


def explain_problem(name: str, problem: object) -> Explanation:
    """`explain`, for a problem record that is already built."""
    operator = OPERATORS[name]
    chosen, reasons = None, {}
    forced = settings.forced_impl()
    for candidate in operator.candidates:
        why_not = candidate.why_not(problem)
        if why_not is None and forced and candidate.name != forced:
            why_not = f"TILEWRIGHT_IMPL asks for {forced}"
        if why_not is None and chosen is None:
            chosen = candidate.name
        else:
            reasons[candidate.name] = why_not or f"{chosen} comes first"
    return Explanation(name, chosen, reasons)


def explain(operator: str, *args, **kwargs) -> Explanation:
    """Which implementation `impl="auto"` takes for a call, and why not the others.

    operator         the public function's name, such as "flash_attention"
    args, kwargs     what would be passed to that function; nothing is computed

        >>> print(tilewright.explain("flash_attention", q, k, v, is_causal=True))
    """
    if operator not in OPERATORS:
        raise ValueError(f"explain: no operator {operator!r}. Known: {', '.join(OPERATORS)}")
    kwargs.pop("impl", None)
    return explain_problem(operator, OPERATORS[operator].problem(*args, **kwargs))


def choose(name: str, impl: str, problem: object) -> str:
    """The implementation to run: the named one, or the first that can.

    ValueError: no such implementation. RuntimeError: it was named and cannot run here.
    """
    operator = OPERATORS[name]
    if impl == "auto":
        if settings.forced_impl() is None:  # the usual call pays for no reasons
            for candidate in operator.candidates:
                if candidate.why_not(problem) is None:
                    return candidate.name
        explanation = explain_problem(name, problem)
        if explanation.chosen is None:
            raise RuntimeError(str(explanation))
        return explanation.chosen
    for candidate in operator.candidates:
        if candidate.name == impl:
            why_not = candidate.why_not(problem)
            if why_not is None:
                return impl
            here = [c.name for c in operator.candidates if c.why_not(problem) is None]
            raise RuntimeError(
                f'{name}: impl "{impl}" cannot run: {why_not}. Here: {", ".join(here)}. '
                f'See tilewright.explain("{name}", ...).'
            )
    known = ", ".join(c.name for c in operator.candidates)
    raise ValueError(f'{name}: no impl "{impl}". Known: auto, {known}')
