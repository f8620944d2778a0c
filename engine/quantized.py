"""Linear layers over packed weights, and models whose linear layers become such."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from tilewright.adapt.report import Replaced, Report, Skipped
from tilewright.adapt.together import take_ready
from tilewright.ops import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    Int4,
    Int8,
    PackedWeight,
    dequantize_weight,
    quantize_weight,
    quantized_linear,
)

FORMATS = {"nf4": NF4, "fp4": FP4, "int4": Int4, "int8": Int8, "fp8": FP8, "mxfp4": MXFP4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Filter = Callable[[str, nn.Linear], bool]


@dataclass(frozen=True)
class Layout:
    """What the tensors of a packed weight look like, apart from its shape; config.json holds it.

    format        of the codes, as in PackedWeight
    group_size    inputs that share a scale; None for all of a row
    scales        dtype of the scales
    offsets       dtype of the offsets; None: there are none
    input_order   whether columns are in another order than the inputs
    nested_block  scales that share an absmax; 0: scales are plain numbers
    """

    format: str
    group_size: int | None
    scales: str
    offsets: str | None = None
    input_order: bool = False
    nested_block: int = 0

    @classmethod
    def of(cls, packed: PackedWeight) -> Layout:
        whole_row = packed.group_size >= packed.in_features
        return cls(
            packed.format,
            None if whole_row else packed.group_size,
            _dtype_name(packed.scales),
            None if packed.offsets is None else _dtype_name(packed.offsets),
            packed.input_order is not None,
            packed.nested.block if packed.nested else 0,
        )

    def empty(self, n_out: int, n_in: int, dtype: torch.dtype, device) -> PackedWeight:
        """A weight of this layout whose tensors have yet to be filled."""
        return PackedWeight.empty(
            self.format, n_out, n_in, self.group_size or n_in, getattr(torch, self.scales),
            offsets=getattr(torch, self.offsets) if self.offsets else None,
            has_input_order=self.input_order, nested_block=self.nested_block, dtype=dtype,
            device=device,
        )  # fmt: skip

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class QuantizedLinear(nn.Linear):
    """A linear layer over a packed weight: y = W x + bias, W decoded tile by tile.

    It is an nn.Linear, so that PEFT and others who look for linear layers find it, without a weight
    of its own: `packed` is the weight, `weight` reads as the decoded matrix and refuses to be
    written. Its state dict holds the packed tensors (codes, scales, ...), how they are laid out,
    and bias. Casting the model to another dtype leaves the packed tensors as they are.

    packed   the weight (O, I)
    bias     (O,), or None
    """

    # those that a format does not have are absent from the state dict
    OPERANDS = ("codes", "scales", "offsets", "input_order", "nested_table", "nested_absmax")
    TENSORS = (*OPERANDS, "nested_offset", "packing")

    _is_hf_initialized = True  # for transformers: there are no random weights to draw
    _packed: tuple[tuple[torch.Tensor | None, ...], PackedWeight] | None = None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.layout, self.dtype = Layout.of(packed), packed.dtype
        tensors = packed.tensors()
        for name in self.OPERANDS:
            tensor = tensors.get(name)
            if tensor is not None and name == "nested_table":
                tensor = tensor.clone()  # one tensor for many weights, which files cannot hold
            self.register_buffer(name, tensor)
        offset = None
        if packed.nested is not None:
            offset = torch.tensor(packed.nested.offset, dtype=torch.float64, device=packed.device)
        self.register_buffer("nested_offset", offset)
        text = json.dumps(asdict(self.layout)).encode()
        record = torch.tensor(list(text), dtype=torch.uint8, device=packed.device)
        self.register_buffer("packing", record)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, format) -> QuantizedLinear:
        """The same layer with its weight packed; the bias is the very parameter."""
        layer = cls(quantize_weight(linear.weight.detach(), format), linear.bias)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The layer with its weight decoded."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dequantize_weight(self.packed, self.dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def packed(self) -> PackedWeight:
        """The weight as the operators take it."""
        tensors = tuple(self._buffers[name] for name in (*self.OPERANDS, "nested_offset"))
        cached = self._packed
        if cached is None or any(a is not b for a, b in zip(cached[0], tensors, strict=True)):
            cached = tensors, self._assemble()
            self._packed = cached
        return cached[1]

    def _assemble(self) -> PackedWeight:
        empty = self.layout.empty(self.out_features, self.in_features, self.dtype, "meta")
        nested = empty.nested
        if nested is not None:
            offset = self._tensor("nested_offset")
            nested = nested._replace(
                table=self._tensor("nested_table"),
                absmax=self._tensor("nested_absmax"),
                offset=0.0 if offset.is_meta else float(offset),
            )
        return replace(
            empty, codes=self._tensor("codes"), scales=self._tensor("scales"),
            offsets=self._buffers["offsets"], input_order=self._buffers["input_order"],
            nested=nested,
        )  # fmt: skip

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._buffers[name]
        assert tensor is not None, name
        return tensor

    @property
    def format(self) -> str:
        return self.layout.format

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded matrix (O, I) to read; each operation on it decodes anew."""
        return DecodedWeight(self.packed, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready = take_ready(self, x)
        return quantized_linear(x, self.packed, self.bias) if ready is None else ready

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}, group_size={self.packed.group_size}"

    def expect_layout(self, name: str) -> None:
        """ValueError: the tensors, set one by one from a file, are of another layout."""
        found = _read_layout(self._tensor("packing"))
        if found != self.layout:
            raise ValueError(
                f"{name} is packed with {found} in the weights and with {self.layout} by "
                "config.json; copy or download the model again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_packed"}

    def _apply(self, fn, recurse=True):
        before = {name: t for name, t in self._buffers.items() if t is not None}
        probe = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device))
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._tensor(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.dtype, self._packed = probe.dtype, None
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        given, errors = state_dict.get(prefix + "packing"), rest[-1]
        found = self.layout if given is None else _read_layout(given)
        if found != self.layout:
            errors.append(f"{prefix[:-1]} is packed with {found}, the layer with {self.layout}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._packed = None


def _read_layout(packing: torch.Tensor) -> Layout | str:
    try:
        return Layout(**json.loads(bytes(packing.cpu().tolist())))
    except (ValueError, TypeError):
        return "a layout that cannot be read"


class DecodedWeight(torch.Tensor):
    """A packed weight as others read it: any operation decodes it first, none may write to it."""

    packed: PackedWeight

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype):
        made = torch.Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=dtype, device=packed.device
        )
        made.packed = packed
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise cls._refusal()
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise cls._refusal()

        def decoded(t):
            return dequantize_weight(t.packed, t.dtype) if isinstance(t, cls) else t

        return func(*tree_map(decoded, args), **tree_map(decoded, kwargs or {}))

    @staticmethod
    def _refusal() -> RuntimeError:
        return RuntimeError(
            "QuantizedLinear: weight is decoded from packed codes and cannot be written; "
            "tilewright.merge merges adapters, tilewright.dequantize gives dense weights"
        )


# models


@dataclass(frozen=True)
class QuantizationReport(Report):
    """The outcome of `quantize` or `dequantize`.

    bytes_before   of all the model's parameters and buffers, and
    bytes_after    the same with the layers replaced
    """

    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        sizes = f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after"
        return f"{super().__str__()}\n  note: {sizes}"


def quantize(
    model: nn.Module, format: NF4 | FP4 | Int4 | Int8 | FP8 | MXFP4, filter: Filter | None = None
) -> QuantizationReport:
    """Pack the weights of a model's linear layers, in place, one layer after the other.

    model    any module; one of transformers can be saved and loaded again, and takes adapters
    format   NF4(group_size=64), Int4(...), Int8(), FP8(...), ...
    filter   (name, layer) -> whether to pack this one; default every layer but output embeddings

    Left alone whatever the filter says: subclasses of nn.Linear, layers whose weight is shared with
    another module (tied embeddings), layers with hooks, and adapters; layers that are packed
    already stay as they are. Returns a report of what was replaced, what was not, and why.
    ValueError: not a module, format or filter, or no layer is left to pack; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"quantize: model is a {type(model).__name__}, need a torch.nn.Module")
    if not isinstance(format, tuple(FORMATS.values())):
        known = ", ".join(f"{kind.__name__}()" for kind in FORMATS.values())
        raise ValueError(f"quantize: format is {format!r}, need one of {known}")
    if filter is not None and not callable(filter):
        raise ValueError(f"quantize: filter is {filter!r}, need a function of (name, layer)")
    before = n_bytes(model)
    chosen, skipped = choose_layers(model, filter)
    if not chosen:
        report = Report(type(model).__name__, (), tuple(skipped))
        raise ValueError(f"quantize: no linear layer can be packed. {report}")
    replaced = []
    for name, linear in chosen:
        layer = QuantizedLinear.from_linear(linear, format)
        replace_module(model, linear, layer)
        now = f"{layer.format}, {_groups(layer.layout)}"
        replaced.append(Replaced("linear", name, "Linear", "quantized_linear", now))
    _mark(model, format)
    return QuantizationReport(
        type(model).__name__, tuple(replaced), tuple(skipped), (), before, n_bytes(model)
    )


def dequantize(model: nn.Module) -> QuantizationReport:
    """Decode the packed layers of a model back into nn.Linear, in place.

    The weights are those that the packed layers multiplied by, rounded to the model's dtype.
    ValueError: not a module, or no packed layer in it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"dequantize: model is a {type(model).__name__}, need a torch.nn.Module")
    before = n_bytes(model)
    names = dequantize_layers(model, None)
    if not names:
        raise ValueError(f"dequantize: this {type(model).__name__} has no packed layer")
    _mark(model, None)
    replaced = [Replaced("linear", name, "QuantizedLinear", "Linear") for name in names]
    return QuantizationReport(type(model).__name__, tuple(replaced), (), (), before, n_bytes(model))


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None) -> list[str]:
    """Decode all packed layers, to the model's dtype if no other is given; returns their names."""
    layers = quantized_layers(model)
    for _, layer in layers:
        layer.dtype = dtype or layer.dtype
        replace_module(model, layer, layer.to_linear())
    return [name for name, _ in layers]


def quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedLinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def choose_layers(
    model: nn.Module, filter: Filter | None
) -> tuple[list[tuple[str, nn.Linear]], list[Skipped]]:
    """The layers to pack, and the linear layers that are not, each with the reason."""
    head = _output_embeddings(model)
    adapters = {id(m) for m in _adapter_modules(model)}
    users: dict[int, list[str]] = {}  # of a parameter
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name or "(the model)")
    chosen, skipped = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in adapters:
            continue
        reason = _why_not(module, users)
        if reason is None and filter is None and module is head:
            reason = "it is the output embedding"
        if reason is None and filter is not None and not filter(name, module):
            reason = "the filter leaves it out"
        if reason is None:
            chosen.append((name, module))
        else:
            skipped.append(Skipped("linear", name, type(module).__name__, reason))
    return chosen, skipped


def _why_not(module: nn.Linear, users: dict[int, list[str]]) -> str | None:
    if isinstance(module, QuantizedLinear):
        return f"it is packed already ({module.format})"
    if type(module) is not nn.Linear:
        return "it is not exactly torch.nn.Linear"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "there are hooks on it"
    if module.weight.dtype not in DTYPES:
        return f"its weight is {module.weight.dtype}"
    if not module.weight.numel():
        return "its weight is empty"
    sharing = users[id(module.weight)]
    if len(sharing) > 1:
        return f"its weight is shared by {' and '.join(sharing)}"
    return None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if getter is not None:
            return getter()
    return None


def _adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that PEFT has put beside a base layer, and trainable copies of whole modules."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            kept = {id(m) for m in base.modules()}
            yield from (m for m in module.modules() if id(m) not in kept)
        copies = module._modules.get("modules_to_save")
        if copies is not None:
            yield from copies.modules()


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever in the model `old` stands."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def n_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    every = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in every.values())


def _groups(layout: Layout) -> str:
    return "one scale a row" if layout.group_size is None else f"group_size {layout.group_size}"


def _mark(model: nn.Module, format) -> None:
    """Let a model of transformers know, so that it is saved and trained as a quantized one."""
    base: Any = model
    if hasattr(model, "peft_config"):
        base = base.get_base_model()
    if hasattr(base, "config") and hasattr(base, "save_pretrained"):
        from tilewright import quantizer

        quantizer.mark(base, format)
