"""The phases of the demo: functions of what they share that return results as plain data.

PHASES lists them in the order in which they run; a further one needs an entry there, a share of the
time in demo_clock.py, and its lines in demo_report.py.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch

from tilewright import adapt, pretrained
from tilewright.config import TrainOptions
from tilewright.data import IGNORED, PackedRows, RowOrder
from tilewright.demo_quantize import quantize_phase
from tilewright.demo_shared import (
    EXTENDED,
    PRETRAINED,
    Demo,
    first_rows,
    median_ms,
    new_model,
    new_trainer,
    peak_bytes_of,
    prompts_of,
    rows_of,
    side_by_side,
    step_plan,
)
from tilewright.files import InputError
from tilewright.generate import generate
from tilewright.train import add_lora, autocast, mean_loss

EVALUATION_BINS = 16  # equal parts of a row, each with a mean loss of its own


def _measure(demo: Demo) -> dict:
    """Time and peak memory of a step, on models that are thrown away."""
    rows = rows_of(demo, demo.train_documents, demo.sizes.context)
    batch = [rows.batch(range(demo.sizes.rows))]
    stock = {
        dtype: new_trainer(new_model(demo), demo, dtype, 100, 1e-3)
        for dtype in ("float32", "bfloat16")
    }
    stock_ms = median_ms(stock, batch, demo, "measure")
    # both sides take the dtype in which stock is faster on this machine
    dtype = min(stock_ms, key=stock_ms.__getitem__)
    models = {"stock": new_model(demo), "tilewright": new_model(demo)}
    report = adapt.accelerate(models["tilewright"])
    trainers = {side: new_trainer(m, demo, dtype, 100, 1e-3) for side, m in models.items()}
    step_ms = median_ms(trainers, batch, demo, "measure")
    return {
        "dtype": dtype, "stock_step_ms": stock_ms, "step_ms": step_ms,
        "peak_bytes": peak_bytes_of(trainers, batch),
        "gradient_error": _gradient_errors(demo, dtype, batch[0]),
        "replaced": str(report).splitlines(),
    }  # fmt: skip


def _gradient_errors(demo: Demo, dtype: str, batch: dict) -> dict[str, float]:
    """|g - g64| / |g64| over all parameters of the first batch, g64 by stock in float64.

    Losses of two long runs drift apart by rounding alone; this is what one step differs by.
    """
    exact = _gradient(new_model(demo).double(), "float32", batch)
    errors = {}
    for side in ("stock", "tilewright"):
        model = new_model(demo)
        if side == "tilewright":
            adapt.accelerate(model)
        errors[side] = float((_gradient(model, dtype, batch) - exact).norm() / exact.norm())
    return errors


def _gradient(model, dtype: str, batch: dict) -> torch.Tensor:
    model.train()
    with autocast(torch.device("cpu"), dtype):
        model(**batch, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def _train(demo: Demo) -> dict:
    """Train from scratch twice, from the same weights and on the same batches."""
    s, before = demo.sizes, demo.results["measure"]
    rows = rows_of(demo, demo.train_documents, s.context)
    held_out = first_rows(rows_of(demo, demo.held_out_documents, s.context), s.held_out_rows)
    both_s = sum(before["step_ms"].values()) / 1e3
    # without a backward, a row takes a third of its time in a step
    evaluation_s = both_s * len(held_out) / (3 * s.rows)
    plan = step_plan(demo, "train", both_s, evaluation_s)
    order = RowOrder(len(rows), s.rows, 1, demo.seed)
    models = {"stock": new_model(demo), "tilewright": new_model(demo)}
    adapt.accelerate(models["tilewright"])
    trainers = {
        side: new_trainer(m, demo, demo.dtype, plan.n_steps, s.learning_rate)
        for side, m in models.items()
    }
    run = side_by_side(trainers, rows, order, plan, "train")

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
    return rows_of(demo, [piece for *_, piece in pieces], length)


def _extend(demo: Demo) -> dict:
    """Tune the trained model for a longer context twice, and compare perplexities there."""
    s, length = demo.sizes, demo.long_context
    rows = _long_rows(demo, demo.train_documents)
    held_out = _long_rows(demo, demo.held_out_documents)
    plain = pretrained.load(demo.out / PRETRAINED, needs_weights=True).model
    start_s = time.perf_counter()
    _quality(plain, first_rows(held_out, 1), demo)
    row_s = time.perf_counter() - start_s
    n_rows = s.long_held_out_rows
    if demo.steps is None:  # the four evaluations may take a quarter of what is left
        n_rows = min(n_rows, max(2, int(demo.clock.left_s("extend") / (4 * 4 * row_s))))
    held_out = first_rows(held_out, n_rows)
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
    probes = {
        side: new_trainer(m, demo, demo.dtype, 100, s.lora_rate) for side, m in models.items()
    }
    probe_ms = median_ms(probes, batch, demo, "extend")
    peaks = peak_bytes_of(probes, batch)
    for side, model in models.items():
        model.load_state_dict(saved[side])
    del probes, saved, models["tilewright_full"]

    both_s = (probe_ms["stock"] + probe_ms["tilewright"]) / 1e3
    plan = step_plan(demo, "extend", both_s, 2 * n_rows * row_s)
    trainers = {
        side: new_trainer(model, demo, demo.dtype, plan.n_steps, s.lora_rate)
        for side, model in models.items()
    }
    order = RowOrder(len(rows), 1, 1, demo.seed)
    run = side_by_side(trainers, rows, order, plan, "extend")
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
    prompts = prompts_of(demo)
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
    "quantize": ("to 4 and 8 bits, and LoRA over 4 bits, stock and ours in turn", quantize_phase),
}
