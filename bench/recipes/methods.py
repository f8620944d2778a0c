"""Every method of `tilewright.adapt` on one task: from Python's sources to English documentation.

    python -m tilewright.bench.recipes.methods [--seconds 330] [--quick] [--json FILE]

A small Llama is trained on the standard library's sources. Each method then adapts a copy of it to
English, all with the same rows in the same order and as many steps: the language reference that
comes with Python, and the descriptions and licences of installed distributions, each paragraph
once. The learning rate is the best of three in shorter runs, by rows that are in neither part.

Columns: values that train and their share of the model's; bytes of the saved file; milliseconds of
a step, the median of rounds in which every method makes one step in turn; what a step takes in
memory at its peak; the learning rate, with a star where it is the largest or the smallest that was
tried, so that another might be better; held-out loss in nats a token on English, and on Python,
where the model began.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import math
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tilewright import (
    IA3,
    BitFit,
    DoRA,
    LoRA,
    Mask,
    Parallel,
    Prefix,
    Sequential,
    SparseDelta,
    accelerate,
    adapt,
    memory,
    pretrained,
)
from tilewright.adapt.methods import Half
from tilewright.config import TrainOptions
from tilewright.data import PackedRows, RowOrder, encode, pack, train_tokenizer
from tilewright.demo import collect_text
from tilewright.demo_shared import first_rows
from tilewright.files import InputError, write_json
from tilewright.train import Trainer, TrainingError, mean_loss


@dataclass(frozen=True)
class Sizes:
    """What the model and the runs measure.

    python_bytes, english_bytes   of the training parts at most
    rank          of LoRA; other methods with a choice get about as many values as it
    most_steps    of a method's run; the clock may allow fewer, but least_steps are made anyway
    rounds        of timed steps
    held_out      rows of each language; `tried` rows choose the learning rate
    """

    python_bytes: int = 3_000_000
    english_bytes: int = 900_000
    vocab_size: int = 2048
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    rank: int = 4
    prefix: int = 30
    most_pretraining: int = 6000
    most_steps: int = 600
    least_steps: int = 40
    rounds: int = 7
    held_out: int = 24
    tried: int = 8


QUICK = Sizes(
    python_bytes=60_000, english_bytes=60_000, vocab_size=384, hidden=64, heads=2, kv_heads=1,
    context=64, rank=2, prefix=4, most_pretraining=8, most_steps=5, least_steps=5, rounds=2,
    held_out=2, tried=1,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A line of the table: what `adapt` gets, None for all weights, and learning rates to try."""

    methods: tuple | None
    rates: tuple[float, float, float] = (1e-3, 3e-3, 1e-2)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Rows of one language, each a piece of a stream of `context` tokens."""

    train: PackedRows
    held_out: PackedRows
    tried: PackedRows


def methods_for(model: nn.Module, s: Sizes, last_step: int, rows: PackedRows) -> dict[str, Method]:
    """The lines of the table, those with a choice at about the number of values of LoRA."""
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    budget = s.rank * sum(m.in_features + m.out_features for m in linear)
    density = budget / sum(m.weight.numel() for m in linear)
    block = max(1, budget // (2 * s.hidden * s.layers))
    of_prefix = s.prefix * s.layers * 2 * s.kv_heads * s.hidden // s.heads
    rest = max(1, (budget - of_prefix) // (2 * s.hidden * s.layers))
    every = max(1, min(20, last_step // 5))
    moving = SparseDelta(
        density=density, rule="gradient", every=every, window=min(5, every), last_step=last_step
    )
    slow, quick = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2)
    batches = [rows.batch([n]) for n in range(min(16, len(rows)))]
    return {
        "all weights": Method(None, slow),
        "half": Method((Half(),), slow),
        "bitfit, added": Method((BitFit(add=True),), quick),
        "ia3": Method((IA3(),), quick),
        "prefix": Method((Prefix(s.prefix),), (1e-2, 3e-2, 1e-1)),
        "lora": Method((LoRA(rank=s.rank),)),
        "dora": Method((DoRA(rank=s.rank),)),
        "parallel, linear layers": Method((Parallel(s.rank),)),
        "parallel, mlp": Method((Parallel(block, at="ffn"),)),
        "sequential": Method((Sequential(max(1, block // 2)),)),
        "prefix + parallel (MAM)": Method((Prefix(s.prefix), Parallel(rest, at="ffn"))),
        "mask, random": Method((Mask(density),)),
        "mask, fisher": Method((Mask(density, by="fisher"),), options={"batches": batches}),
        "pruned to a half": Method((Mask(0.5, by="magnitude"),), slow),
        "sparse, fixed places": Method((SparseDelta(density=density),)),
        "sparse, by gradient": Method((moving,)),
    }


# text

COMMON = re.compile(r"\b(?:the|and|of|to|in|is|for|that|with|are|this|you|be|or|it|as)\b")


def english() -> Iterator[tuple[str, str]]:
    """(name, text) of what is written in English beside the standard library's sources."""
    from pydoc_data import topics

    yield from sorted(topics.topics.items())
    licences = Path("/usr/share/common-licenses")  # of Debian
    found = sorted(licences.iterdir()) if licences.is_dir() else []
    for folder in sorted({sysconfig.get_path("purelib"), *filter(None, sys.path)}):
        for info in sorted(Path(folder).glob("*.dist-info")):
            found += [info / "METADATA", *sorted(info.rglob("*LICENSE*"))]
    for path in found:
        if path.is_file() and not path.is_symlink():
            yield path.as_posix(), path.read_text("utf-8", errors="ignore")


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= 120
        and letters >= 0.88 * len(paragraph)
        and len(COMMON.findall(paragraph.lower())) >= len(paragraph) / 60
    )


def english_parts(n_bytes: int) -> tuple[list[str], list[str], list[str]]:
    """Documents to train on, to hold out and to try learning rates on; each paragraph once."""
    seen: set[str] = set()
    named: list[tuple[str, str]] = []
    for name, text in english():
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            key = re.sub(r"\W+", " ", paragraph.lower())
            if key not in seen and is_prose(paragraph):
                seen.add(key)
                kept.append(paragraph)
        if kept:
            named.append((name, "\n\n".join(kept)))
    named.sort(key=lambda pair: hashlib.sha256(Path(pair[0]).name.encode()).digest())
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    taken = 0
    for number, (_, text) in enumerate(named):
        part = {0: 1, 1: 2}.get(number % 8, 0)
        if part == 0 and taken >= n_bytes:
            continue
        parts[part].append(text)
        taken += len(text.encode()) * (part == 0)
    return parts


def rows_of(tokenizer, documents: list[str], context: int, most: int | None = None) -> PackedRows:
    """The documents one after the other, cut into whole rows."""
    stream = np.concatenate(encode(tokenizer, documents))
    n = len(stream) // context
    if not n:
        raise InputError(f"methods: {len(stream)} tokens of text, need at least {context}")
    rows = pack(list(stream[: n * context].reshape(n, context)), context, 0)
    return rows if most is None else first_rows(rows, most)


# runs


def small_llama(tokenizer, s: Sizes, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=s.hidden, num_hidden_layers=s.layers,
        intermediate_size=s.hidden * 11 // 4, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, max_position_embeddings=s.context + s.prefix,
        tie_word_embeddings=True, initializer_range=0.08, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    with pretrained.quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Recipe:
    """The base model, the rows, and a way to put a method onto a copy of the model."""

    def __init__(self, s: Sizes, seconds: float, dtype: str, seed: int):
        self.s, self.seed, self.start_s, self.seconds = s, seed, time.perf_counter(), seconds
        self.options = TrainOptions(dtype=dtype, seed=seed, weight_decay=0.0)
        python, python_held_out, _ = collect_text(s.python_bytes, s.python_bytes // 6)
        from pydoc_data import topics

        reference = Path(topics.__file__ or "").read_text("utf-8")  # English, not a source
        python = [text for text in python if text != reference]
        python_held_out = [text for text in python_held_out if text != reference]
        train, held_out, tried = english_parts(s.english_bytes)
        self.tokenizer = train_tokenizer([*python, *train], s.vocab_size)
        cut = partial(rows_of, self.tokenizer, context=s.context)
        self.python = cut(python)
        self.python_held_out = cut(python_held_out, most=s.held_out)
        self.english = Data(cut(train), cut(held_out, most=s.held_out), cut(tried, most=s.tried))
        self.model = small_llama(self.tokenizer, s, seed)

    def left_s(self) -> float:
        return self.start_s + self.seconds - time.perf_counter()

    def say(self, text: str) -> None:
        print(f"methods: {text}", file=sys.stderr, flush=True)

    def pretrain(self, share: float) -> int:
        """On Python, until that share of the time is over; returns the number of steps."""
        accelerate(self.model)
        until_s = self.left_s() - share * self.seconds
        trainer = Trainer(self.model, self.options, self.s.most_pretraining, 3e-3)
        order = RowOrder(len(self.python), 2, 1, self.seed)
        step = 0
        begin_s = time.perf_counter()
        while step < trainer.n_steps:
            trainer.step(step, [self.python.batch(r) for r in order.micro_batches(step)])
            step += 1
            per_step_s = (time.perf_counter() - begin_s) / step
            rest = int(max(0.0, self.left_s() - until_s) / per_step_s)
            trainer.n_steps = min(self.s.most_pretraining, step + rest)  # the rate falls in time
        from tilewright import restore

        restore(self.model)
        return step

    def trainer(self, method: Method, n_steps: int, rate: float) -> Trainer:
        """A copy of the model with the method on it."""
        torch.manual_seed(self.seed)
        model, tuner = copy.deepcopy(self.model), None
        if method.methods is not None:
            tuner = adapt(model, *method.methods, **method.options)  # type: ignore[operator]
            model = tuner.model
        accelerate(model)
        return Trainer(model, self.options, n_steps, rate, tuner)

    def batch(self, step: int) -> list[dict]:
        order = RowOrder(len(self.english.train), 1, 1, self.seed)
        return [self.english.train.batch(r) for r in order.micro_batches(step)]

    def train(self, method: Method, n_steps: int, rate: float) -> Trainer:
        trainer = self.trainer(method, n_steps, rate)
        for step in range(n_steps):
            trainer.step(step, self.batch(step))
        return trainer

    def tried(self, method: Method, n_steps: int, rate: float) -> float:
        """What a short run at this learning rate comes to; infinite where it leads nowhere."""
        try:
            return self.loss(self.train(method, n_steps, rate).model, self.english.tried)
        except TrainingError:
            return math.inf

    def loss(self, model: nn.Module, rows: PackedRows) -> float:
        return mean_loss(model, rows, self.options.dtype)


def measure_steps(recipe: Recipe, methods: dict[str, Method]) -> dict[str, dict[str, Any]]:
    """What trains, a step's time and its memory, of each method."""
    everything = sum(p.numel() for p in recipe.model.parameters())
    trainers = {name: recipe.trainer(m, recipe.s.rounds + 1, 1e-4) for name, m in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    for n in range(recipe.s.rounds + 1):
        turn = n % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = trainers[name].step(n, recipe.batch(n)).seconds
            if n:  # the first warms up
                times[name].append(seconds)
    measured = {}
    for name, trainer in trainers.items():
        gc.collect()
        peak = memory.peak_bytes(partial(trainer.step, 0, recipe.batch(0)))
        tuner = trainer.tuner
        trained = everything if tuner is None else tuner.n_trained()
        measured[name] = {
            "trained": trained, "share": trained / everything,
            "step_ms": 1e3 * statistics.median(times[name]), "peak_bytes": peak,
            "file_bytes": _file_bytes(trainer),
        }  # fmt: skip
    return measured


def _file_bytes(trainer: Trainer) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        if trainer.tuner is None:
            with pretrained.quiet_transformers():
                pretrained.method_of(trainer.model, "save_pretrained")(path)
        else:
            trainer.tuner.save(path)
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        return sum(p.stat().st_size for p in files)


def run(s: Sizes, seconds: float = 330.0, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """The whole recipe; returns what the table shows, as plain JSON values."""
    recipe = Recipe(s, seconds, dtype, seed)
    pretraining = recipe.pretrain(0.25)
    begin_s = time.perf_counter()
    before = {
        "english": recipe.loss(recipe.model, recipe.english.held_out),
        "python": recipe.loss(recipe.model, recipe.python_held_out),
    }
    evaluation_s = time.perf_counter() - begin_s
    recipe.say(
        f"{pretraining} steps on Python: loss {before['python']:.3f}, "
        f"English {before['english']:.3f}"
    )
    methods = methods_for(recipe.model, s, s.most_steps, recipe.english.train)
    measured = measure_steps(recipe, methods)
    # three short runs of a fifth each, then one whole one
    per_step_s = 1.6 * sum(m["step_ms"] for m in measured.values()) / 1e3
    left_s = 0.85 * recipe.left_s() - 3 * len(methods) * evaluation_s
    n_steps = max(s.least_steps, min(s.most_steps, int(left_s / per_step_s)))
    methods = methods_for(recipe.model, s, max(1, 2 * n_steps // 3), recipe.english.train)
    recipe.say(f"{len(methods)} methods, {n_steps} steps each")
    for name, method in methods.items():
        tries = {rate: recipe.tried(method, max(1, n_steps // 5), rate) for rate in method.rates}
        best = min(tries, key=lambda rate: tries[rate])
        trainer = recipe.train(method, n_steps, best)
        measured[name] |= {
            "rate": best,
            "tries": {f"{r:g}": loss if math.isfinite(loss) else None for r, loss in tries.items()},
            "english": recipe.loss(trainer.model, recipe.english.held_out),
            "python": recipe.loss(trainer.model, recipe.python_held_out),
        }  # fmt: skip
        recipe.say(f"{name}: English {measured[name]['english']:.3f} at rate {best:g}")
    return {
        "sizes": asdict(s), "dtype": dtype, "seed": seed, "pretraining_steps": pretraining,
        "steps": n_steps, "before": before, "methods": measured,
        "rows": {"python": len(recipe.python), "english": len(recipe.english.train)},
        "seconds": round(time.perf_counter() - recipe.start_s, 1),
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    head = ("method", "values", "share", "file", "step", "peak", "rate", "English", "Python",
            "forgotten")  # fmt: skip
    before = report["before"]
    table = [head, ("before", "", "", "", "", "", "", f"{before['english']:.3f}",
                    f"{before['python']:.3f}", "")]  # fmt: skip
    for name, m in report["methods"].items():
        peak = "" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:.1f} MiB"
        tried = [float(rate) for rate in m["tries"]]
        rate = f"{m['rate']:g}" + "*" * (m["rate"] in (min(tried), max(tried)))
        table.append(
            (name, f"{m['trained']}", f"{100 * m['share']:.2f} %",
             f"{m['file_bytes'] / 1024:.0f} KiB", f"{m['step_ms']:.1f} ms", peak, rate,
             f"{m['english']:.3f}", f"{m['python']:.3f}", f"{m['python'] - before['python']:+.3f}")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip
    told = (
        f"{report['pretraining_steps']} steps on Python, then {report['steps']} on English by each "
        f"method, {report['dtype']}, rows of {report['sizes']['context']} tokens; losses in nats a "
        f"token; {report['seconds']} seconds"
    )
    return "\n".join([*lines, "", told])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tilewright.bench.recipes.methods",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--seconds", type=float, default=330.0, help="time to aim at")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    given = parser.parse_args(arguments)
    if not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds is {given.seconds}, need a positive number")
    report = run(QUICK if given.quick else Sizes(), given.seconds, given.dtype, given.seed)
    print(as_text(report))
    if given.json:
        write_json(given.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
