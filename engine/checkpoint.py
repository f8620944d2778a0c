"""The folder of a training run: settings, log, checkpoints to resume from, and the finished model.

OUT/run.json            settings, and when the run is finished its summary
OUT/log.jsonl           one line a step
OUT/checkpoint-000100/  a model folder that also loads by itself (weights or adapter, config,
                        tokenizer), optimizer.safetensors, and state.json, which is written last
OUT/*                   the finished model, a plain transformers or PEFT folder
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright import pretrained
from tilewright.files import (
    InputError,
    WriteError,
    read_json,
    read_tensors,
    replacing,
    replacing_files,
    write_json,
    write_tensors,
    write_text,
)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")  # and what 8-bit states have besides


class RunFolder:
    """The output folder of one run.

    path       the folder; it must be empty or absent, unless one of the two is True:
    resume     continue from the newest checkpoint in it
    overwrite  remove an earlier run's log and checkpoints from it, and replace its model at the end
    """

    def __init__(self, path: str | os.PathLike, *, resume: bool = False, overwrite: bool = False):
        self.path = Path(path)
        if resume and overwrite:
            raise InputError("resume and overwrite exclude each other: pass one of them")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out {self.path} is a file, need a folder")
        is_empty = not self.path.exists() or not any(self.path.iterdir())
        if not is_empty and not resume and not overwrite:
            raise InputError(
                f"out {self.path} is not empty; pass --resume to continue the run in it, "
                "--overwrite to replace it, or name another folder"
            )
        self.overwrite = overwrite
        self.is_finished = False
        self.start: Path | None = None  # the checkpoint to continue from
        self.tuner: Any = None  # of a method of `adapt`, which is then what is saved
        if resume:
            self._find_start()

    def _find_start(self) -> None:
        run = self.path / "run.json"
        self.is_finished = run.exists() and read_json(run).get("finished") is True
        checkpoints = self.checkpoints()
        if not checkpoints and not self.is_finished:
            raise InputError(f"out {self.path} holds no checkpoint to resume; leave out --resume")
        self.start = checkpoints[-1] if checkpoints else None

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(p.parent for p in self.path.glob("checkpoint-*/state.json"))

    @property
    def is_resumed(self) -> bool:
        return self.start is not None or self.is_finished

    def compare(self, settings: dict) -> None:
        """InputError: the run that is resumed was started with different settings."""
        if not self.is_resumed:
            return
        before = read_json(self.path / "run.json").get("settings", {})
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"resume: {name} was {before.get(name)!r} when the run in {self.path} "
                    f"started and is {settings.get(name)!r} now; pass the same settings, or "
                    "--overwrite to start anew"
                )

    def begin(self, settings: dict) -> None:
        """Make the folder of a new run; nothing is written before."""
        if self.is_resumed:
            return
        run = self.path / "run.json"
        if self.overwrite:
            for checkpoint in self.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            (self.path / "log.jsonl").unlink(missing_ok=True)
        write_json(run, {"settings": settings, "finished": False})

    def start_step(self) -> int:
        """Steps done when the run continues; 0 for a new one."""
        return 0 if self.start is None else int(read_json(self.start / "state.json")["step"])

    def logged(self, steps: int) -> list[dict]:
        """The log's records of the first `steps` steps; later ones are removed from the file."""
        path = self.path / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line of a run that was cut off
            if record["step"] > steps:
                break
            records.append(record)
        if len(records) < len(lines):
            write_text(path, "".join(json.dumps(r) + "\n" for r in records))
        return records

    def log(self, record: dict) -> None:
        path = self.path / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise WriteError(path, error) from error

    def save(
        self, step: int, model: nn.Module, tokenizer, optimizer: torch.optim.Optimizer,
        rng: dict[str, torch.Tensor],
    ) -> Path:  # fmt: skip
        """Write the checkpoint of `step` done steps, then remove the older ones."""
        target = self.path / f"checkpoint-{step:06d}"
        if target not in self.checkpoints():
            shutil.rmtree(target, ignore_errors=True)
            with replacing(target) as beside:
                self._write(model, tokenizer, beside)
                state = optimizer_tensors(model, optimizer)
                more, plain = self._state_of_tuner()
                write_tensors(beside / "optimizer.safetensors", state | more | rng)
                write_json(beside / "state.json", {"step": step, **plain})
        for old in self.checkpoints():
            if old != target:
                shutil.rmtree(old)
        return target

    def finish(self, model: nn.Module, tokenizer, settings: dict, summary: dict) -> None:
        """Write the model; when it is in place, the summary; then remove the checkpoints."""
        with replacing_files(self.path, last="config.json") as beside:
            self._write(model, tokenizer, beside)
        write_json(
            self.path / "run.json", {"settings": settings, "finished": True, "summary": summary}
        )
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)

    def _write(self, model: nn.Module, tokenizer, folder: Path) -> None:
        if self.tuner is None:
            pretrained.write_folder(model, tokenizer, folder)
            return
        from tilewright import tuned

        tuned.write_folder(self.tuner, tokenizer, folder)

    def _state_of_tuner(self) -> tuple[dict[str, torch.Tensor], dict]:
        if self.tuner is None:
            return {}, {}
        from tilewright import tuned

        tensors, plain = tuned.state_of(self.tuner)
        return tensors, {"tuner": plain}

    def restore_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, torch.Tensor]:
        """Give the optimizer, and a tuner, their state of the checkpoint back; returns the other
        tensors of it, the generators' states."""
        assert self.start is not None
        if self.tuner is None:
            return restore_optimizer(self.start, model, optimizer)
        from tilewright import tuned

        tensors = read_tensors(self.start / "optimizer.safetensors")
        plain = read_json(self.start / "state.json").get("tuner", {})
        tuned.restore_state(self.tuner, tensors, plain)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            for key in [key for key in tensors if key.partition(".")[2] == name]:
                value = tensors.pop(key).to(parameter.device)
                optimizer.state[parameter][key.partition(".")[0]] = value
        return tensors


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named after the parameters."""
    return {
        f"{moment}.{name}": state
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment, state in optimizer.state[parameter].items()
        if isinstance(state, torch.Tensor)
    }


def _moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return (*MOMENTS, *SCALES) if getattr(optimizer, "state_bits", 32) == 8 else MOMENTS


def restore_optimizer(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Give AdamW its state back; returns the other tensors of the file, the generators' states."""
    path = checkpoint / "optimizer.safetensors"
    tensors = read_tensors(path)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for moment in _moments(optimizer):
            tensor = tensors.pop(f"{moment}.{name}", None)
            if tensor is None:
                raise InputError(f"resume: {path} has no {moment} of {name}; start anew")
            # `step` stays on the CPU unless the fused kernel runs on a GPU
            optimizer.state[parameter][moment] = tensor.to(parameter.device)
    return tensors


def restore_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's weights into a model of the same kind that has stock modules."""
    if hasattr(model, "peft_config"):
        peft = pretrained.import_peft()
        tensors = read_tensors(checkpoint / "adapter_model.safetensors")
        result = peft.set_peft_model_state_dict(model, tensors)
        if result.unexpected_keys:
            extra = result.unexpected_keys[0]
            raise InputError(f"resume: {checkpoint} has {extra}, which the model lacks")
        return
    for shard in sorted(checkpoint.glob("model*.safetensors")):
        pretrained.check_safetensors(shard)
    with pretrained.quiet_transformers():
        from_pretrained = pretrained.method_of(type(model), "from_pretrained")
        saved = from_pretrained(checkpoint, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        for (name, to), (_, value) in zip(
            model.named_parameters(), saved.named_parameters(), strict=True
        ):
            if to.shape != value.shape:
                raise InputError(f"resume: {name} in {checkpoint} has shape {tuple(value.shape)}")
            to.copy_(value)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that dropout draws from."""
    state = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
