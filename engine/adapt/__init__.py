"""Put our operators into a Hugging Face model in place, and take them out again; tune it.

Called, the package is the function `adapt` of call.py: `tilewright.adapt(model, method)`.
transformers is imported by the first call, not with the package.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from tilewright.adapt.report import Replaced, Report, Skipped

if TYPE_CHECKING:
    from tilewright.adapt.table import Request

__all__ = ["Replaced", "Report", "Skipped", "accelerate", "restore"]

ATTENTION = ("dense", "shifted")


class _Callable(types.ModuleType):
    def __call__(self, model: nn.Module, *methods: object, **options: object):
        from tilewright.adapt.call import adapt

        return adapt(model, *methods, **options)  # type: ignore[arg-type]


sys.modules[__name__].__class__ = _Callable


def accelerate(
    model: nn.Module,
    *,
    attention: str = "dense",
    group_size: int | None = None,
    rope_target_length: int | None = None,
    train: Sequence[str] | None = None,
) -> Report:
    """Replace the stock operators of a transformers model by ours, in this instance only.

    model               a transformers model, or a module that holds some (PEFT models, wrappers)
    attention           "dense"; or "shifted": shifted-sparse attention (S2-Attn) in causal layers
                        while they train, dense under model.eval()
    group_size          tokens in a group of shifted-sparse attention, at least 1; LongLoRA takes a
                        quarter of the training length
    rope_target_length  context length, in tokens, to stretch rotary positions to by linear
                        interpolation; a scaling that the model already has is kept and multiplied
    train               parts of parameter names, ["embed", "norm"] for LongLoRA: exactly the
                        parameters whose name holds one of them, and adapters that are trainable
                        already, get requires_grad; call it after get_peft_model

    Attention, PEFT's LoRA and DoRA layers, and at inference those of (IA)^3 that scale an output,
    rotary positions, RMSNorm and LayerNorm, and the gates of gated layers are replaced.
    On a CPU q, k and v, or gate and up, that are all LoRA or packed layers of ours become one call,
    which keeps the bits of their outputs; one with hooks stays by itself.
    A norm, gate, rotary function or attention layer is known by its source; on a CPU
    LayerNorm in float32, and short calls of it and of gates, where torch is as quick, stay torch's.
    A model with an output head makes no logits in a training forward that gets labels: what
    reaches torch's cross_entropy becomes `linear_cross_entropy`, and whoever reads `out.logits`
    gets them then, if before the optimizer's step. That loss is 0, not NaN, without any label.

    Returns a Report of what was replaced, what was skipped, and why. The weights, the names in the
    state dict and saved files stay as they are; `restore` undoes all of it. A call that our
    operator cannot take (output_attentions=True, a 4-D mask) runs transformers' own attention and
    warns once. Experts of a mixture are replaced where `moe_mlp` knows their activation; the router
    stays the model's. PEFT's LoRA layers run PEFT's own path while their adapter is disabled,
    merged, one of several, or otherwise not what `lora_linear` computes. Accelerating again starts
    from the stock model; an error leaves the model stock.
    ValueError: an argument outside the above, or nothing in the model can be replaced.

    Source: Chen et al., LongLoRA, arXiv 2309.12307; Chen et al., position interpolation,
    arXiv 2306.15595.
    """
    _check_arguments(model, attention, group_size, rope_target_length, train)
    from tilewright import longlora
    from tilewright.adapt import undo
    from tilewright.adapt.table import Request

    if undo.is_changed(model):
        undo.undo(model)
    try:
        swaps = undo.own_configs(model)
        report = _replace(model, Request(group_size=group_size or 0))
        notes: list[str] = []
        if rope_target_length is not None:
            notes += longlora.interpolate_positions(model, rope_target_length)
        if train is not None:
            notes += longlora.train_only(model, train)
        for swap in swaps:
            swap.seal()
    except BaseException:
        undo.undo(model)
        raise
    return replace(report, notes=tuple(notes))


def _replace(model: nn.Module, request: Request) -> Report:
    """Apply every entry of the table to every module that it fits."""
    from tilewright.adapt.attention import NOT_SHIFTED
    from tilewright.adapt.entries import TABLE
    from tilewright.adapt.table import sites

    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    found = sites(model)
    for entry in TABLE:
        fitting, unfit = [], []
        for site in found:
            if not entry.is_candidate(site.module):
                continue
            reason = entry.why_not(site, request)
            if reason is None:
                fitting.append(site)
            else:
                unfit.append((site, reason))
        # read before anything is installed, which may swap classes
        classes = [site.class_name for site in fitting]
        skipped += [Skipped(entry.kind, s.name, s.class_name, reason) for s, reason in unfit]
        notes = entry.install(fitting, unfit, request) if fitting else []
        replaced += [
            Replaced(entry.kind, site.name, was, entry.operator, note)
            for site, was, note in zip(fitting, classes, notes, strict=True)
        ]
    report = Report(type(model).__name__, tuple(replaced), tuple(skipped))
    if not replaced:
        raise ValueError(f"accelerate: nothing in the model can be replaced. {report}")
    attention = [r for r in replaced if r.kind == "attention"]
    if request.group_size and all(r.note == NOT_SHIFTED for r in attention):
        raise ValueError(
            'accelerate: attention is "shifted", but the model has no causal attention layer '
            f"that can be replaced. {report}"
        )
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the stock configuration, operators, positions and requires_grad flags.

    What was changed since on the model's configuration by others, as by resizing the embeddings,
    is kept. ValueError: the model is not accelerated.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"restore: model is a {type(model).__name__}, need a torch.nn.Module")
    from tilewright.adapt import undo

    if not undo.is_changed(model):
        raise ValueError(f"restore: this {type(model).__name__} is not accelerated")
    undo.undo(model)


def _check_arguments(model, attention, group_size, rope_target_length, train) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate: model is a {type(model).__name__}, need a torch.nn.Module")
    if attention not in ATTENTION:
        raise ValueError(f'accelerate: no attention "{attention}". Known: {", ".join(ATTENTION)}')
    if attention == "shifted" and group_size is None:
        raise ValueError('accelerate: attention "shifted" needs group_size, a number of tokens')
    if attention != "shifted" and group_size is not None:
        raise ValueError('accelerate: group_size belongs to attention="shifted"')
    for name, value in (("group_size", group_size), ("rope_target_length", rope_target_length)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"accelerate: {name} is {value!r}, need a whole number of at least 1")
    if train is not None:
        if isinstance(train, str) or not all(isinstance(part, str) and part for part in train):
            raise ValueError(
                f"accelerate: train is {train!r}, need a list of parts of parameter names, "
                'such as ["embed", "norm"]'
            )
        if not train:
            raise ValueError("accelerate: train is empty, need at least one part of a name")
