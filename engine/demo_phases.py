"""The phases of the demo: functions of what they share that return results as plain data.

PHASES lists them in the order in which they run; a further one needs an entry there, a share of the
time in demo_clock.py, and its lines in demo_report.py.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tilewright import adapt, memory, pretrained
from tilewright.config import TrainOptions
from tilewright.data import IGNORED, PackedRows, RowOrder, TokenizerLike, pack
from tilewright.demo_clock import Clock, StepPlan
from tilewright.files import InputError
from tilewright.generate import generate
from tilewright.progress import Progress
from tilewright.train import Trainer, add_lora, autocast, mean_loss

PRETRAINED, EXTENDED = "model", "model-extended"  # folders in OUT
EVALUATION_BINS = 16  # equal parts of a row, each with a mean loss of its own


@dataclass(frozen=True)
class Sizes:
    """What the demo's model, text and runs measure.

    text_bytes         of the training part; held_out_bytes of the held-out part
    context            tokens of a row in the first training; stretch times as many in the second
    initializer_range  standard deviation of new weights
    least_steps, most_steps   of the first training, long_steps likewise of the second
    learning_rate      peak of the first training, lora_rate of the second
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
    most_long_steps=3, lora_rank=4, held_out_rows=2, long_held_out_rows=2, prompts=2,
    prompt_tokens=32, new_tokens=8, repeats=1,
)  # fmt: skip


@dataclass
class Demo:
    """What the phases share.

    steps   fixed numbers of steps of the two trainings; None: as many as the clock allows
    """

    out: Path
    sizes: Sizes
    clock: Clock
    steps: tuple[int, int] | None
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


def _new_model(demo: Demo):
    """The demo's Llama with random weights, the same each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    s = demo.sizes
    config = LlamaConfig(
        vocab_size=len(demo.tokenizer), hidden_size=s.hidden, num_hidden_layers=s.layers,
        intermediate_size=s.hidden * 11 // 4, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, max_position_embeddings=s.context, tie_word_embeddings=True,
        initializer_range=s.initializer_range, eos_token_id=demo.tokenizer.eos_token_id,
        pad_token_id=demo.tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(demo.seed)
    with pretrained.quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _rows(demo: Demo, documents: list, length: int) -> PackedRows:
    return pack(documents, length, demo.tokenizer.pad_token_id or 0)


def _long_rows(demo: Demo, documents: list) -> PackedRows:
    """Whole rows of one document each, so that the context is really long.

    The first row of every document comes before the second of any: a few rows are many documents.
    """
    length = demo.long_context
    pieces = [
        (start, number, document[start : start + length])
        for number, document in enumerate(documents)
        for start in range(0, len(document) - length + 1, length)
    ]
    if not pieces:
        raise InputError(f"the text has no file of {length} tokens; this is a bug of the demo")
    pieces.sort(key=lambda piece: piece[:2])
    return _rows(demo, [piece for *_, piece in pieces], length)


def _first(rows: PackedRows, n: int) -> PackedRows:
    n = min(n, len(rows))
    return PackedRows(rows.input_ids[:n], rows.position_ids[:n], rows.labels[:n], n)


def _trainer(model, demo: Demo, dtype: str, steps: int, peak: float) -> Trainer:
    options = TrainOptions(dtype=dtype, seed=demo.seed, weight_decay=0.1, stock=True)
    return Trainer(model, options, steps, peak)


def _measure(demo: Demo) -> dict:
    """Time and peak memory of a step, on models that are thrown away."""
    rows = _rows(demo, demo.train_documents, demo.sizes.context)
    batch = [rows.batch(range(demo.sizes.rows))]
    stock = {
        dtype: _trainer(_new_model(demo), demo, dtype, 100, 1e-3)
        for dtype in ("float32", "bfloat16")
    }
    stock_ms = _median_ms(stock, batch, demo, "measure")
    # both sides take the dtype in which stock is faster on this machine
    dtype = min(stock_ms, key=stock_ms.__getitem__)
    models = {"stock": _new_model(demo), "tilewright": _new_model(demo)}
    report = adapt.accelerate(models["tilewright"])
    trainers = {side: _trainer(m, demo, dtype, 100, 1e-3) for side, m in models.items()}
    step_ms = _median_ms(trainers, batch, demo, "measure")
    return {
        "dtype": dtype, "stock_step_ms": stock_ms, "step_ms": step_ms,
        "peak_bytes": _peaks(trainers, batch),
        "gradient_error": _gradient_errors(demo, dtype, batch[0]),
        "replaced": str(report).splitlines(),
    }  # fmt: skip


def _gradient_errors(demo: Demo, dtype: str, batch: dict) -> dict[str, float]:
    """|g - g64| / |g64| over all parameters of the first batch, g64 by stock in float64.

    Losses of two long runs drift apart by rounding alone; this is what one step differs by.
    """
    exact = _gradient(_new_model(demo).double(), "float32", batch)
    errors = {}
    for side in ("stock", "tilewright"):
        model = _new_model(demo)
        if side == "tilewright":
            adapt.accelerate(model)
        errors[side] = float((_gradient(model, dtype, batch) - exact).norm() / exact.norm())
    return errors


def _gradient(model, dtype: str, batch: dict) -> torch.Tensor:
    model.train()
    with autocast(torch.device("cpu"), dtype):
        model(**batch, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def _median_ms(
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


def _peaks(trainers: dict[str, Trainer], batch: list[dict]) -> dict[str, int | None]:
    """Bytes that a step of each needs beside what is there before it."""
    peaks: dict[str, int | None] = {}
    for side, trainer in trainers.items():
        gc.collect()
        peaks[side] = memory.peak_bytes(partial(trainer.step, 9, batch))
    return peaks


def _train(demo: Demo) -> dict:
    """Train from scratch twice, from the same weights and on the same batches."""
    s, before = demo.sizes, demo.results["measure"]
    rows = _rows(demo, demo.train_documents, s.context)
    held_out = _first(_rows(demo, demo.held_out_documents, s.context), s.held_out_rows)
    both_s = sum(before["step_ms"].values()) / 1e3
    # without a backward, a row takes a third of its time in a step
    evaluation_s = both_s * len(held_out) / (3 * s.rows)
    plan = _plan(demo, "train", both_s, evaluation_s)
    order = RowOrder(len(rows), s.rows, 1, demo.seed)
    models = {"stock": _new_model(demo), "tilewright": _new_model(demo)}
    adapt.accelerate(models["tilewright"])
    trainers = {
        side: _trainer(m, demo, demo.dtype, plan.n_steps, s.learning_rate)
        for side, m in models.items()
    }
    run = _side_by_side(trainers, rows, order, plan, "train")

    after = {side: mean_loss(m, held_out, demo.dtype) for side, m in models.items()}
    # the same weights through both: what the operators alone make different
    adapt.restore(models["tilewright"])
    batch = held_out.batch([0])
    del batch["labels"]
    with torch.no_grad():
        stock_logits = models["tilewright"].eval()(**batch, use_cache=False).logits
        adapt.accelerate(models["tilewright"])
        logits = models["tilewright"](**batch, use_cache=False).logits
    adapt.restore(models["tilewright"])
    pretrained.save(models["tilewright"], demo.tokenizer, demo.out / PRETRAINED)
    losses = run["losses"]
    gaps = [abs(a - b) for a, b in zip(losses["stock"], losses["tilewright"], strict=True)]
    return {
        **run, "rows": s.rows, "context": s.context, "dtype": demo.dtype,
        "parameters": sum(p.numel() for p in models["stock"].parameters()),
        "held_out_loss": after, "held_out_tokens": held_out.n_valid,
        "first_loss_gap": gaps[0], "median_loss_gap": statistics.median(gaps),
        "largest_loss_gap": max(gaps),
        "largest_logit_gap": float((logits - stock_logits).abs().max()),
        "largest_logit": float(stock_logits.abs().max()),
    }  # fmt: skip


def _plan(demo: Demo, phase: str, step_s: float, rest_s: float) -> StepPlan:
    """How many steps of step_s seconds the phase takes, if rest_s of its time go to other work."""
    s = demo.sizes
    least, most, number = {
        "train": (s.least_steps, s.most_steps, 0),
        "extend": (s.least_long_steps, s.most_long_steps, 1),
    }[phase]
    if demo.steps is not None:
        return StepPlan(demo.steps[number])
    plan = StepPlan(most, least, lambda: demo.clock.left_s(phase) - rest_s)
    plan.cut(0, step_s)
    return plan


def _side_by_side(
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


def _extend(demo: Demo) -> dict:
    """Tune the trained model for a longer context twice, and compare perplexities there."""
    s, length = demo.sizes, demo.long_context
    rows = _long_rows(demo, demo.train_documents)
    held_out = _long_rows(demo, demo.held_out_documents)
    plain = pretrained.load(demo.out / PRETRAINED, needs_weights=True).model
    start_s = time.perf_counter()
    _quality(plain, _first(held_out, 1), demo)
    row_s = time.perf_counter() - start_s
    n_rows = s.long_held_out_rows
    if demo.steps is None:  # the four evaluations may take a quarter of what is left
        n_rows = min(n_rows, max(2, int(demo.clock.left_s("extend") / (4 * 4 * row_s))))
    held_out = _first(held_out, n_rows)
    quality = {"trained": _quality(plain, held_out, demo)}
    pretrained.stretch_rope(plain, length)
    quality["stretched"] = _quality(plain, held_out, demo)

    options = TrainOptions(lora_rank=s.lora_rank, train=("embed", "norm"), context=length)
    group = length // 4
    models = {}
    for side in ("stock", "tilewright", "tilewright_full"):
        torch.manual_seed(demo.seed)
        models[side] = add_lora(copy.deepcopy(plain), options)
    adapt.accelerate(models["tilewright"], attention="shifted", group_size=group)
    adapt.accelerate(models["tilewright_full"])

    # steps that are undone: they choose the number of steps and show time and peak memory
    batch = [rows.batch([0])]
    saved = {side: copy.deepcopy(m.state_dict()) for side, m in models.items()}
    probes = {side: _trainer(m, demo, demo.dtype, 100, s.lora_rate) for side, m in models.items()}
    probe_ms = _median_ms(probes, batch, demo, "extend")
    peaks = _peaks(probes, batch)
    for side, model in models.items():
        model.load_state_dict(saved[side])
    del probes, saved, models["tilewright_full"]

    both_s = (probe_ms["stock"] + probe_ms["tilewright"]) / 1e3
    plan = _plan(demo, "extend", both_s, 2 * n_rows * row_s)
    trainers = {
        side: _trainer(model, demo, demo.dtype, plan.n_steps, s.lora_rate)
        for side, model in models.items()
    }
    order = RowOrder(len(rows), 1, 1, demo.seed)
    run = _side_by_side(trainers, rows, order, plan, "extend")
    quality["full"] = _quality(models["stock"], held_out, demo)
    quality["shifted"] = _quality(models["tilewright"], held_out, demo)
    with pretrained.quiet_transformers():
        merged = models["tilewright"].merge_and_unload()
    pretrained.save(merged, demo.tokenizer, demo.out / EXTENDED)
    return {
        **run, "context": length, "short_context": s.context, "group_size": group,
        "lora_rank": s.lora_rank, "dtype": demo.dtype, "probe_step_ms": probe_ms,
        "peak_bytes": peaks, "held_out_rows": n_rows, "quality": quality,
    }  # fmt: skip


def _quality(model, rows: PackedRows, demo: Demo) -> dict:
    """Perplexity of the same tokens in pieces of the short context and in whole rows.

    Attention is dense, and tilewright's, whatever the model was trained with; it is stock
    afterwards. losses: means by place in the row, of EVALUATION_BINS equal parts.
    """
    short = demo.sizes.context
    labels = rows.labels.clone()
    labels[:, ::short] = IGNORED  # the first token of a piece has no context there
    whole = PackedRows(rows.input_ids, rows.position_ids, labels, len(rows))
    n_pieces = labels.numel() // short
    pieces = PackedRows(
        rows.input_ids.view(n_pieces, short), torch.arange(short).repeat(n_pieces, 1),
        labels.view(n_pieces, short), n_pieces,
    )  # fmt: skip
    adapt.accelerate(model)
    found = {}
    for name, cut, at_once in (("short", pieces, n_pieces // len(rows)), ("long", whole, 1)):
        losses = _token_losses(model, cut, at_once, demo.dtype).view(labels.shape)
        by_place = losses.unflatten(1, (EVALUATION_BINS, -1)).nanmean(dim=(0, 2))
        mean = float(losses.nanmean(dtype=torch.float64))
        found[name] = {
            "perplexity": math.exp(min(mean, 700.0)), "losses": by_place.tolist(),
            "tokens": int((~losses.isnan()).sum()),
        }  # fmt: skip
    adapt.restore(model)
    return found


@torch.no_grad()
def _token_losses(model, rows: PackedRows, at_once: int, dtype: str) -> torch.Tensor:
    """Negative log-likelihood of each labelled token in nats, (N, L); NaN elsewhere."""
    model.eval()
    losses = torch.full(rows.labels.shape, math.nan)
    for start in range(0, len(rows), at_once):
        batch = rows.batch(range(start, start + at_once))
        labels = batch.pop("labels")[:, 1:]
        with autocast(torch.device("cpu"), dtype):
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        each = each.view(labels.shape).masked_fill(labels == IGNORED, math.nan)
        losses[start : start + at_once, 1:] = each
    return losses


def _generate(demo: Demo) -> dict:
    """Continue held-out texts with the extended model, by both sides in turn."""
    from transformers import LlamaForCausalLM

    s = demo.sizes
    model = pretrained.load(demo.out / EXTENDED, needs_weights=True).model.eval()
    assert isinstance(model, LlamaForCausalLM)  # _extend wrote it
    documents = [d for d in demo.held_out_documents if len(d) >= s.prompt_tokens][: s.prompts]
    prompts = [d[: s.prompt_tokens].tolist() for d in documents]
    # no end token, so that both produce the same number of tokens
    model.generation_config.eos_token_id = None
    input_ids = torch.tensor(prompts)

    def stock() -> list[list[int]]:
        with torch.no_grad(), pretrained.quiet_transformers():
            out = pretrained.method_of(model, "generate")(
                input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
                max_new_tokens=s.new_tokens,
            )  # fmt: skip
        return out[:, s.prompt_tokens :].tolist()

    def ours() -> list[list[int]]:
        return [g.tokens for g in generate(model, prompts, max_new_tokens=s.new_tokens)]

    taken: dict[str, list[float]] = {"stock": [], "tilewright": []}
    tokens: dict[str, list[list[int]]] = {}
    for repeat in range(s.repeats + 1):  # the first warms up
        for side, work in (("stock", stock), ("tilewright", ours)):
            if side == "tilewright":
                adapt.accelerate(model)
            start_s = time.perf_counter()
            tokens[side] = work()
            if repeat:
                taken[side].append(time.perf_counter() - start_s)
            adapt.restore(model) if side == "tilewright" else None
    n_tokens = len(prompts) * s.new_tokens
    equal = sum(
        a == b
        for one, other in zip(tokens["stock"], tokens["tilewright"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    sample = generate(
        model, ["def "], tokenizer=demo.tokenizer, max_new_tokens=s.new_tokens, temperature=0.8,
        top_p=0.95, seed=demo.seed,
    )  # fmt: skip
    return {
        "prompts": len(prompts), "prompt_tokens": s.prompt_tokens, "new_tokens": s.new_tokens,
        "dtype": "float32", "equal_tokens": equal, "tokens": n_tokens,
        "tokens_per_s": {side: n_tokens / statistics.median(t) for side, t in taken.items()},
        "sample": "def " + sample[0].text,
    }  # fmt: skip


PHASES: dict[str, tuple[str, Callable[[Demo], dict]]] = {
    "measure": ("a step's time, to choose dtype and number of steps, and its memory", _measure),
    "train": ("from scratch, with stock and with tilewright's operators in turn", _train),
    "extend": ("longer context by LoRA, full attention and shifted-sparse in turn", _extend),
    "generate": ("greedy, with transformers' generate and with ours in turn", _generate),
}
