"""What `finetune` does with the methods of `adapt`, and the folders that it writes for them.

A method that PEFT has is a folder of PEFT's. Of another one the folder holds

adapter.safetensors        what the tuner's `save` writes
tilewright_adapter.json    where the base model is; with it `pretrained.load` finds both
config.json                of the base as it was trained: RoPE stretched, weights packed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright import pretrained
from tilewright.adapt import call, methods
from tilewright.adapt.peft_tuner import PeftTuner
from tilewright.adapt.sparse import SparseDelta, SparseTuner
from tilewright.adapt.tuner import Tuner
from tilewright.config import TrainOptions
from tilewright.data import PackedRows
from tilewright.files import InputError, write_json
from tilewright.pretrained import ADAPTER, RECORD

FISHER_BATCHES = 16
STATE = "tuner."  # begins the names of a tuner's tensors in a checkpoint


def method_of(options: TrainOptions, n_steps: int) -> Any:
    """The method that the options name, for a run of so many steps."""
    rank: dict[str, Any] = {} if options.adapter_rank is None else {"rank": options.adapter_rank}
    targets: dict[str, Any] = (
        {"targets": options.adapter_targets} if options.adapter_targets else {}
    )
    share: dict[str, Any] = {} if options.density is None else {"density": options.density}
    if options.adapter == "dora":
        return methods.DoRA(**rank, **targets)
    if options.adapter == "ia3":
        return methods.IA3(**targets)
    if options.adapter == "prefix":
        return methods.Prefix(options.prefix_tokens, seed=options.seed)
    if options.adapter == "bitfit":
        return methods.BitFit(add=options.add_biases)
    if options.adapter == "mask":
        return methods.Mask(by=options.mask_by, seed=options.seed, **share, **targets)
    if options.adapter == "sparse":
        rule = options.sparse_rule
        last = None if rule == "none" else max(1, 2 * n_steps // 3)
        every = max(1, min(20, n_steps // 5))
        return SparseDelta(
            rule=rule, last_step=last, every=every, window=min(5, every), seed=options.seed,
            **share, **targets,
        )  # fmt: skip
    kind = methods.Parallel if options.adapter == "parallel" else methods.Sequential
    scale: dict[str, Any] = (
        {} if options.adapter_scale is None else {"scale": options.adapter_scale}
    )
    at: dict[str, Any] = {"at": options.adapter_at} if options.adapter_at else {}
    return kind(
        activation=options.adapter_activation, seed=options.seed, **rank, **scale, **at, **targets
    )


def begin(model: nn.Module, options: TrainOptions, rows: PackedRows, n_steps: int) -> Any:
    """The tuner of a new run. InputError: the model and the options do not go together."""
    batches = None
    if options.adapter == "mask" and options.mask_by == "fisher":
        device = next(model.parameters()).device
        batches = [rows.batch([n], device) for n in range(min(FISHER_BATCHES, len(rows)))]
    try:
        return call.adapt(model, method_of(options, n_steps), batches=batches)
    except ValueError as error:
        raise InputError(f"adapter {options.adapter!r}: {error}") from error


def resume(model: nn.Module, folder: Path) -> Any:
    """The tuner that a checkpoint or a finished run has written, on its base model."""
    is_peft = (folder / "adapter_config.json").exists()
    return call.load_adapted(model, folder if is_peft else folder / ADAPTER)


def write_folder(tuner: Tuner, tokenizer, folder: Path) -> None:
    if isinstance(tuner, PeftTuner):
        pretrained.write_folder(tuner.model, tokenizer, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tuner.save(folder / ADAPTER)
    config = pretrained.config_of(tuner.model)
    write_json(folder / RECORD, {"base_model_name_or_path": config.name_or_path or None})
    with pretrained.quiet_transformers():
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def state_of(tuner: Tuner) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Where a tuner stands beside its values: tensors by name, and plain JSON values."""
    if not isinstance(tuner, SparseTuner):
        return {}, {}
    state, tensors = tuner.state_dict(), {}
    for layer, watch in state["watched"].items():
        named = {f"{STATE}{part}.{layer}": t for part, t in watch["tensors"].items()}
        tensors.update(named)
    steps = {layer: watch["steps"] for layer, watch in state["watched"].items()}
    plain = {"steps_done": tuner.steps_done, "exchanges": tuner.exchanges, "watched": steps}
    return tensors, plain


def restore_state(tuner: Tuner, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """Go on from there; takes its tensors out of those of the checkpoint."""
    if not isinstance(tuner, SparseTuner):
        return
    watched: dict[str, Any] = {
        layer: {"steps": steps, "tensors": {}} for layer, steps in plain["watched"].items()
    }
    device = next(tuner.model.parameters()).device
    for name in [name for name in tensors if name.startswith(STATE)]:
        part, _, layer = name.removeprefix(STATE).partition(".")
        watched[layer]["tensors"][part] = tensors.pop(name).to(device)
    tuner.load_state_dict({**plain, "watched": watched})
