"""Methods that PEFT has: its layers and files, and what a tuner can be asked for besides."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright import files, pretrained
from tilewright.adapt.methods import IA3, DoRA, LoRA, Prefix
from tilewright.adapt.sparse import choose_linear
from tilewright.adapt.tuner import Tuner
from tilewright.files import InputError
from tilewright.quantized import QuantizedLinear, replace_module

CONFIG = "adapter_config.json"
TASKS = {"CausalLM": "CAUSAL_LM", "ConditionalGeneration": "SEQ_2_SEQ_LM"}  # a class's last words


class PeftTuner(Tuner):
    """A model in one of PEFT's: `model` is the PeftModel, which is what trains and is saved."""

    def __init__(self, model: nn.Module, method: Any, wrapped: nn.Module | None = None):
        flags = [(p, p.requires_grad) for p in model.parameters()]
        self.base = model
        super().__init__(_wrapped(model, method) if wrapped is None else wrapped, method)
        self._flags = flags
        self._trained = super().parameters()
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def parameters(self) -> list[nn.Parameter]:
        return self._trained

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {n: m for n, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}

    def _why_not_merged(self) -> str:
        return "adds keys and values to the attention, which no weight says"

    @torch.no_grad()
    def merge(self) -> None:
        if isinstance(self.method, Prefix):
            super().merge()
        if self._kept:
            return
        layers = self._layers()
        for name, layer in layers.items():
            base = layer.get_base_layer()
            if isinstance(base, QuantizedLinear):
                raise ValueError(
                    f"merge: {name} is packed ({base.format}), need a dense weight; "
                    "tilewright.merge merges LoRA into packed weights"
                )
        for name, layer in layers.items():
            base = layer.get_base_layer()
            bias = None if base.bias is None else base.bias.detach().clone()
            self._kept[name] = base.weight.detach().clone(), bias
            layer.merge(safe_merge=True)

    @torch.no_grad()
    def unmerge(self) -> None:
        layers = self._layers()
        for name, (weight, bias) in self._kept.items():
            base = layers[name].get_base_layer()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not exact, which the copies make up
                layers[name].unmerge()
            base.weight.copy_(weight)
            if bias is not None:
                base.bias.copy_(bias)
        self._kept = {}

    def remove(self) -> nn.Module:
        self.unmerge()
        for layer in self._layers().values():
            replace_module(self.base, layer, layer.get_base_layer())
        vars(self.base).pop("peft_config", None)
        self.model = self.base
        return super().remove()

    def save(self, path: str | os.PathLike) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors to a folder."""
        with files.replacing_files(Path(path), CONFIG) as beside:
            save_peft(self.model, beside)

    def load(self, path: str | os.PathLike) -> None:
        tensors = files.read_tensors(Path(path) / "adapter_model.safetensors")
        try:
            result = pretrained.import_peft().set_peft_model_state_dict(self.model, tensors)
        except (RuntimeError, ValueError, KeyError) as error:
            what = " ".join(str(error).split())[:300]
            raise InputError(f"load_adapted: {path} does not fit the model: {what}") from error
        expected = ["prompt_embeddings"] if isinstance(self.method, Prefix) else []
        if result.unexpected_keys != expected:  # those of a prefix are no key of the model's
            odd = (result.unexpected_keys or expected)[0]
            raise InputError(f"load_adapted: {path} does not fit the model: {odd}")


def save_peft(model: nn.Module, folder: Path) -> None:
    with pretrained.quiet_transformers():
        pretrained.method_of(model, "save_pretrained")(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _wrapped(model: nn.Module, method: Any) -> nn.Module:
    peft = pretrained.import_peft()
    if hasattr(model, "peft_config"):
        raise ValueError("adapt: the model has an adapter of PEFT already; remove() it first")
    config = _config(peft, model, method)
    try:
        with pretrained.quiet_transformers():
            wrapped = peft.get_peft_model(model, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        vars(model).pop("peft_config", None)
        what = " ".join(str(error).split())
        if isinstance(method, IA3) and method.targets is None:
            what += "; pass targets, and feedforward for those whose input is scaled"
        raise ValueError(
            f"adapt: PEFT refuses {type(method).__name__} for this {type(model).__name__}: {what}"
        ) from error
    if isinstance(method, Prefix):
        generator = torch.Generator().manual_seed(method.seed)
        with torch.no_grad():
            for parameter in wrapped.prompt_encoder.parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * method.std
                parameter.copy_(drawn)
    return wrapped


def _config(peft, model: nn.Module, method: Any):
    task = next((t for end, t in TASKS.items() if type(model).__name__.endswith(end)), None)
    if isinstance(method, Prefix):
        if task is None:
            raise ValueError(
                f"adapt: prefix needs a causal or an encoder-decoder language model, not a "
                f"{type(model).__name__}"
            )
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=method.tokens)
    if isinstance(method, LoRA):
        is_dora = isinstance(method, DoRA)
        targets: str | list[str] = list(method.targets) if method.targets else "all-linear"
        if is_dora and not method.targets:  # for PEFT all includes fused experts, which DoRA cannot
            names = {name.rsplit(".", 1)[-1] for name, _ in choose_linear(model, None)[0]}
            targets = sorted(names)
        return peft.LoraConfig(
            task_type=task, r=method.rank, lora_alpha=method.alpha or 2 * method.rank,
            lora_dropout=method.dropout, use_dora=is_dora, target_modules=targets,
        )  # fmt: skip
    options: dict[str, Any] = {}
    if method.targets is not None:
        options["target_modules"] = list(method.targets)
        options["feedforward_modules"] = list(method.feedforward or ())
    return peft.IA3Config(task_type=task, **options)


def load_peft(model: nn.Module, folder: Path) -> PeftTuner:
    """Put the model into the PeftModel that the folder holds, to be trained on or used."""
    peft = pretrained.import_peft()
    method = _method(folder)
    files.check_safetensors(folder / "adapter_model.safetensors")
    if isinstance(method, Prefix):  # which PEFT loads for use alone
        tuner = PeftTuner(model, method)
        tuner.load(folder)
        return tuner
    try:
        with pretrained.quiet_transformers():
            wrapped = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise InputError(f"load_adapted: {folder} does not fit the model: {what}") from error
    return PeftTuner(model, method, wrapped)


def _method(folder: Path):
    config = files.read_json(folder / CONFIG)
    kind = config.get("peft_type")
    try:
        if kind == "LORA":
            made = DoRA if config.get("use_dora") else LoRA
            targets = config.get("target_modules")
            return made(
                config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0,
                None if isinstance(targets, str) else targets,
            )  # fmt: skip
        if kind == "IA3":
            named = config.get("target_modules"), config.get("feedforward_modules")
            return IA3(*(None if isinstance(names, str) else names for names in named))
        if kind == "PREFIX_TUNING":
            return Prefix(config["num_virtual_tokens"])
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"load_adapted: {folder / CONFIG} cannot be read: {error}") from error
    raise InputError(
        f"load_adapted: {folder} is an adapter of kind {kind}, need LORA, IA3 or PREFIX_TUNING"
    )
