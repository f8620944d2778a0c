"""The demo's phase "quantize": the tuned model in few bits, and LoRA over four of them (QLoRA)."""

from __future__ import annotations

import copy
import statistics
import time

import torch

from tilewright import adapt, pretrained
from tilewright.config import TrainOptions
from tilewright.data import PackedRows, RowOrder
from tilewright.demo_shared import (
    EXTENDED,
    Demo,
    first_rows,
    median_ms,
    new_trainer,
    peak_bytes_of,
    prompts_of,
    rows_of,
    side_by_side,
    step_plan,
)
from tilewright.generate import generate
from tilewright.quality import Quality, compare_models
from tilewright.quantized import FORMATS, dequantize, n_bytes, quantize, quantized_layers
from tilewright.train import add_lora, mean_loss

DENSE = "dense"
PACKED = ("nf4", "int4", "int8")  # of FORMATS, with their own defaults
BASE = "nf4"  # what LoRA is trained over


def quantize_phase(demo: Demo) -> dict:
    """Pack the tuned model in each format, compare, generate, and train LoRA over one of them."""
    from transformers import LlamaForCausalLM

    s = demo.sizes
    dense = pretrained.load(demo.out / EXTENDED, needs_weights=True).model.eval()
    assert isinstance(dense, LlamaForCausalLM)  # an earlier phase wrote it
    dense.generation_config.eos_token_id = None  # each generates the same number of tokens
    models = {DENSE: dense}
    for name in PACKED:
        models[name] = copy.deepcopy(dense)
        quantize(models[name], FORMATS[name]())
    bits = {name: _bits_per_weight(models[name]) for name in PACKED}
    for model in models.values():
        adapt.accelerate(model)

    held_out = first_rows(rows_of(demo, demo.held_out_documents, s.context), s.held_out_rows)
    start_s = time.perf_counter()
    compare_models(dense, models[BASE], first_rows(held_out, 1))
    row_s = time.perf_counter() - start_s
    if demo.steps is None:  # the comparisons may take a quarter of what is left
        fit = demo.clock.left_s("quantize") / (4 * len(PACKED) * row_s)
        held_out = first_rows(held_out, max(2, int(fit)))
    found = {name: compare_models(dense, models[name], held_out) for name in PACKED}
    tokens_per_s = _tokens_per_s(models, demo)
    adapt.restore(dense)
    formats = {
        name: {**_compared(quality), "bits_per_weight": bits[name]}
        for name, quality in found.items()
    }  # fmt: skip
    formats[DENSE] = {
        "bits_per_weight": 8.0 * next(dense.parameters()).itemsize,
        "perplexity": found[BASE].perplexity_before,
    }  # fmt: skip
    for name, model in models.items():
        formats[name] |= {"bytes": n_bytes(model), "tokens_per_s": tokens_per_s[name]}
    return {
        "packed_weights": _n_packed(models[BASE]),
        "parameters": sum(p.numel() for p in dense.parameters()),
        "compared_tokens": found[BASE].n_tokens, "context": s.context, "dtype": "float32",
        "formats": {name: formats[name] for name in models},
        "qlora": _qlora(demo, dense, held_out, row_s),
    }  # fmt: skip


def _compared(quality: Quality) -> dict:
    return {
        "kl": quality.kl, "kl_largest": quality.kl_largest, "same_top": quality.same_top,
        "perplexity": quality.perplexity_after,
    }  # fmt: skip


def _n_packed(model) -> int:
    return sum(layer.packed.out_features * layer.packed.in_features for layer in _packed(model))


def _packed(model) -> list:
    return [layer for _, layer in quantized_layers(model)]


def _bits_per_weight(model) -> float:
    """Of the packed layers, scales and padding included."""
    return 8 * sum(layer.packed.nbytes for layer in _packed(model)) / _n_packed(model)


def _tokens_per_s(models: dict, demo: Demo) -> dict[str, float]:
    """Greedy generation by each model in turn; the first round warms up and does not count."""
    prompts, s = prompts_of(demo), demo.sizes
    taken: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(1 + s.repeats):
        if repeat > 1 and demo.clock.left_s("quantize") < 0:
            break
        for name, model in models.items():
            start_s = time.perf_counter()
            generate(model, prompts, max_new_tokens=s.new_tokens)
            if repeat:
                taken[name].append(time.perf_counter() - start_s)
    n_tokens = len(prompts) * s.new_tokens
    return {name: n_tokens / statistics.median(times) for name, times in taken.items()}


def _qlora(demo: Demo, dense, held_out: PackedRows, row_s: float) -> dict:
    """LoRA by our operators over packed weights, and by PEFT's own path over what they decode to.

    row_s   seconds in which two models read a held-out row
    """
    s = demo.sizes
    rows = rows_of(demo, demo.train_documents, s.context)
    probes = _trainers(demo, _qlora_models(demo, dense), 100)
    batch = [rows.batch(range(s.rows))]
    probe_ms = median_ms(probes, batch, demo, "quantize")
    peaks = peak_bytes_of(probes, batch)
    del probes

    models = _qlora_models(demo, dense)
    base_loss = mean_loss(models["tilewright"], held_out, demo.dtype)  # B is zero: the base's own
    both_s = sum(probe_ms.values()) / 1e3
    plan = step_plan(demo, "quantize", both_s, len(held_out) * row_s)
    trainers = _trainers(demo, models, plan.n_steps)
    order = RowOrder(len(rows), s.rows, 1, demo.seed + 1)
    run = side_by_side(trainers, rows, order, plan, "qlora")
    losses = run["losses"]
    gaps = [abs(a - b) for a, b in zip(losses["stock"], losses["tilewright"], strict=True)]
    n_tokens = s.rows * rows.input_ids.shape[1]
    return {
        **run, "base": BASE, "rank": s.lora_rank, "context": s.context, "dtype": demo.dtype,
        "probe_step_ms": probe_ms, "peak_bytes": peaks,
        "tokens_per_s": {
            side: 1e3 * n_tokens / statistics.median(step_ms)
            for side, step_ms in run["step_ms"].items()
        },
        "first_loss_gap": gaps[0], "median_loss_gap": statistics.median(gaps),
        "largest_loss_gap": max(gaps), "held_out_loss_of_base": base_loss,
        "held_out_loss": {
            side: mean_loss(model, held_out, demo.dtype) for side, model in models.items()
        },
    }  # fmt: skip


def _qlora_models(demo: Demo, dense) -> dict:
    """The same base and adapter for both sides: decoded for PEFT, packed for ours."""
    packed = copy.deepcopy(dense)
    quantize(packed, FORMATS[BASE]())
    decoded = copy.deepcopy(packed)
    dequantize(decoded)
    options = TrainOptions(lora_rank=demo.sizes.lora_rank, context=demo.sizes.context)
    models = {}
    for side, model in (("stock", decoded), ("tilewright", packed)):
        torch.manual_seed(demo.seed)
        models[side] = add_lora(model, options)
    adapt.accelerate(models["tilewright"])
    return models


def _trainers(demo: Demo, models: dict, n_steps: int) -> dict:
    return {
        side: new_trainer(model, demo, demo.dtype, n_steps, demo.sizes.lora_rate)
        for side, model in models.items()
    }
