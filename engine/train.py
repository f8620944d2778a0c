"""Fine-tuning: one optimizer step (`Trainer`), and the run around it (`finetune`)."""

from __future__ import annotations

import inspect
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, overload

import torch
from torch import nn

from tilewright import checkpoint, pretrained
from tilewright.config import (
    DTYPES,
    OPTION_NAMES,
    OVER_PACKED,
    RATES,
    TUNED,
    TrainOptions,
    pick_device,
    quant_config,
)
from tilewright.data import (
    IGNORED,
    PackedRows,
    RowOrder,
    TokenizerLike,
    encode,
    pack,
    read_documents,
)
from tilewright.files import InputError
from tilewright.half import HalfPlan
from tilewright.ops import SM3, AdamW
from tilewright.progress import Progress, Silent
from tilewright.quantized import quantize, quantized_layers


class TrainingError(RuntimeError):
    """The run cannot go on; the last checkpoint is good."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped between two steps; its message says how to go on."""


@dataclass(frozen=True)
class Step:
    """What one step measured.

    loss       sum of the tokens' negative log-likelihoods / n_valid, in nats, before the update
    grad_norm  before clipping
    n_tokens   of all micro-batches, the filling included; n_valid of them have a label
    seconds    of wall time
    """

    loss: float
    grad_norm: float
    learning_rate: float
    n_tokens: int
    n_valid: int
    seconds: float


def learning_rate_at(step: int, n_steps: int, options: TrainOptions, peak: float) -> float:
    """The rate of step 0, 1, ..., n_steps - 1: linear rise, then a cosine down to final_rate."""
    warmup = math.ceil(0.05 * n_steps) if options.warmup is None else options.warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    at = (step - warmup) / max(1, n_steps - 1 - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * min(at, 1.0)))
    return peak * (options.final_rate + (1 - options.final_rate) * fall)


class Trainer:
    """A model, its optimizer and its schedule; AdamW over what requires a gradient.

    model      a causal language model of transformers or PEFT, on its device
    options    what is used of them: dtype, clip_norm, AdamW's numbers and the schedule's
    n_steps    length of the schedule
    peak       highest learning rate
    tuner      that `adapt` has made of the model, or None: its optimizer, over what it trains
    """

    def __init__(
        self, model: nn.Module, options: TrainOptions, n_steps: int, peak: float, tuner: Any = None
    ):
        self.model, self.options, self.n_steps, self.peak = model, options, n_steps, peak
        self.device, self.tuner = next(model.parameters()).device, tuner
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.parameters = trained
        self.optimizer = self._optimizer([g for g in groups if g["params"]])
        # the sum over micro-batches is right only if forward divides by the count that it is given
        base = pretrained.base_of(model)
        parameters = inspect.signature(base.forward).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD or p.name == "num_items_in_batch" for p in parameters):
            raise InputError(f"model {type(base).__name__} does not take num_items_in_batch")

    def _optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        betas = (self.options.beta1, self.options.beta2)
        if self.options.stock:
            return torch.optim.AdamW(groups, lr=self.peak, betas=betas, fused=True)
        limit = self.options.clip_norm or math.inf
        if getattr(self.tuner, "name", None) == "sparse":
            decay = self.options.weight_decay
            of_adam = {} if self.tuner.method.rule == "extremes" else {"betas": betas}
            return self.tuner.optimizer(
                lr=self.peak, weight_decay=decay, clip_norm=limit, **of_adam
            )
        only = None if self.tuner is None else self.tuner.only()
        return AdamW(
            groups, lr=self.peak, betas=betas, clip_norm=limit, only=only,
            state_bits=self.options.state_bits,
        )  # fmt: skip

    def _update(self) -> float:
        """One step of the optimizer, unless the gradient is not finite; returns its norm."""
        if isinstance(self.optimizer, (AdamW, SM3)):
            self.optimizer.step()
            assert self.optimizer.last_norm is not None
            return float(self.optimizer.last_norm)
        limit = self.options.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    @overload
    def step(self, step: int, micro_batches: Sequence[dict]) -> Step: ...
    @overload
    def step(
        self, step: int, micro_batches: Sequence[dict], is_stopped: Callable[[], bool]
    ) -> Step | None: ...
    def step(
        self, step: int, micro_batches: Sequence[dict], is_stopped=lambda: False
    ) -> Step | None:
        """One update from all micro-batches, as if they were one batch.

        step           0, 1, ..., the place in the schedule
        micro_batches  from `PackedRows.batch`
        is_stopped     asked between micro-batches; if true nothing is updated, and None returned

        TrainingError: the loss or its gradient is not finite; nothing is updated.
        """
        start_s = time.perf_counter()
        self.model.train()
        n_valid = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in micro_batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches:
            if is_stopped():
                self.optimizer.zero_grad()
                return None
            with autocast(self.device, self.options.dtype):
                loss = self.model(
                    **batch, use_cache=False, num_items_in_batch=max(n_valid, 1)
                ).loss  # fmt: skip
            loss.backward()
            total += loss.detach().double().cpu()

        rate = learning_rate_at(step, self.n_steps, self.options, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        grad_norm = self._update() if math.isfinite(total) else math.nan
        self.optimizer.zero_grad()
        if self.tuner is not None and math.isfinite(grad_norm):
            self.tuner.after_step(self.optimizer)
        if not math.isfinite(grad_norm):
            what = "loss" if not math.isfinite(total) else "gradient"
            raise TrainingError(f"{what} is not finite at step {step + 1}")
        n_tokens = sum(b["input_ids"].numel() for b in micro_batches)
        return Step(float(total), grad_norm, rate, n_tokens, n_valid, time.perf_counter() - start_s)


def autocast(device: torch.device, dtype: str):
    """bfloat16 matrix products over float32 weights, or nothing."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype == "bfloat16")


@torch.no_grad()
def mean_loss(model: nn.Module, rows: PackedRows, dtype: str = "float32") -> float:
    """Mean negative log-likelihood of the rows' labels in nats, the model in evaluation mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, n_valid = 0.0, rows.n_valid
    for n in range(len(rows)):
        with autocast(device, dtype):
            batch = rows.batch([n], device)
            total += float(model(**batch, use_cache=False, num_items_in_batch=n_valid).loss)
    model.train(was_training)
    return total


def add_lora(model: nn.Module, options: TrainOptions):
    """Wrap the model by PEFT; `train` goes into its modules_to_save, so that the files hold it."""
    peft = pretrained.import_peft()
    targets: str | list[str] = list(options.lora_targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        names = [n for n, m in model.named_modules() if _is_linear(m)]
        for target in targets:
            if not any(n == target or n.endswith("." + target) for n in names):
                known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names}))
                raise InputError(
                    f"lora_targets: {target!r} matches no linear layer of the model; it has {known}"
                )
    whole = _modules_named(model, options.train) if options.train else None
    # a head that shares the embedding's weight goes on sharing it
    is_tied = bool(whole) and getattr(model.config, "tie_word_embeddings", False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        modules_to_save=whole,
        ensure_weight_tying=is_tied,
    )
    with pretrained.quiet_transformers():
        return peft.get_peft_model(model, config)


def _is_linear(module: nn.Module) -> bool:
    # GPT-2 keeps its matrices in transformers' own Conv1D
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _modules_named(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Last names of the modules with own parameters whose name contains one of the parts."""
    found = set()
    for part in parts:
        names = {
            last for name, module in model.named_modules()
            if part in (last := name.rsplit(".", 1)[-1])
            and next(module.parameters(recurse=False), None) is not None
        }  # fmt: skip
        if not names:
            raise InputError(f"train: {part!r} matches no parameter of the model")
        found |= names
    return sorted(found)


def choose_parameters(model: nn.Module, options: TrainOptions) -> nn.Module:
    """Decide what is trained: LoRA, the parameters named by `train`, or everything."""
    if options.lora_rank:
        return add_lora(model, options)
    if options.train:
        modules = _modules_named(model, options.train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in modules)
    return model


def accelerate(model: nn.Module, options: TrainOptions) -> object | None:
    """Put tilewright's operators into the model, unless `stock`; returns the report."""
    if options.stock:
        return None
    from tilewright import adapt

    if options.attention == "shifted":
        group_size = options.group_size or max(1, options.context // 4)
        return adapt.accelerate(model, attention="shifted", group_size=group_size)
    return adapt.accelerate(model)


class _StopRequest:
    """Ctrl-C and SIGTERM ask to stop after the micro-batch; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.is_set = False
        self.previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@dataclass
class FinetuneResult:
    """What `finetune` returns.

    model      trained, in evaluation mode, with stock operators; a PeftModel where the method is
               one of PEFT's
    losses     of every step, in nats a token
    n_tokens   tokens that a loss was taken from, all steps together
    report     what `accelerate` replaced; None with stock
    tuner      of an adapter that `tilewright.adapt` has made: it merges, saves, removes
    """

    model: nn.Module
    tokenizer: TokenizerLike | None
    losses: list[float]
    n_tokens: int
    out: Path | None = None
    report: object = field(default=None, repr=False)
    tuner: Any = field(default=None, repr=False)


def finetune(
    model: nn.Module | str | os.PathLike,
    data: str | os.PathLike | Sequence,
    *,
    out: str | os.PathLike | None = None,
    tokenizer: TokenizerLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | Progress = False,
    trust_remote_code: bool = False,
    **options,
) -> FinetuneResult:
    """Train a causal language model on text, all of it or an adapter, by tilewright's operators.

    model              a folder, a config.json or a preset (see `tilewright.pretrained.load`), or
                       a transformers model, which is changed in place
    data               a text file, a .jsonl file or a folder (`tilewright.data.read_documents`),
                       a list of strings, or a list of lists of token ids
    out                folder for the log, checkpoints and the model; None writes nothing
    tokenizer          needed if model is an object and data is text
    resume             continue the run in `out` from its newest checkpoint: the same losses and
                       weights, bit for bit on the CPU, as if it had not stopped
    overwrite          replace what an earlier run left in `out`
    progress           True shows a bar or lines on stderr
    trust_remote_code  transformers' own switch
    options            the fields of `tilewright.config.TrainOptions`

    The loss of a step is the sum over all its tokens divided by their number, whatever the
    micro-batches. Documents are packed into rows and do not see each other.
    InputError (a ValueError): something given cannot be used. TrainingError: the loss is not
    finite. WriteError (an OSError): the disk. Interrupted (a KeyboardInterrupt): stopped by Ctrl-C,
    with a checkpoint written.
    """
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise InputError(f"finetune: no option {unknown[0]!r}. Known: {', '.join(OPTION_NAMES)}")
    chosen = TrainOptions(**options)
    device = pick_device(chosen.device)
    folder = None
    if out is not None:
        folder = checkpoint.RunFolder(out, resume=resume, overwrite=overwrite)
    elif resume:
        raise InputError("resume needs out, the folder of the run to continue")
    documents = read_documents(data) if isinstance(data, (str, os.PathLike)) else list(data)
    loaded = _loaded(model, tokenizer, chosen, trust_remote_code)
    if not chosen.trains_beside_packed and quantized_layers(loaded.model):
        raise InputError(
            f"model {loaded.source} is quantized, and packed weights do not train: pass adapter "
            f"'lora' or another of {', '.join(OVER_PACKED[1:])}"
        )
    rows = _rows(documents, loaded, chosen)
    order = RowOrder(len(rows), chosen.rows, chosen.accumulate, chosen.seed)
    n_steps = chosen.steps or order.steps_for(chosen.epochs)
    settings = {
        **chosen.settings(), "model": loaded.source, "data": rows.fingerprint(), "steps": n_steps,
    }  # fmt: skip
    if folder is not None:
        folder.compare(settings)

    torch.manual_seed(chosen.seed)
    tuner: Any = None
    if chosen.adapter in TUNED:
        tuner = _tuned(loaded.model.to(device), chosen, rows, n_steps, folder)
        if folder is not None:
            folder.tuner = tuner
    trained = choose_parameters(loaded.model, chosen) if tuner is None else tuner.model
    plan = None
    if chosen.adapter == "half":
        plan = HalfPlan(trained, chosen.half_level, chosen.half_ratio, chosen.seed)
        plan.begin(chosen.half_round)
    if tuner is not None:
        pass  # made with the values of the checkpoint
    elif folder is not None and folder.is_finished:
        checkpoint.restore_weights(folder.path, trained)
    elif folder is not None and folder.start is not None:
        checkpoint.restore_weights(folder.start, trained)
    trained.to(device)
    if chosen.recompute:
        pretrained.method_of(trained, "gradient_checkpointing_enable")({"use_reentrant": False})
    report = accelerate(trained, chosen)
    peak = chosen.learning_rate or _usual_rate(chosen, loaded.is_new)
    trainer = Trainer(trained, chosen, n_steps, peak, tuner)
    if folder is not None:
        folder.begin(settings)
    bar = progress if isinstance(progress, Progress) else (
        Progress(n_steps, "finetune") if progress else Silent()
    )  # fmt: skip
    try:
        records = _run(trainer, rows, order, folder, loaded.tokenizer, bar)
    finally:
        bar.close()
        if plan is not None:
            plan.end()
        if report is not None:
            from tilewright import adapt

            adapt.restore(trained)
    trained.eval()
    losses, n_tokens = [r["loss"] for r in records], sum(r["valid_tokens"] for r in records)
    if folder is not None and not folder.is_finished:
        summary = {"final_loss": losses[-1], "trained_tokens": n_tokens, "rows": len(rows)}
        folder.finish(trained, loaded.tokenizer, settings, summary)
    return FinetuneResult(
        trained, loaded.tokenizer, losses, n_tokens, None if out is None else Path(out), report,
        tuner,
    )  # fmt: skip


def _tuned(model, chosen: TrainOptions, rows, n_steps: int, folder: checkpoint.RunFolder | None):
    from tilewright import tuned

    if folder is not None and folder.is_resumed:
        start = folder.path if folder.is_finished or folder.start is None else folder.start
        return tuned.resume(model, start)
    return tuned.begin(model, chosen, rows, n_steps)


def _loaded(model, tokenizer, chosen: TrainOptions, trust_remote_code: bool) -> pretrained.Loaded:
    if isinstance(model, nn.Module):
        if chosen.rope_target_length:
            pretrained.stretch_rope(model, chosen.rope_target_length)
        kind = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters"
        if chosen.base and quantized_layers(model):
            raise InputError("base: the model is quantized already; leave it out")
        if chosen.base:
            quantize(model, quant_config(chosen.base).record)
        return pretrained.Loaded(model, tokenizer, kind, is_new=False)
    if pretrained.is_adapter(Path(model)):
        raise InputError(f"model {model} is an adapter, need the model that it belongs to")
    loaded = pretrained.load(
        model, seed=chosen.seed, rope_target_length=chosen.rope_target_length,
        trust_remote_code=trust_remote_code,
        quantization=quant_config(chosen.base) if chosen.base else None,
    )  # fmt: skip
    if tokenizer is not None:
        loaded.tokenizer = tokenizer
    return loaded


def _rows(documents: list, loaded: pretrained.Loaded, chosen: TrainOptions) -> PackedRows:
    """The documents, packed into rows that fit the model."""
    if not documents:
        raise InputError("data is empty, need at least one document")
    config = pretrained.config_of(loaded.model)
    limit = getattr(config, "max_position_embeddings", None)
    more = chosen.prefix_tokens if chosen.adapter == "prefix" else 0
    if limit is not None and chosen.context + more > limit:
        beside = f" with {more} of the prefix" if more else ""
        raise InputError(
            f"context is {chosen.context}{beside}, but the model reaches {limit} positions; "
            f"lower context, or pass rope_target_length {chosen.context + more}"
        )
    pad = getattr(loaded.tokenizer, "pad_token_id", None)
    if isinstance(documents[0], str):
        if loaded.tokenizer is None:
            raise InputError("data is text and model an object: pass its tokenizer")
        documents = encode(loaded.tokenizer, documents)
    # behind a prefix documents in one row would see each other
    rows = pack(documents, chosen.context, pad or 0, apart=chosen.adapter == "prefix")
    vocab_size = config.get_text_config().vocab_size
    largest, smallest = int(rows.input_ids.max()), int(rows.input_ids.min())
    if largest >= vocab_size or smallest < 0:
        bad = largest if largest >= vocab_size else smallest
        raise InputError(f"data holds token {bad}, need 0 to {vocab_size - 1} as in the model")
    if rows.n_valid == 0:
        raise InputError("data is too short: no token has a predecessor in its document")
    return rows


def _usual_rate(chosen: TrainOptions, is_new: bool) -> float:
    if chosen.lora_rank:
        return 2e-4
    if chosen.adapter in RATES:
        return 1e-2 if chosen.sparse_rule == "extremes" else RATES[chosen.adapter]
    return 1e-3 if is_new else 2e-5


def _run(
    trainer: Trainer, rows: PackedRows, order: RowOrder, folder: checkpoint.RunFolder | None,
    tokenizer, progress: Progress,
) -> list[dict]:  # fmt: skip
    """All steps from the checkpoint on; returns the log's records of the whole run."""
    first, records, model = 0, [], trainer.model
    if folder is not None:
        first = trainer.n_steps if folder.is_finished else folder.start_step()
        records = folder.logged(first)
        if folder.start is not None and not folder.is_finished:
            state = folder.restore_optimizer(model, trainer.optimizer)
            checkpoint.restore_rng(state, trainer.device)
    with _StopRequest() as stop:
        for step in range(first, trainer.n_steps):
            rng = checkpoint.rng_state(trainer.device)
            batches = [rows.batch(r, trainer.device) for r in order.micro_batches(step)]
            try:
                done = trainer.step(step, batches, lambda: stop.is_set)
            except TrainingError as error:
                raise TrainingError(f"{error}; {_advice(folder, trainer)}") from None
            if done is not None:
                records.append(_record(step + 1, done))
                if folder is not None:
                    folder.log(records[-1])
                speed = done.n_tokens / done.seconds
                progress.show(
                    step + 1,
                    f"loss {done.loss:.4f}  {speed:.0f} tokens/s  rate {done.learning_rate:.2e}",
                )
                step, rng = step + 1, checkpoint.rng_state(trainer.device)
            if stop.is_set and step < trainer.n_steps:
                where = "nothing to resume"
                if folder is not None and step > 0:
                    saved = folder.save(step, model, tokenizer, trainer.optimizer, rng)
                    where = f"checkpoint in {saved}: continue with --resume"
                raise Interrupted(f"stopped after step {step} of {trainer.n_steps}, {where}")
            every = trainer.options.save_every
            if folder is not None and every and step % every == 0 and step < trainer.n_steps:
                folder.save(step, model, tokenizer, trainer.optimizer, rng)
    return records


def _record(step: int, done: Step) -> dict:
    return {
        "step": step, "loss": done.loss, "grad_norm": done.grad_norm,
        "learning_rate": done.learning_rate, "tokens": done.n_tokens, "valid_tokens": done.n_valid,
        "seconds": round(done.seconds, 4),
    }  # fmt: skip


def _advice(folder: checkpoint.RunFolder | None, trainer: Trainer) -> str:
    kept = "no checkpoint was written yet"
    if folder is not None and folder.checkpoints():
        kept = f"the last good checkpoint is {folder.checkpoints()[-1]}"
    return f"{kept}; try a learning_rate below {trainer.peak:g} or a smaller clip_norm"
