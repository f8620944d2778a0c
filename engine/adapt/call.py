"""`tilewright.adapt`: one call for every method, alone or several together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tilewright import files
from tilewright.adapt import peft_tuner
from tilewright.adapt.bottleneck import AdapterTuner
from tilewright.adapt.dense import DENSE, MaskTuner, mask_of
from tilewright.adapt.methods import PEFT, Mask, Parallel, known, method_of
from tilewright.adapt.peft_tuner import PeftTuner, load_peft
from tilewright.adapt.sparse import SparseDelta, SparseTuner, attach_deltas, attach_new
from tilewright.adapt.tuner import HEADER, Tuner, described
from tilewright.files import InputError
from tilewright.ops import AdamW, load_deltas

DELTAS = "tilewright.deltas"  # in the header of a file of sparse deltas
LIST = "adapters.json"  # in the folder of several methods: their files, in order


def adapt(
    model: nn.Module, *methods: Any, batches: Iterable[Mapping] | None = None, **options
) -> Any:
    """Give a model the parameters of one method or several, which alone train from then on.

    model     of transformers, or any module with linear layers, dense or packed; changed in place
    methods   a name with its options, or objects: "lora" or LoRA(rank=16), "dora" or DoRA(),
              "ia3" or IA3(), "prefix" or Prefix(30), "parallel" or Parallel(rank=16, scale=4.0),
              "sequential" or Sequential(), "bitfit" or BitFit(), "mask" or Mask(density=0.1),
              "sparse" or SparseDelta(density=0.01), "half" for a round of `HalfPlan`
    batches   for "mask" by "fisher": arguments of the model, with labels
    options   the fields of the one method that is named

        tuner = tilewright.adapt(model, "parallel", rank=64, at="ffn")
        tilewright.accelerate(tuner.model)
        optimizer = tuner.optimizer(lr=1e-4)
        ...
        optimizer.step()
        tuner.after_step(optimizer)
        tuner.save("adapter.safetensors")

    Returns a tuner: `model` is what to train, a PeftModel for lora, dora, ia3 and prefix, whose
    layers and files are PEFT's; printing it says what trains. `merge` puts the update into dense
    weights where weights can say it, `unmerge` gives back their bits, `remove` the model as it was.
    But for prefix tuning and pruning the model computes at first what it did.
    ValueError: no such method or option; no layer fits; methods that exclude each other; a model
    that is accelerated, or has adapters of the same kind.

    Source: He et al., Towards a unified view of parameter-efficient transfer learning, arXiv
    2110.04366; the methods' own are in their docstrings.
    """
    chosen = _methods(methods, options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"adapt: model is a {type(model).__name__}, need a torch.nn.Module")
    if _is_accelerated(model):
        raise ValueError(
            "adapt: the model is accelerated; call tilewright.restore(model), then adapt, then "
            "accelerate what is to be trained"
        )
    if batches is not None and not any(isinstance(method, Mask) for method in chosen):
        raise ValueError('adapt: batches are for "mask" by "fisher", which was not asked for')
    made: list[Any] = []
    try:
        for method in chosen:
            made.append(_attached(model, method, batches))
            model = made[-1].model
    except ValueError:
        for tuner in reversed(made):
            tuner.remove()
        raise
    return made[0] if len(made) == 1 else Tuners(made)


def _methods(methods: tuple, options: dict) -> list:
    if not methods:
        raise ValueError(f"adapt: no method given. Known: {', '.join(known())}")
    named = [m for m in methods if isinstance(m, str)]
    if options and (len(methods) > 1 or not named):
        raise ValueError(
            f"adapt: option {next(iter(options))!r} belongs to one method by its name; with "
            "several, or an object, pass objects with their options"
        )
    chosen = [method_of(m, options) if isinstance(m, str) else m for m in methods]
    kinds = tuple(known().values())
    for method in chosen:
        if type(method) not in kinds:
            raise ValueError(
                f"adapt: method is a {type(method).__name__}, need one of {', '.join(known())} or "
                f"an object such as SparseDelta()"
            )
    of_peft = [type(m).__name__ for m in chosen if isinstance(m, PEFT)]
    alone = [type(m).__name__ for m in chosen if type(m) in DENSE and len(chosen) > 1]
    repeated = len({_family(m) for m in chosen}) < len(chosen)
    if len(of_peft) > 1 or repeated or alone:
        names = " and ".join(alone or of_peft or [type(m).__name__ for m in chosen])
        raise ValueError(
            f"adapt: {names} cannot be combined: need at most one of PEFT's methods, one "
            "adapter (parallel or sequential) and one sparse delta, and bitfit, mask and half alone"
        )
    return sorted(chosen, key=lambda m: not isinstance(m, PEFT))  # PEFT's goes around the others


def _family(method: Any) -> type:
    return Parallel if isinstance(method, Parallel) else type(method)


def _is_accelerated(model: nn.Module) -> bool:
    # told without importing transformers, for a module that is none of its models
    return any("_tilewright_changes" in vars(module) for module in model.modules())


def _attached(model: nn.Module, method: Any, batches) -> Any:
    if isinstance(method, PEFT):
        return PeftTuner(model, method)
    if isinstance(method, SparseDelta):
        return attach_new(model, method)
    if isinstance(method, Mask):
        return MaskTuner(model, method, batches)
    if type(method) in DENSE:
        return DENSE[type(method)](model, method)
    return AdapterTuner(model, method)


class Tuners(Tuner):
    """Several methods on one model, such as the prefix and the parallel adapter of MAM."""

    def __init__(self, tuners: list[Any]):
        self.tuners, self.model = tuners, tuners[-1].model
        for tuner in tuners:  # each has frozen what was there before it
            for parameter in tuner.parameters():
                parameter.requires_grad_(True)
        self._parameters = [p for t in tuners for p in t.parameters()]
        self.model = next((t.model for t in tuners if isinstance(t, PeftTuner)), self.model)

    def __str__(self) -> str:
        return "\n".join(map(str, self.tuners))

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def optimizer(self, **options) -> AdamW:
        """AdamW over what trains. ValueError: a sparse delta whose places move needs its own."""
        for tuner in self.tuners:
            if isinstance(tuner, SparseTuner) and tuner.method.rule != "none":
                raise ValueError(
                    f"optimizer: the sparse delta's rule is {tuner.method.rule!r}, need an "
                    "optimizer for each of .tuners, or rule 'none'"
                )
        return AdamW(self.parameters(), **options)

    def merge(self) -> None:
        try:
            for tuner in reversed(self.tuners):
                tuner.merge()
        except ValueError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        for tuner in self.tuners:
            tuner.unmerge()

    def remove(self) -> nn.Module:
        for tuner in reversed(self.tuners):
            tuner.remove()
        self.model = self.tuners[0].model
        return self.model

    def save(self, path: str | os.PathLike) -> None:
        """Write a folder: PEFT's files as they are, the others' beside them, and a list."""
        names = []
        with files.replacing_files(Path(path), LIST) as beside:
            for tuner in self.tuners:
                if isinstance(tuner, PeftTuner):
                    peft_tuner.save_peft(tuner.model, beside)
                else:
                    names.append(f"{tuner.name}.safetensors")
                    tuner.save(beside / names[-1])
            files.write_json(beside / LIST, {"files": names})

    def load(self, path: str | os.PathLike) -> None:
        for tuner in self.tuners:
            is_peft = isinstance(tuner, PeftTuner)
            tuner.load(path if is_peft else Path(path) / f"{tuner.name}.safetensors")


def load_adapted(model: nn.Module, path: str | os.PathLike) -> Any:
    """Give a model what a tuner's `save` wrote: a file, or a folder of PEFT's.

    model   as it was before `adapt`; of pruning and half fine-tuning, before training

    Returns the tuner. ValueError: a damaged file, one of no method that we know, or one that the
    model does not fit.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(model, path)
    texts = files.read_metadata(path)
    if DELTAS in texts:
        saved = load_deltas(os.fspath(path))
        options = json.loads(saved.metadata.get("method", "{}"))
        if saved.metadata.get("kind") != "mask":
            return attach_deltas(model, saved.deltas, SparseDelta(**options))
        masks = {name: mask_of(delta) for name, delta in saved.deltas.items()}
        try:
            tuner: Any = MaskTuner(model, method_of("mask", options), masks=masks)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"load_adapted: {path} does not fit the model: {error}") from error
    elif HEADER in texts:
        tuner = _attached(model, described(path, texts[HEADER]), None)
    else:
        raise InputError(f"load_adapted: {path} is no file of `adapt`: its header names no method")
    try:
        tuner.load(path)
    except InputError:
        if not (isinstance(tuner, MaskTuner) and tuner.method.by == "magnitude"):
            if type(tuner.method).__name__ != "Half":
                tuner.remove()
        raise
    return tuner


def _load_folder(model: nn.Module, folder: Path) -> Any:
    made: list[Any] = []
    if (folder / peft_tuner.CONFIG).exists():
        made.append(load_peft(model, folder))
        model = made[-1].model
    listed = files.read_json(folder / LIST)["files"] if (folder / LIST).exists() else []
    for name in listed:
        if Path(str(name)).name != name:
            raise InputError(f"load_adapted: {folder / LIST} names {name!r}, need files beside it")
        made.append(load_adapted(model, folder / name))
    if not made:
        raise InputError(
            f"load_adapted: {folder} has neither {peft_tuner.CONFIG} nor {LIST}, need a folder "
            "that a tuner wrote"
        )
    return made[0] if len(made) == 1 else Tuners(made)
