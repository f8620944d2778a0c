"""What the phases of the demo share: sizes, rows, trainers, and two trainings side by side."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tilewright import memory, pretrained
from tilewright.config import TrainOptions
from tilewright.data import PackedRows, RowOrder, TokenizerLike, pack
from tilewright.demo_clock import Clock, StepPlan
from tilewright.progress import Progress
from tilewright.train import Trainer

PRETRAINED, EXTENDED = "model", "model-extended"  # folders in OUT


@dataclass(frozen=True)
class Sizes:
    """What the demo's model, text and runs measure.

    text_bytes         of the training part; held_out_bytes of the held-out part
    context            tokens of a row in the first training; stretch times as many in the second
    initializer_range  standard deviation of new weights
    least_steps, most_steps   of the first training; long_steps likewise of the second, qlora_steps
                       of the third, over the quantized model
    learning_rate      peak of the first training, lora_rate of the others
    """

    text_bytes: int = 3_000_000
    held_out_bytes: int = 600_000
    vocab_size: int = 2048
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    initializer_range: float = 0.08
    context: int = 1024
    stretch: int = 4
    rows: int = 1
    learning_rate: float = 3e-3
    least_steps: int = 10
    most_steps: int = 2000
    least_long_steps: int = 4
    most_long_steps: int = 150
    least_qlora_steps: int = 4
    most_qlora_steps: int = 200
    lora_rank: int = 16
    lora_rate: float = 3e-3
    held_out_rows: int = 16
    long_held_out_rows: int = 12
    prompts: int = 4
    prompt_tokens: int = 256
    new_tokens: int = 64
    repeats: int = 3


QUICK = Sizes(
    text_bytes=200_000, held_out_bytes=60_000, vocab_size=384, hidden=64, layers=2, heads=2,
    kv_heads=1, context=128, stretch=4, most_steps=12, least_steps=6, least_long_steps=2,
    most_long_steps=3, least_qlora_steps=2, most_qlora_steps=3, lora_rank=4, held_out_rows=2,
    long_held_out_rows=2, prompts=2, prompt_tokens=32, new_tokens=8, repeats=1,
)  # fmt: skip


@dataclass
class Demo:
    """What the phases share.

    steps   fixed numbers of steps of the three trainings; None: as many as the clock allows
    """

    out: Path
    sizes: Sizes
    clock: Clock
    steps: tuple[int, int, int] | None
    seed: int
    results: dict[str, dict]
    train_documents: list
    held_out_documents: list
    tokenizer: TokenizerLike

    @property
    def long_context(self) -> int:
        return self.sizes.context * self.sizes.stretch

    @property
    def dtype(self) -> str:
        return self.results["measure"]["dtype"]


def llama(s: Sizes, tokenizer: TokenizerLike, seed: int):
    """A Llama with random weights, the same each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=s.hidden, num_hidden_layers=s.layers,
        intermediate_size=s.hidden * 11 // 4, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, max_position_embeddings=s.context, tie_word_embeddings=True,
        initializer_range=s.initializer_range, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    with pretrained.quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def new_model(demo: Demo):
    """The demo's model with random weights."""
    return llama(demo.sizes, demo.tokenizer, demo.seed)


def rows_of(demo: Demo, documents: list, length: int) -> PackedRows:
    return pack(documents, length, demo.tokenizer.pad_token_id or 0)


def prompts_of(demo: Demo) -> list[list[int]]:
    """The beginnings of held-out texts that are generated from."""
    s = demo.sizes
    documents = [d for d in demo.held_out_documents if len(d) >= s.prompt_tokens]
    return [d[: s.prompt_tokens].tolist() for d in documents[: s.prompts]]


def first_rows(rows: PackedRows, n: int) -> PackedRows:
    n = min(n, len(rows))
    return PackedRows(rows.input_ids[:n], rows.position_ids[:n], rows.labels[:n], n)


def new_trainer(model, demo: Demo, dtype: str, steps: int, peak: float) -> Trainer:
    options = TrainOptions(dtype=dtype, seed=demo.seed, weight_decay=0.1, stock=True)
    return Trainer(model, options, steps, peak)


def median_ms(
    trainers: dict[str, Trainer], batch: list[dict], demo: Demo, phase: str
) -> dict[str, float]:
    """Milliseconds of a step of each, in turn; the first step warms up and does not count.

    Fewer repeats than usual, but at least one, on a machine so slow that the phase's time is over.
    """
    taken: dict[str, list[float]] = {side: [] for side in trainers}
    for n in range(2 + demo.sizes.repeats):
        if n > 1 and demo.clock.left_s(phase) < 0:
            break
        for side, trainer in trainers.items():
            done = trainer.step(n, batch)
            if n:
                taken[side].append(1e3 * done.seconds)
    return {side: statistics.median(times) for side, times in taken.items()}


def peak_bytes_of(trainers: dict[str, Trainer], batch: list[dict]) -> dict[str, int | None]:
    """Bytes that a step of each needs beside what is there before it."""
    peaks: dict[str, int | None] = {}
    for side, trainer in trainers.items():
        gc.collect()
        peaks[side] = memory.peak_bytes(partial(trainer.step, 9, batch))
    return peaks


def step_plan(demo: Demo, phase: str, step_s: float, rest_s: float) -> StepPlan:
    """How many steps of step_s seconds the phase takes, if rest_s of its time go to other work."""
    s = demo.sizes
    least, most, number = {
        "train": (s.least_steps, s.most_steps, 0),
        "extend": (s.least_long_steps, s.most_long_steps, 1),
        "quantize": (s.least_qlora_steps, s.most_qlora_steps, 2),
    }[phase]
    if demo.steps is not None:
        return StepPlan(demo.steps[number])
    plan = StepPlan(most, least, lambda: demo.clock.left_s(phase) - rest_s)
    plan.cut(0, step_s)
    return plan


def side_by_side(
    trainers: dict[str, Trainer], rows: PackedRows, order: RowOrder, plan: StepPlan, label: str
) -> dict:
    """The same batches through each trainer, taking turns in who goes first.

    The plan may cut the number of steps on the way, and the learning rates fall the sooner.
    Returns losses and milliseconds by trainer and step, and the tokens that had a loss.
    """
    losses: dict[str, list[float]] = {side: [] for side in trainers}
    step_ms: dict[str, list[float]] = {side: [] for side in trainers}
    planned, n_valid, step = plan.n_steps, 0, 0
    bar = Progress(planned, label)
    start_s = time.perf_counter()
    try:
        while step < plan.n_steps:
            batches = [rows.batch(r) for r in order.micro_batches(step)]
            sides = list(trainers)
            for side in sides if step % 2 == 0 else reversed(sides):
                done = trainers[side].step(step, batches)
                losses[side].append(done.loss)
                step_ms[side].append(round(1e3 * done.seconds, 3))
            n_valid += done.n_valid
            step += 1
            plan.cut(step, (time.perf_counter() - start_s) / step)
            for trainer in trainers.values():
                trainer.n_steps = plan.n_steps
            bar.total = plan.n_steps
            bar.show(
                step, "  ".join(f"{s} {losses[s][-1]:.3f} {step_ms[s][-1]:.0f} ms" for s in sides)
            )
    finally:
        bar.close()
    return {
        "steps": step, "planned_steps": planned, "tokens_with_loss": n_valid, "losses": losses,
        "step_ms": step_ms,
    }  # fmt: skip
