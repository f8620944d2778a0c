"""The phases of the demo: functions of what they share that return results as plain data.

PHASES lists them in the order in which they run; a further one needs an entry there, and its lines
in demo_report.py.
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
from tilewright.data import PackedRows, RowOrder, TokenizerLike, pack
from tilewright.files import InputError
from tilewright.generate import generate
from tilewright.progress import Progress
from tilewright.train import Trainer, add_lora, autocast, mean_loss

PRETRAINED, EXTENDED = "model", "model-extended"  # folders in OUT


@dataclass(frozen=True)
class Sizes:
    """What the demo's model, text and runs measure.

    text_bytes  of the training part; held_out_bytes of the held-out part
    context     tokens of a row in the first training; stretch times as many in the second
    least_steps, most_steps   of the first training, long_steps likewise of the second
    """

    text_bytes: int = 3_000_000
    held_out_bytes: int = 400_000
    vocab_size: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 1024
    stretch: int = 4
    rows: int = 2
    least_steps: int = 10
    most_steps: int = 400
    least_long_steps: int = 4
    most_long_steps: int = 60
    lora_rank: int = 16
    held_out_rows: int = 8
    long_held_out_rows: int = 3
    prompts: int = 4
    prompt_tokens: int = 256
    new_tokens: int = 64
    repeats: int = 3


QUICK = Sizes(
    text_bytes=200_000, held_out_bytes=60_000, vocab_size=384, hidden=64, layers=2, heads=2,
    kv_heads=1, context=128, most_steps=12, least_steps=6, least_long_steps=2, most_long_steps=3,
    lora_rank=4, held_out_rows=2, long_held_out_rows=1, prompts=2, prompt_tokens=32, new_tokens=8,
    repeats=1,
)  # fmt: skip
# shares of the time aimed at; the rest is for reading the text, measuring and the evaluations
TRAIN_SHARE, EXTEND_SHARE = 0.50, 0.25


@dataclass
class Demo:
    """What the phases share."""

    out: Path
    sizes: Sizes
    seconds: float
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
        eos_token_id=demo.tokenizer.eos_token_id, pad_token_id=demo.tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(demo.seed)
    with pretrained.quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _rows(demo: Demo, documents: list, length: int, only_long: bool = False) -> PackedRows:
    if only_long:  # whole rows of one document each, so that the context is really long
        documents = [d[i : i + length] for d in documents for i in range(0, len(d), length)]
        documents = [d for d in documents if len(d) == length]
        if not documents:
            raise InputError(f"the text has no file of {length} tokens; this is a bug of the demo")
    return pack(documents, length, demo.tokenizer.pad_token_id or 0)


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
    stock_ms = _median_ms(stock, batch, demo)
    # both sides take the dtype in which stock is faster on this machine
    dtype = min(stock_ms, key=stock_ms.__getitem__)
    models = {"stock": _new_model(demo), "tilewright": _new_model(demo)}
    report = adapt.accelerate(models["tilewright"])
    trainers = {side: _trainer(m, demo, dtype, 100, 1e-3) for side, m in models.items()}
    step_ms = _median_ms(trainers, batch, demo)
    peaks: dict[str, int | None] = {}
    for side, trainer in trainers.items():
        gc.collect()
        peaks[side] = memory.peak_bytes(partial(trainer.step, 9, batch))
    return {
        "dtype": dtype, "stock_step_ms": stock_ms, "step_ms": step_ms, "peak_bytes": peaks,
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


def _median_ms(trainers: dict[str, Trainer], batch: list[dict], demo: Demo) -> dict[str, float]:
    """Milliseconds of a step of each, in turn; the first steps warm up and do not count."""
    taken: dict[str, list[float]] = {side: [] for side in trainers}
    for n in range(2 + demo.sizes.repeats):
        for side, trainer in trainers.items():
            done = trainer.step(n, batch)
            if n:
                taken[side].append(1e3 * done.seconds)
    return {side: statistics.median(times) for side, times in taken.items()}


def _train(demo: Demo) -> dict:
    """Train from scratch twice, from the same weights and on the same batches."""
    s, before = demo.sizes, demo.results["measure"]
    both_s = sum(before["step_ms"].values()) / 1e3
    n_steps = int(TRAIN_SHARE * demo.seconds / both_s)
    n_steps = min(max(n_steps, s.least_steps), s.most_steps)
    rows = _rows(demo, demo.train_documents, s.context)
    held_out = _first(_rows(demo, demo.held_out_documents, s.context), s.held_out_rows)
    order = RowOrder(len(rows), s.rows, 1, demo.seed)
    models = {"stock": _new_model(demo), "tilewright": _new_model(demo)}
    adapt.accelerate(models["tilewright"])
    trainers = {side: _trainer(m, demo, demo.dtype, n_steps, 1.5e-3) for side, m in models.items()}
    losses, step_ms, n_valid = _side_by_side(trainers, rows, order, n_steps, "train")

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
    gaps = [abs(a - b) for a, b in zip(losses["stock"], losses["tilewright"], strict=True)]
    return {
        "steps": n_steps, "rows": s.rows, "context": s.context, "dtype": demo.dtype,
        "parameters": sum(p.numel() for p in models["stock"].parameters()),
        "tokens_with_loss": n_valid, "losses": losses, "step_ms": step_ms,
        "held_out_loss": after, "held_out_tokens": held_out.n_valid,
        "first_loss_gap": gaps[0], "largest_loss_gap": max(gaps),
        "largest_logit_gap": float((logits - stock_logits).abs().max()),
        "largest_logit": float(stock_logits.abs().max()),
    }  # fmt: skip


def _side_by_side(
    trainers: dict[str, Trainer], rows: PackedRows, order: RowOrder, n_steps: int, label: str
) -> tuple[dict, dict, int]:
    """The same batches through each trainer, taking turns in who goes first.

    Returns losses and milliseconds by trainer and step, and the tokens that had a loss.
    """
    losses: dict[str, list[float]] = {side: [] for side in trainers}
    step_ms: dict[str, list[float]] = {side: [] for side in trainers}
    n_valid = 0
    bar = Progress(n_steps, label)
    try:
        for step in range(n_steps):
            batches = [rows.batch(r) for r in order.micro_batches(step)]
            sides = list(trainers)
            for side in sides if step % 2 == 0 else reversed(sides):
                done = trainers[side].step(step, batches)
                losses[side].append(done.loss)
                step_ms[side].append(round(1e3 * done.seconds, 3))
            n_valid += done.n_valid
            bar.show(
                step + 1,
                "  ".join(f"{s} {losses[s][-1]:.3f} {step_ms[s][-1]:.0f} ms" for s in sides),
            )
    finally:
        bar.close()
    return losses, step_ms, n_valid


def _extend(demo: Demo) -> dict:
    """Tune the trained model for a longer context twice, and compare perplexities there."""
    s, length = demo.sizes, demo.long_context
    rows = _rows(demo, demo.train_documents, length, only_long=True)
    held_out = _first(
        _rows(demo, demo.held_out_documents, length, only_long=True), s.long_held_out_rows
    )
    plain = pretrained.load(demo.out / PRETRAINED, needs_weights=True).model
    perplexity = {"before, RoPE as trained": _perplexity(plain, held_out, demo)}
    pretrained.stretch_rope(plain, length)
    perplexity["before, RoPE stretched"] = _perplexity(plain, held_out, demo)

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
    probes = {side: _trainer(m, demo, demo.dtype, 100, 1e-3) for side, m in models.items()}
    before_ms = _median_ms(probes, batch, demo)
    peaks = {}
    for side, probe in probes.items():
        gc.collect()
        peaks[side] = memory.peak_bytes(partial(probe.step, 9, batch))
        models[side].load_state_dict(saved[side])
    del probes, saved
    both_s = (before_ms["stock"] + before_ms["tilewright"]) / 1e3
    n_steps = int(EXTEND_SHARE * demo.seconds / both_s)
    n_steps = min(max(n_steps, s.least_long_steps), s.most_long_steps)
    trainers = {
        side: _trainer(models[side], demo, demo.dtype, n_steps, 1e-3)
        for side in ("stock", "tilewright")
    }
    order = RowOrder(len(rows), 1, 1, demo.seed)
    losses, step_ms, n_valid = _side_by_side(trainers, rows, order, n_steps, "extend")
    perplexity["after, tuned with full attention"] = _perplexity(models["stock"], held_out, demo)
    # evaluation is dense: accelerate's shifted attention holds in training only
    perplexity["after, tuned with shifted"] = _perplexity(models["tilewright"], held_out, demo)
    adapt.restore(models["tilewright"])
    with pretrained.quiet_transformers():
        merged = models["tilewright"].merge_and_unload()
    pretrained.save(merged, demo.tokenizer, demo.out / EXTENDED)
    return {
        "steps": n_steps, "context": length, "group_size": group, "lora_rank": s.lora_rank,
        "dtype": demo.dtype, "tokens_with_loss": n_valid, "losses": losses, "step_ms": step_ms,
        "probe_step_ms": before_ms, "probe_steps": 1 + s.repeats, "peak_bytes": peaks,
        "perplexity": perplexity, "held_out_tokens": held_out.n_valid,
    }  # fmt: skip


def _perplexity(model, rows: PackedRows, demo: Demo) -> float:
    return math.exp(min(mean_loss(model, rows, demo.dtype), 700.0))


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
