"""Calls of `fused_linear` as tests describe them: inputs, the truth in float64, and stock torch."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tilewright import ops
from tilewright.ops.common.packed import (
    FORMATS,
    NestedScales,
    PackedWeight,
    code_values,
    decode,
    eight_bit_table,
    pack_codes,
    pack_rows,
)
from tilewright.ops.linear import reference

SEED = 0x1234_5678_9ABC_DEF0  # both of Philox's key words matter
ALL = ("x", "bias", "down", "up")


@dataclass(frozen=True)
class Case:
    """A call without its tensors.

    group     inputs that share a scale, 0 for one scale a row
    scales    type of the scales; "nested" for a second level
    adapter   type of down and up, None for x's
    adapters  how many low-rank updates of this rank the rows choose from; 0 for one that all share
    """

    T: int
    I: int
    O: int
    R: int = 0
    format: str = "dense"
    group: int = 0
    scales: object = torch.float32
    has_offsets: bool = False
    has_order: bool = False
    has_bias: bool = False
    has_out_scale: bool = False
    adapter: torch.dtype | None = None
    adapters: int = 0
    scale: float = 0.7
    activation: str = "none"
    dropout_p: float = 0.0
    int8_activations: bool = False

    def with_(self, **changes) -> "Case":
        return replace(self, **changes)


def packed_weight(case: Case, generator=None) -> PackedWeight:
    """Random codes under random scales, such that W has about unit variance over I."""
    generator = generator or torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    shape = case.O, case.I
    if FORMATS[case.format].bits == 4:
        codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    elif case.format == "int8":
        codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    else:
        codes = (100 * normal(*shape)).to(torch.float8_e4m3fn)
        codes = codes.view(torch.uint8)
    group = case.group or case.I
    n_groups = -(-case.I // group)
    spread = code_values(codes, case.format).square().mean().sqrt().item() * case.I**0.5
    scales = (0.5 + torch.rand(case.O, n_groups, generator=generator)) / spread
    nested, offsets = None, None
    if case.has_offsets:
        offsets = pack_rows(normal(case.O, n_groups) / case.I**0.5)
    if case.scales == "nested":
        block = 5
        absmax = 0.5 + torch.rand(-(-scales.numel() // block), generator=generator)
        table = torch.rand(256, generator=generator) / spread
        nested = NestedScales(table, absmax, 0.3 / spread, block)
        scales = torch.randint(0, 256, scales.shape, generator=generator, dtype=torch.uint8)
    else:
        scales = scales.to(case.scales)
    order = None
    if case.has_order:
        order = torch.randperm(case.I, generator=generator).int()
    return PackedWeight(
        case.format, *shape, group, pack_codes(codes, case.format), pack_rows(scales), offsets,
        order, nested,
    )  # fmt: skip


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """The tensors of a call by name, and dy."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape, kind=dtype):
        return torch.randn(shape, generator=generator).to(kind)

    tensors = {"x": normal(case.T, case.I)}
    if case.format == "dense":
        tensors["weight"] = (normal(case.O, case.I).float() / case.I**0.5).to(dtype)
    else:
        tensors["weight"] = packed_weight(case, generator)
    if case.has_bias:
        tensors["bias"] = normal(case.O)
    if case.has_out_scale:
        tensors["out_scale"] = normal(case.O)
    if case.R:
        kind = case.adapter or dtype
        n = max(case.adapters, 1)
        tensors["down"] = (normal(n * case.R, case.I).float() / case.I**0.5).to(kind)
        tensors["up"] = normal(case.O, n * case.R, kind=kind)
    if case.adapters:
        rows = torch.randint(-1, case.adapters, (case.T,), generator=generator)
        tensors["row_adapters"] = rows.int()
    return tensors, normal(case.T, case.O)


def scales_of(case: Case) -> list[float]:
    """One scale for each adapter, none of them the same."""
    return [case.scale + 0.3 * n for n in range(case.adapters)]


def call(case: Case, t: dict, impl: str) -> torch.Tensor:
    """y by one of our implementations."""
    if case.adapters:
        downs, ups = t["down"].split(case.R), t["up"].split(case.R, dim=1)
        return ops.multi_lora_linear(
            t["x"], t["weight"], downs, ups, t["row_adapters"], scales=scales_of(case),
            bias=t.get("bias"), impl=impl,
        )  # fmt: skip
    options = {}
    if case.dropout_p:
        options = {"dropout_p": case.dropout_p, "dropout_seed": torch.tensor([SEED])}
    return ops.fused_linear(
        t["x"], t["weight"], t.get("bias"), out_scale=t.get("out_scale"), down=t.get("down"),
        up=t.get("up"), scale=case.scale, activation=case.activation,
        int8_activations=case.int8_activations, impl=impl, **options,
    )  # fmt: skip


def stock(case: Case, t: dict, _=None) -> torch.Tensor:
    """The same from torch's linear in x.dtype, over the decoded weight rounded to it."""
    x = t["x"]
    weight = t["weight"]
    if isinstance(weight, PackedWeight):
        table = eight_bit_table(case.format) if case.int8_activations else None
        weight = decode(weight, table).to(x.dtype)
    operand = x
    if case.int8_activations:
        codes, scale = reference.quantize_rows(x.detach().double())
        rounded = (codes.to(x.dtype) * scale.to(x.dtype)).to(x.device)
        operand = x + (rounded - x).detach()  # its gradient is that of the product without rounding
    y = F.linear(operand, weight, t.get("bias"))
    if "out_scale" in t:
        y = y * t["out_scale"]
    if not case.R:
        return y
    dropped = x
    if case.dropout_p:
        factors = reference.dropout_factors(SEED, case.T, case.I, case.dropout_p)
        dropped = x * factors.to(x.device, x.dtype)
    hidden = F.linear(dropped, t["down"].to(x.dtype))
    if case.activation == "relu":
        hidden = hidden.relu()
    if not case.adapters:
        return y + case.scale * F.linear(hidden, t["up"].to(x.dtype))
    for n, scale in enumerate(scales_of(case)):
        mine = slice(n * case.R, (n + 1) * case.R)
        update = scale * F.linear(hidden[:, mine], t["up"][:, mine].to(x.dtype))
        y = y + torch.where((t["row_adapters"] == n)[:, None], update, 0.0)
    return y


def both_ways(run, case: Case, tensors: dict, dy: torch.Tensor, *more) -> dict:
    """y and the gradients of all that can have one here and have elements."""
    leaves = {
        n: tensors[n].detach().clone().requires_grad_()
        for n in ALL
        if n in tensors and tensors[n].numel()
    }
    y = run(case, tensors | leaves, *more)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    names = [f"d{name}" for name in leaves]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def wide(tensors: dict) -> dict:
    """The same values in float64; a packed weight stays what it is."""
    return {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in tensors.items()
    }


def summed_magnitudes(case: Case, tensors: dict, dy: torch.Tensor) -> dict:
    """For y and each gradient the sum of the magnitudes of its terms: the same call on absolute
    values. Not for dropout, whose factors `call` would draw the same, nor for rounded x."""
    positive = {n: t if n == "row_adapters" else _magnitudes(t) for n, t in wide(tensors).items()}
    return both_ways(call, case, positive, dy.double().abs(), "reference")


def _magnitudes(t):
    if not isinstance(t, PackedWeight):
        return t.abs()
    return decode(t).double().abs()


def truth_of(case: Case, tensors: dict, dy: torch.Tensor) -> dict:
    return both_ways(call, case, wide(tensors), dy.double(), "reference")
