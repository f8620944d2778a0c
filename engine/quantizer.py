"""The plug-in for transformers: models that are quantized as they load, saved, and loaded again.

Importing this module registers it; `tilewright` does so once transformers is imported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from tilewright.ops import quantize_weight
from tilewright.quantized import (
    FORMATS,
    Layout,
    QuantizedLinear,
    choose_layers,
    dequantize_layers,
    quantized_layers,
    replace_module,
)

METHOD = "tilewright"
OTHERS = ""  # in QuantConfig.layouts: the layout of every layer that is not named


@register_quantization_config(METHOD)
class QuantConfig(QuantizationConfigMixin):
    """How from_pretrained shall pack a model's linear layers; config.json keeps it.

    format                   "nf4", "fp4", "int4", "int8", "fp8" or "mxfp4"
    modules_to_not_convert   names, or their ends, of layers to leave as they are, besides output
                             embeddings
    layouts                  of a saved model, written by it: what its packed tensors look like
    options                  of the format, such as group_size=64: the arguments of NF4, Int4, ...

    ValueError: no such format, or an option that it does not take.
    """

    def __init__(
        self,
        format: str = "nf4",
        modules_to_not_convert: list[str] | None = None,
        layouts: dict[str, dict] | None = None,
        quant_method: str = METHOD,
        **options: Any,
    ):
        if format not in FORMATS:
            raise ValueError(f"QuantConfig: no format {format!r}. Known: {', '.join(FORMATS)}")
        names = [f.name for f in fields(FORMATS[format])]
        unknown = sorted(set(options) - set(names))
        if unknown:
            takes = ", ".join(names) or "no options"
            raise ValueError(
                f"QuantConfig: format {format!r} has no option {unknown[0]!r}, it takes {takes}"
            )
        if isinstance(modules_to_not_convert, str):
            raise ValueError(
                f"QuantConfig: modules_to_not_convert is {modules_to_not_convert!r}, "
                "need a list of names"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.modules_to_not_convert = modules_to_not_convert
        self.layouts = layouts
        vars(self).update(asdict(FORMATS[format](**options)))

    @property
    def record(self):
        """The format with its options, as `quantize` takes it."""
        kind = FORMATS[self.format]
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})

    def layout_of(self, name: str) -> Layout:
        """What the packed tensors of a layer of a saved model look like."""
        layouts = self.layouts or {}
        found = layouts.get(name, layouts.get(OTHERS))
        try:
            return Layout(**found)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                f"QuantConfig: layouts says nothing of use about {name} ({found!r}); "
                "the model's config.json is damaged, copy or download it again"
            ) from None


@register_quantizer(METHOD)
class TilewrightQuantizer(HfQuantizer):
    """Called by from_pretrained, save_pretrained, dequantize and the Trainer."""

    requires_calibration = False
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.chosen: set[str] = set()  # names of the weights to pack while loading

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("QuantConfig: device_map sends layers to the disk, need cpu or a GPU")

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        return _PackWeight(self)

    def get_new_dtype(self, converter, param, dtype):
        """Packed tensors keep the dtype that they were saved in."""
        names = getattr(converter, "target_patterns", [])
        if any(name.rpartition(".")[2] in QuantizedLinear.TENSORS for name in names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        config = self.quantization_config
        tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
        tied |= {name.removesuffix(".weight") for name in model.all_tied_weights_keys.values()}
        patterns = [*(config.modules_to_not_convert or []), *(model._keep_in_fp32_modules or [])]
        layers, _ = choose_layers(model, None)
        layers = [
            (name, linear) for name, linear in layers
            if name not in tied and should_convert_module(name, patterns)
        ]  # fmt: skip
        if not layers:
            raise ValueError(
                f"QuantConfig: {type(model).__name__} has no linear layer to pack"
                + (f" outside of {', '.join(patterns)}" if patterns else "")
            )
        if not self.pre_quantized:
            self.chosen = {f"{name}.weight" for name, _ in layers}
            return
        for name, linear in layers:
            layout = config.layout_of(name)
            empty = layout.empty(
                linear.out_features, linear.in_features, linear.weight.dtype, "meta"
            )
            replace_module(model, linear, QuantizedLinear(empty, linear.bias))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        for name, layer in quantized_layers(model):
            layer.expect_layout(name)
        mark(model, self.quantization_config.record)
        return model

    def _dequantize(self, model, dtype=None):
        dequantize_layers(model, dtype)
        return model


class _PackWeight(ConversionOps):
    """Takes one dense weight from the checkpoint and leaves a packed layer in its place."""

    def __init__(self, quantizer: TilewrightQuantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, *args, model=None, missing_keys=None, **kwargs):
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        linear = model.get_submodule(name.rpartition(".")[0])
        if weight.shape != linear.weight.shape:
            raise ValueError(
                f"QuantConfig: {name} has shape {tuple(weight.shape)} in the checkpoint, "
                f"need {tuple(linear.weight.shape)}"
            )
        packed = quantize_weight(weight, self.quantizer.quantization_config.record)
        packed = replace(packed, dtype=linear.weight.dtype)
        replace_module(model, linear, QuantizedLinear(packed, linear.bias))
        if missing_keys is not None:
            missing_keys.discard(name)
        return {}


def mark(model: Any, format=None) -> None:
    """Bring the configuration of a transformers model in line with its layers.

    format   that they were last packed by; None: as the configuration says already
    """
    packed = quantized_layers(model)
    present: Any = getattr(model, "hf_quantizer", None)
    is_ours = isinstance(present, TilewrightQuantizer)
    if not packed:
        if is_ours:
            present.remove_quantization_config(model)
        return
    if format is not None:
        name, options = _described(format)
    elif is_ours:
        name, options = _described(present.quantization_config.record)
    else:
        code = packed[0][1].format
        name = {"uint4": "int4", "e2m1": "mxfp4"}.get(code, code)
        options = {"symmetric": False} if code == "uint4" else {}
    layouts = {_plain(n): layer.layout for n, layer in packed}
    ((usual, _),) = Counter(layouts.values()).most_common(1)
    others = [
        _plain(n) for n, m in model.named_modules()
        if type(m) is nn.Linear and ".lora_" not in n
    ]  # fmt: skip
    config = QuantConfig(
        name, modules_to_not_convert=others,
        layouts={
            OTHERS: asdict(usual),
            **{n: asdict(layout) for n, layout in layouts.items() if layout != usual},
        },
        **options,
    )  # fmt: skip
    model.hf_quantizer = TilewrightQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.quantization_method = METHOD
    model.is_quantized = True


def _described(format) -> tuple[str, dict[str, Any]]:
    name = next(name for name, kind in FORMATS.items() if type(format) is kind)
    return name, asdict(format)


def _plain(name: str) -> str:
    """The layer's name without what PEFT has put around it."""
    return name.replace(".base_layer", "")
