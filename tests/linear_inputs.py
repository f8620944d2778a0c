"""Inputs, stock results and the truth of the linear tests.

A `Case` describes a call; `prepared(case, dtype)` holds its inputs, what stock torch makes of them,
and what float64 makes of them. They are kept for the next implementation, never changed.
"""

import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import bitwise  # noqa: F401  one meaning of "the same bits" for all rooms
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops
from tilewright.ops.common.packed import (
    FORMATS,
    NestedScales,
    PackedWeight,
    code_values,
    decode,
    group_scales,
    pack_codes,
    pack_rows,
    unpack_codes,
    unpack_rows,
)
from tilewright.ops.common.sparse_delta import WeightDelta
from tilewright.ops.linear import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = "dense"
SEED = 0x1234_5678_9ABC_DEF0  # both words of the key count
GRADIENTS = ("x", "weight", "bias", "out_scale", "down", "up", "delta")


def dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


@dataclass(frozen=True)
class Case:
    """A call of fused_linear. Base and update are of one size: one percent of either shows.

    group          inputs that share a scale, 0 for one scale a row
    scales         their type, or "nested"
    adapter        type of down and up, None for x's
    lead           leading axes of x, whose product is `tokens`
    adapters       rank of each of several adapters, and -1 for rows without one
    delta          share of the weight's entries that a sparse delta changes
    delta_values   their type
    """

    tokens: int
    n_in: int
    n_out: int
    rank: int = 0
    format: str = DENSE
    group: int = 0
    scales: object = torch.float32
    offsets: bool = False
    act_order: bool = False
    bias: bool = False
    out_scale: bool = False
    scale: float = -1.0
    activation: str = "none"
    dropout_p: float = 0.0
    adapter: torch.dtype | None = None
    lead: tuple | None = None
    adapters: tuple = ()
    delta: float = field(default=0.0, repr=False)  # inputs are drawn from what is shown
    delta_values: torch.dtype = field(default=torch.float32, repr=False)

    def but(self, **changes) -> "Case":
        return replace(self, **changes)


@dataclass(frozen=True)
class Inputs:
    """x, weight and options of a call, and dy.

    factors   what dropout multiplies x by, (T, I) float64, or None
    """

    x: torch.Tensor
    weight: torch.Tensor | PackedWeight
    dy: torch.Tensor
    options: dict
    factors: torch.Tensor | None = None

    @property
    def named(self) -> dict:
        """The tensors that may have a gradient; of a delta its values."""
        tensors = {"x": self.x, "weight": self.weight, **self.options}
        if "delta" in tensors:
            tensors["delta"] = tensors["delta"].values
        return {n: t for n, t in tensors.items() if n in GRADIENTS and isinstance(t, torch.Tensor)}


@dataclass(frozen=True)
class Results:
    """y, and gradients by the name of their tensor."""

    y: torch.Tensor
    grads: dict = field(default_factory=dict)

    def items(self):
        return {"y": self.y, **self.grads}.items()


@dataclass(frozen=True)
class Prepared:
    """terms: for each result the sum of the magnitudes of what is summed up in float32."""

    inputs: Inputs
    stock: Results
    truth: Results
    terms: Results


def random_codes(format, n_out, n_in, generator) -> torch.Tensor:
    """All codes of a format alike; of fp8 all but NaN."""
    if FORMATS[format].bits == 4:
        return torch.randint(0, 16, (n_out, n_in), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 256, (n_out, n_in), generator=generator).to(torch.uint8)
    return torch.where(codes & 127 == 127, 0, codes) if format == "fp8" else codes


def random_packed(
    format, n_out, n_in, group=0, scales=torch.float32, offsets=False, act_order=False,
    generator=None,
) -> PackedWeight:  # fmt: skip
    """Random codes under random scales of either sign: W x has about the size of x."""
    generator = generator or torch.Generator().manual_seed(0)
    group = group or max(n_in, 1)
    groups = -(-n_in // group)
    codes = random_codes(format, n_out, n_in, generator)
    values = code_values(torch.arange(256 if FORMATS[format].bits == 8 else 16).byte(), format)
    step = 1 / (values.nan_to_num(0.0).square().mean() * max(n_in, 1)).sqrt().item()

    def spread(*shape):  # 0.5 to 1.5, half of them negative
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * (0.5 + torch.rand(shape, generator=generator))

    nested = None
    if scales == "nested":
        block = 7  # divides neither a row nor a line
        table = torch.rand(256, generator=generator) * 2 - 1
        absmax = step * spread(-(-n_out * groups // block)).abs()
        nested = NestedScales(table, absmax, 0.3 * step, block)
        steps = torch.randint(0, 256, (n_out, groups), generator=generator).to(torch.uint8)
        kept = torch.float32
    else:
        steps = (step * spread(n_out, groups)).to(scales)
        kept = scales
    shifts = None
    if offsets:  # such as -8 of 16 codes
        shifts = pack_rows((step * values.nan_to_num(0.0).abs().max() / 2 * spread(n_out, groups))
                           .to(kept))  # fmt: skip
    order = torch.randperm(n_in, generator=generator).int() if act_order else None
    return PackedWeight(
        format, n_out, n_in, group, pack_codes(codes, format), pack_rows(steps), shifts, order,
        nested,
    )  # fmt: skip


def decoded(weight) -> torch.Tensor:
    return decode(weight) if isinstance(weight, PackedWeight) else weight


def _to_columns(weight: PackedWeight, of_groups: torch.Tensor) -> torch.Tensor:
    """(O, G) values -> (O, I), in the order of what is packed."""
    return of_groups[:, torch.arange(weight.in_features) // weight.group_size]


def _offsets(weight: PackedWeight) -> torch.Tensor:
    assert weight.offsets is not None
    return _to_columns(weight, unpack_rows(weight.offsets, weight.out_features).double())


def _in_place(weight: PackedWeight, columns: torch.Tensor) -> torch.Tensor:
    if weight.input_order is None:
        return columns
    return torch.empty_like(columns).index_copy_(1, weight.input_order.long(), columns)


def exactly_decoded(weight) -> torch.Tensor:
    """The weight in float64: a packed one without the roundings of `decode`."""
    if not isinstance(weight, PackedWeight):
        return weight.double()
    codes = unpack_codes(weight.codes, weight.format, *weight.shape)
    values = code_values(codes, weight.format).double()
    values = values * _to_columns(weight, group_scales(weight).double())
    if weight.offsets is not None:
        values = values + _offsets(weight)
    return _in_place(weight, values)


def summands(weight) -> torch.Tensor:
    """|W| in float64, where codes and offsets count for themselves: they meet the sums apart."""
    size = exactly_decoded(weight).abs()
    if isinstance(weight, PackedWeight) and weight.offsets is not None:
        # |W - offset| + |offset| <= |W| + 2 |offset|
        size = size + 2 * _in_place(weight, _offsets(weight).abs())
    return size


def make_inputs(case: Case, dtype) -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((case, dtype)).encode()))

    def normal(*shape, size=1.0, kind=dtype):
        return (size * torch.randn(shape, generator=generator)).to(kind)

    lead = case.lead or (case.tokens,)
    n_in, n_out, narrow = case.n_in, case.n_out, max(case.n_in, 1) ** -0.5
    x = normal(*lead, n_in)
    if case.format == DENSE:
        weight = normal(n_out, n_in, size=narrow)
    else:
        weight = random_packed(
            case.format, n_out, n_in, case.group, case.scales, case.offsets, case.act_order,
            generator,
        )  # fmt: skip
    options: dict = {}
    if case.bias:
        options["bias"] = normal(n_out, size=0.5)
    if case.out_scale:
        options["out_scale"] = normal(n_out)
    kind = case.adapter or dtype
    ranks = case.adapters or ((case.rank,) if case.rank else ())
    downs = [normal(r, n_in, size=narrow, kind=kind) for r in ranks]
    ups = [normal(n_out, r, size=r**-0.5, kind=kind) for r in ranks]
    factors = None
    if case.adapters:
        rows = torch.randint(-1, len(ranks), lead, generator=generator, dtype=torch.int32)
        scales = [case.scale / (1 + i % 3) for i in range(len(ranks))]
        options.update(downs=downs, ups=ups, row_adapters=rows, scales=scales)
    elif ranks:
        options.update(down=downs[0], up=ups[0], scale=case.scale, activation=case.activation)
    if case.dropout_p:
        options.update(dropout_p=case.dropout_p, dropout_seed=torch.tensor([SEED]))
        factors = reference.dropout_factors(SEED, case.tokens, n_in, case.dropout_p)
    dy = normal(*lead, n_out)
    if case.delta:
        options["delta"] = random_delta(n_out, n_in, case.delta, case.delta_values, generator)
    return Inputs(x, weight, dy, options, factors)


def random_delta(n_out, n_in, share, dtype=torch.float32, generator=None) -> WeightDelta:
    """Places drawn alike, and values with which D x has about the size of x."""
    generator = generator or torch.Generator().manual_seed(0)
    n = round(share * n_out * n_in)
    places = torch.randperm(n_out * n_in, generator=generator)[:n]
    values = torch.randn(n, generator=generator) / max(share * n_in, 1) ** 0.5
    return WeightDelta.from_flat(places, values.to(dtype), n_out, n_in)


def with_dtypes(everywhere: dict, in_turn: dict) -> pytest.MarkDecorator:
    """Cases in each dtype, and those for which one dtype is as good as another, in turn."""
    pairs = {f"{n}-{dtype_name(d)}": (c, d) for n, c in everywhere.items() for d in DTYPES}
    for turn, (n, c) in enumerate(in_turn.items()):
        dtype = DTYPES[turn % 3]
        pairs[f"{n}-{dtype_name(dtype)}"] = c, dtype
    return pytest.mark.parametrize("case, dtype", pairs.values(), ids=pairs)


def move(value, device):
    """Tensors, packed weights and lists of tensors on a device; anything else as it is."""
    if isinstance(value, list):
        return [move(v, device) for v in value]
    has_tensors = isinstance(value, (torch.Tensor, PackedWeight, WeightDelta))
    return value.to(device) if has_tensors else value


def require(target, x, weight, **options):
    """Skip the test, with the reason, where this target cannot run the call."""
    if "downs" in options:
        options = {n: o for n, o in options.items() if n == "bias"}
    target.require("fused_linear", x, weight, **options)


def run(target, inputs: Inputs) -> torch.Tensor:
    """The public function by this target, or a skip with its reason."""
    x, weight = move(inputs.x, target.device), move(inputs.weight, target.device)
    options = {n: move(o, target.device) for n, o in inputs.options.items()}
    require(target, x, weight, **options)
    function = ops.multi_lora_linear if "downs" in options else ops.fused_linear
    return function(x, weight, impl=target.name, **options)


def with_gradients(function, inputs: Inputs, wanted=GRADIENTS, dy=None) -> Results:
    """`function(inputs)` forward and backward, and the gradients of the tensors named."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.named.items() if n in wanted}
    rest = {n: t for n, t in leaves.items() if n not in ("x", "weight")}
    if "delta" in rest:
        rest["delta"] = inputs.options["delta"].with_values(rest["delta"])
    live = replace(
        inputs, x=leaves.get("x", inputs.x), weight=leaves.get("weight", inputs.weight),
        options={**inputs.options, **rest},
    )  # fmt: skip
    y = function(live)
    dy = inputs.dy.to(y) if dy is None else dy
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return Results(y.detach(), dict(zip(leaves, grads, strict=True)))


def gradients(target, inputs: Inputs, wanted=GRADIENTS, dy=None) -> Results:
    inputs = replace(
        inputs, x=move(inputs.x, target.device), weight=move(inputs.weight, target.device),
        options={n: move(o, target.device) for n, o in inputs.options.items()},
    )  # fmt: skip
    return with_gradients(lambda live: run(target, live), inputs, wanted, dy)


def unfused(inputs: Inputs) -> torch.Tensor:
    """The layer as models write it out, in the dtype of x: a linear, then LoRA beside it."""
    x, o, linear = inputs.x, inputs.options, F.linear
    bias = o.get("bias")

    def cast(t):
        return t.to(x.dtype)

    weight = decoded(inputs.weight)
    if "delta" in o:
        weight = weight.to(torch.promote_types(x.dtype, torch.float32)) + o["delta"].dense()
    y = linear(x, cast(weight), None if bias is None else cast(bias))
    if o.get("out_scale") is not None:
        y = y * cast(o["out_scale"])
    dropped = x
    if inputs.factors is not None:
        factors = inputs.factors.view(x.shape)
        dropped = x * factors.to(torch.promote_types(x.dtype, torch.float32))
        dropped = dropped.to(x.dtype)
    if "downs" in o:
        for n, (down, up, scale) in enumerate(zip(o["downs"], o["ups"], o["scales"], strict=True)):
            mine = (o["row_adapters"] == n)[..., None]
            y = y + torch.where(mine, scale * linear(linear(x, cast(down)), cast(up)), 0.0)
        return y
    if o.get("down") is None:
        return y
    hidden = linear(dropped, cast(o["down"]))
    hidden = hidden.relu() if o["activation"] == "relu" else hidden
    return y + o["scale"] * linear(hidden, cast(o["up"]))


def by_reference(inputs: Inputs) -> torch.Tensor:
    """The room's reference on the tensors as they are: the truth, where they are float64."""
    o = inputs.options
    names = ("bias", "out_scale", "down", "up", "scale", "activation")
    options = {n: o[n] for n in names if n in o}
    if "delta" in o:
        options["delta"] = o["delta"].dense()
    if "downs" in o:
        ranks = torch.tensor([len(d) for d in o["downs"]])
        options |= dict(
            down=torch.cat(o["downs"]), up=torch.cat(o["ups"], dim=1),
            row_adapters=o["row_adapters"].reshape(-1),
            column_adapters=torch.arange(len(ranks)).repeat_interleave(ranks),
            column_scales=torch.tensor(o["scales"]).repeat_interleave(ranks),
        )  # fmt: skip
    x = inputs.x.reshape(inputs.dy.shape[:-1].numel(), inputs.x.shape[-1])
    y, _ = reference.fused_linear(x, inputs.weight, dropped=inputs.factors, **options)
    return y.view(inputs.dy.shape)


def _each(inputs: Inputs, change) -> Inputs:
    """The inputs with `change` applied to every floating tensor, the weight decoded exactly."""

    def to(value):
        if isinstance(value, list):
            return [to(v) for v in value]
        if isinstance(value, WeightDelta):
            return value.with_values(change(value.values))
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return change(value) if floating else value

    return Inputs(
        to(inputs.x), exactly_decoded(inputs.weight), to(inputs.dy),
        {n: to(o) for n, o in inputs.options.items()}, inputs.factors,
    )  # fmt: skip


def wide(inputs: Inputs) -> Inputs:
    """In float64, the adapters as they meet x: rounded to its dtype."""
    dtype = inputs.x.dtype
    exact = _each(inputs, torch.Tensor.double)

    def rounded(value):
        if isinstance(value, list):
            return [rounded(v) for v in value]
        return value.to(dtype).double()

    meet_x = {n: rounded(o) for n, o in inputs.options.items()
              if n in ("down", "up", "downs", "ups")}  # fmt: skip
    return replace(exact, options={**exact.options, **meet_x})


def magnitudes(inputs: Inputs) -> Inputs:
    """In float64, and nothing cancels: what bounds the rounding of float32 sums."""
    exact = _each(wide(inputs), torch.Tensor.abs)
    options = {
        n: [abs(v) for v in o] if n == "scales" else abs(o) if n == "scale" else o
        for n, o in exact.options.items()
    }
    return replace(exact, weight=summands(inputs.weight), options=options)


def wanted_of(inputs: Inputs) -> tuple:
    return tuple(inputs.named)


@lru_cache(maxsize=24)
def prepared(case: Case, dtype) -> Prepared:
    """With the results of the forward alone."""
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        stock = unfused(inputs)
        truth, terms = by_reference(wide(inputs)), by_reference(magnitudes(inputs))
    return Prepared(inputs, Results(stock), Results(truth), Results(terms))


@lru_cache(maxsize=24)
def prepared_gradients(case: Case, dtype) -> Prepared:
    """With y and the gradients of every tensor that has one."""
    inputs = make_inputs(case, dtype)
    names = wanted_of(inputs)
    stock = with_gradients(unfused, inputs, names)
    truth = with_gradients(by_reference, wide(inputs), names)
    terms = with_gradients(by_reference, magnitudes(inputs), names)
    return Prepared(inputs, stock, truth, terms)


def assert_accurate(ours: Results, case: Prepared, names=None):
    """The error-ratio rule for each result, or for each of those named."""
    for name, result in ours.items():
        if names is None or name in names:
            assert_errs_at_most_twice_stock(
                name, result, *(dict(r.items())[name] for r in (case.stock, case.truth, case.terms))
            )


def with_row_scale(weight: PackedWeight, row: int, value: float) -> PackedWeight:
    """The weight with one output row's scales replaced; not for nested ones."""
    scales = weight.scales.clone()
    scales[row // 16, :, row % 16] = value
    return replace(weight, scales=scales)
