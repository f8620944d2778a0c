"""What `accelerate` did to a model, module by module."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """A module that now runs one of our operators.

    name   its path in the model, "" for the model itself
    was    its class
    now    our operator
    note   what differs from the plain case, or ""
    """

    kind: str
    name: str
    was: str
    now: str
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A module that stays stock, and why."""

    kind: str
    name: str
    was: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The outcome of `accelerate`; printing it gives one line for each run of like modules.

    model      the model's class
    replaced   modules that run our operators now
    skipped    modules that an operator of ours might have served, each with the reason
    notes      what else was changed on the model, or will be done on the stock path
    """

    model: str
    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.replaced)} replaced, {len(self.skipped)} skipped"
        rows = [
            (r.kind, r.name, f"{r.was} -> {r.now}" + (f" ({r.note})" if r.note else ""))
            for r in self.replaced
        ]
        rows += [(s.kind, s.name, f"{s.was} stays: {s.reason}") for s in self.skipped]
        rows = _together(rows)
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [f"  {kind:<{widths[0]}}  {name:<{widths[1]}}  {text}" for kind, name, text in rows]
        return "\n".join([head, *lines, *(f"  note: {note}" for note in self.notes)])


def _together(rows):
    """Modules whose paths differ in one number only become one row, as layers.{0-31}.attn."""
    groups: dict[tuple, list[tuple[str, ...]]] = {}
    for kind, name, text in rows:
        pieces = re.split(r"(\d+)", name)
        groups.setdefault((kind, text, tuple(pieces[::2])), []).append(tuple(pieces[1::2]))
    joined = []
    for (kind, text, words), numbers in groups.items():
        varying = [set(column) for column in zip(*numbers, strict=True)]
        if sum(len(values) > 1 for values in varying) > 1:
            joined += [(kind, _interleave(words, row), text) for row in numbers]
            continue
        shown = [_ranges(values) if len(values) > 1 else next(iter(values)) for values in varying]
        joined.append((kind, _interleave(words, shown), text))
    return joined


def _interleave(words, numbers) -> str:
    return "".join(w + n for w, n in zip(words, [*numbers, ""], strict=True)) or "(the model)"


def _ranges(values) -> str:
    """From "0", "1", "2" and "5" to "{0-2,5}"."""
    runs: list[list[int]] = []
    for n in sorted(map(int, values)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
