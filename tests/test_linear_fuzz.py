"""Random calls whose answer is known exactly: whole numbers, three quarters of them 0.

Every product and sum is a whole number that float32 and each rounding on the way hold exactly, so
that results, forward and backward, must be the truth rounded once, and a misplaced row, column,
group or adapter shows. A failure names the seed that makes the call again: `call(seed)`.
"""

import random
from dataclasses import replace

import pytest
import torch
from linear_inputs import (
    DENSE,
    GRADIENTS,
    Case,
    Inputs,
    by_reference,
    gradients,
    random_codes,
    with_gradients,
)

from tilewright.ops.common.packed import (
    FORMATS,
    NestedScales,
    PackedWeight,
    code_values,
    decode,
    pack_codes,
    pack_rows,
)
from tilewright.ops.linear import reference

SEEDS = 40  # of each implementation in the usual run
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 129)
WIDE = (255, 256, 257, 511, 512, 513, 530)
# codes of value 0 and of small whole numbers, times a power of two
SMALL = {
    "int4": (-2, -1, 1, 2), "uint4": (1, 2, 3, 4), "nf4": (-1, 1), "e2m1": (-2, -1, 1, 2, 4),
    "fp4": (-1, 1), "int8": (-3, -1, 1, 2), "fp8": (-4, -2, -1, 1, 2),
}  # fmt: skip


def extent(pick: random.Random) -> int:
    """Mostly at the edge of a tile; now and then past a chunk or a panel."""
    draw = pick.random()
    return pick.choice(EDGES) if draw < 0.6 else pick.randint(1, 80) if draw < 0.9 else \
        pick.choice(WIDE)  # fmt: skip


def sparse(generator, *shape, most=2, share=0.25):
    """Whole numbers up to `most` of either sign, this share of them not 0."""
    values = torch.randint(1, most + 1, shape, generator=generator).float()
    sign = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
    return values * sign * (torch.rand(shape, generator=generator) < share)


def whole_packed(pick, generator, case: Case) -> PackedWeight:
    """A weight of whole numbers, about 75 % of them 0, however its codes and scales say so."""
    n_out, n_in, format = case.n_out, case.n_in, case.format
    everything = random_codes(format, 1, 1, generator).new_tensor(
        list(range(256 if FORMATS[format].bits == 8 else 16))
    )
    values = code_values(everything, format)
    zero = everything[values == 0][0]
    usable = everything[torch.isin(values, torch.tensor(SMALL[format], dtype=torch.float32))]
    shape = (n_out, n_in)
    codes = usable[torch.randint(0, len(usable), shape, generator=generator)]
    codes = torch.where(torch.rand(shape, generator=generator) < 0.25, codes, zero)
    group = case.group or n_in
    groups = -(-n_in // group)
    exponents = torch.randint(0, 2, (n_out, groups), generator=generator)
    nested, offsets = None, None
    if case.scales == "nested":
        table = torch.zeros(256)
        table[:2] = torch.tensor([0.0, 1.0])  # scale = table * absmax + 1, or its negative
        block = pick.choice((1, 3, 64))
        count = -(-n_out * groups // block)
        nested = NestedScales(table, torch.ones(count), 1.0, block)
        scales, kept = exponents.to(torch.uint8), torch.float32
    else:
        sign = 1 - 2 * torch.randint(0, 2, (n_out, groups), generator=generator)
        scales, kept = (sign * 2.0**exponents).to(case.scales), case.scales
    if case.offsets:
        offsets = pack_rows(sparse(generator, n_out, groups, most=1).to(kept))
    order = torch.randperm(n_in, generator=generator).int() if case.act_order else None
    return PackedWeight(format, n_out, n_in, group, pack_codes(codes, format), pack_rows(scales),
                        offsets, order, nested)  # fmt: skip


def call(seed: int) -> tuple[Case, Inputs]:
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = pick.choice((torch.float32, torch.bfloat16, torch.float16))
    tokens, n_in, n_out = extent(pick), extent(pick), extent(pick)
    while tokens * n_in * n_out > 3e6:  # the slowest level has to do it as well
        tokens, n_in, n_out = extent(pick), extent(pick), extent(pick)
    format = pick.choice((DENSE, DENSE, *FORMATS))
    adapters = tuple(pick.randint(1, 20) for _ in range(pick.randint(1, 4)))
    has_rank = pick.random() < 0.7
    mixed = has_rank and pick.random() < 0.3
    case = Case(
        tokens, n_in, n_out, pick.choice((1, 2, 5, 16, 17, 33)) if has_rank and not mixed else 0,
        format, pick.choice((0, 8, 16, 32, 64)),
        pick.choice((torch.float32, torch.float16, torch.bfloat16, "nested")),
        pick.random() < 0.3, pick.random() < 0.3, pick.random() < 0.5,
        not mixed and pick.random() < 0.3, pick.choice((1.0, -2.0, 0.5)),
        pick.choice(("none", "relu")),
        0.5 if has_rank and not mixed and pick.random() < 0.4 else 0.0,
        adapters=adapters if mixed else (),
    )  # fmt: skip
    x = sparse(generator, tokens, n_in).to(dtype)
    dy = sparse(generator, tokens, n_out, most=1).to(dtype)
    if format == DENSE:
        weight = sparse(generator, n_out, n_in).to(dtype)
    else:
        weight = whole_packed(pick, generator, case)
    options: dict = {}
    if case.bias:
        options["bias"] = sparse(generator, n_out).to(dtype)
    if case.out_scale:
        options["out_scale"] = sparse(generator, n_out, most=1).to(dtype)

    def adapter(rank):  # few terms, so that hidden values are whole numbers below 256
        down = sparse(generator, rank, n_in, most=1, share=0.1)
        return down.to(dtype), sparse(generator, n_out, rank, most=1, share=0.1).to(dtype)

    if mixed:
        pairs = [adapter(rank) for rank in adapters]
        options.update(
            downs=[d for d, _ in pairs], ups=[u for _, u in pairs],
            scales=[pick.choice((1.0, 2.0, -1.0)) for _ in pairs],
            row_adapters=torch.randint(-1, len(pairs), (tokens,), generator=generator,
                                       dtype=torch.int32),
        )  # fmt: skip
    elif case.rank:
        down, up = adapter(case.rank)
        options.update(down=down, up=up, scale=case.scale, activation=case.activation)
    factors = None
    if case.dropout_p:
        drawn = pick.getrandbits(64) - 2**63
        options.update(dropout_p=0.5, dropout_seed=torch.tensor([drawn]))
        factors = reference.dropout_factors(drawn, tokens, n_in, 0.5)
    return case, Inputs(x, weight, dy, options, factors)


def check(target, seed: int):
    case, inputs = call(seed)
    low = inputs.x.dtype != torch.float32
    # the gradient of out_scale rounds the base product by itself
    names = [n for n in GRADIENTS if n in inputs.named and not (low and n == "out_scale")]
    exact = replace(
        inputs, x=inputs.x.double(),
        weight=(decode(inputs.weight) if case.format != DENSE else inputs.weight).double(),
    )  # fmt: skip
    truth = dict(with_gradients(by_reference, exact, names).items())
    for name, result in gradients(target, inputs, names).items():
        rounded, result = truth[name].to(result.dtype), result.cpu()
        if not torch.equal(result, rounded):
            off = (result.double() - rounded.double()).abs()
            places = off.nonzero().tolist()
            pytest.fail(
                f"call({seed}): {name} is off by {off.max().item()} at {len(places)} of "
                f"{off.numel()} places, the first {places[:3]}: {case}"
            )


@pytest.mark.parametrize("batch", range(4))
def test_random_calls(impl, batch):
    for seed in range(batch * SEEDS // 4, (batch + 1) * SEEDS // 4):
        check(impl, seed)
