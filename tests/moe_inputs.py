"""Inputs, stock results and the truth of the tests of moe_mlp.

A `Case` describes a call; `prepared(case, dtype)` holds its inputs, what an expert by expert loop
in stock torch makes of them, and what float64 makes of them.
"""

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops
from tilewright.ops.moe import reference
from tilewright.ops.moe.problem import ALONE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = ("x", "gates", "gate_up", "down", "gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Case:
    """A call of moe_mlp.

    routing   "even": distinct experts, drawn alike; "one": all slots to expert 1; "repeated":
              experts drawn with repetition; "nowhere": some ids are -1 or E, one token has no
              expert, and one expert no token; "sparse": a few experts have all tokens
    """

    tokens: int
    slots: int
    experts: int
    features: int
    width: int
    activation: str = "swiglu"
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    scale_input: bool = False
    routing: str = "even"
    ids_dtype: torch.dtype = torch.int64
    gates_dtype: torch.dtype = torch.float32

    def but(self, **changes) -> "Case":
        return replace(self, **changes)

    @property
    def rule(self) -> dict:
        return dict(
            activation=self.activation, interleaved=self.interleaved, transposed=self.transposed,
            scale_input=self.scale_input, alpha=1.702, limit=1.5,
        )  # fmt: skip


def make_ids(case: Case, generator) -> torch.Tensor:
    shape = case.tokens, case.slots
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        ids = torch.full(shape, min(1, case.experts - 1))
    elif case.routing == "repeated":
        ids = torch.randint(0, case.experts, shape, generator=generator)
    else:
        if case.routing == "sparse":
            scores[:, case.slots + 1 :] -= 1
        ids = scores.topk(case.slots, dim=-1).indices
    if case.routing == "nowhere":
        outside = torch.rand(shape, generator=generator) < 0.3
        ids = torch.where(outside, torch.where(ids % 2 == 0, -1, case.experts), ids)
        ids[ids == 2] = -1
        ids[:1] = case.experts + 5
    return ids.to(case.ids_dtype)


def make_inputs(case: Case, dtype) -> dict:
    """The tensors of a call, by the names of its arguments, and dy."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((case, dtype)).encode()))

    def normal(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(dtype)

    e, h, i = case.experts, case.features, case.width
    lines = i if case.activation in ALONE else 2 * i
    gate_up = normal(e, lines, h, size=h**-0.5)
    down = normal(e, h, i, size=i**-0.5)
    if case.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    # of either sign, and one exactly 0
    gates = torch.randn(case.tokens, case.slots, generator=generator).to(case.gates_dtype)
    gates[:1, :1] = 0
    inputs = dict(
        x=normal(case.tokens, h), ids=make_ids(case, generator), gates=gates, gate_up=gate_up,
        down=down, dy=normal(case.tokens, h),
    )  # fmt: skip
    if case.bias:
        inputs["gate_up_bias"] = normal(e, lines, size=0.5)
        inputs["down_bias"] = normal(e, h, size=0.5)
    return inputs


def low_rank(row, lora, e, experts):
    """scale B (A row) of expert e; 0 without an update. lora as moe_mlp takes it, flat."""
    if lora is None:
        return 0
    a, b, scale = lora
    a = (a if a.dim() == 3 else a.unflatten(0, (experts, -1)))[e].to(row.dtype)
    b = b[e] if b.dim() == 3 else b.unflatten(1, (-1, experts))[:, :, e]
    return scale * F.linear(F.linear(row, a), b.to(row.dtype))


def loop(
    x, ids, gates, gate_up, down, gate_up_bias=None, down_bias=None, gate_up_lora=None,
    down_lora=None, *, case: Case,
):  # fmt: skip
    """Expert by expert in the dtype of x, as models write it out."""
    if case.transposed:
        gate_up, down = gate_up.mT, down.mT
    y = torch.zeros_like(x)
    for e in range(case.experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate = gates[token, slot][:, None]
        row = x[token]
        if case.scale_input:
            row = (row * gate).to(x.dtype)
        z = F.linear(row, gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        z = z + low_rank(row, gate_up_lora, e, case.experts)
        if case.activation in ALONE:
            gate_z, up = z, 1
        else:
            gate_z, up = (z[:, 0::2], z[:, 1::2]) if case.interleaved else z.chunk(2, dim=1)
        if case.activation in ("swiglu", "silu"):
            a = F.silu(gate_z) * up
        elif case.activation in ("reglu", "relu"):
            a = F.relu(gate_z) * up
        elif case.activation in ("geglu", "gelu"):
            a = F.gelu(gate_z) * up
        elif case.activation in ("geglu_tanh", "gelu_tanh"):
            a = F.gelu(gate_z, approximate="tanh") * up
        else:
            gate_z, up = gate_z.clamp(max=1.5), up.clamp(-1.5, 1.5)
            a = gate_z * torch.sigmoid(1.702 * gate_z) * (up + 1)
        out = F.linear(a, down[e], None if down_bias is None else down_bias[e])
        out = out + low_rank(a, down_lora, e, case.experts)
        y = y.index_add(0, token, (out if case.scale_input else out * gate).to(x.dtype))
    return y


def with_gradients(function, inputs: dict, wanted=GRADIENTS, dy=None) -> dict:
    """y, and the gradients of the tensors named, by name."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items() if n in wanted}
    call = {n: leaves.get(n, t) for n, t in inputs.items() if n != "dy"}
    y = function(**call)
    dy = inputs["dy"].to(y) if dy is None else dy
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def by_loop(case: Case):
    return lambda **call: loop(**call, case=case)


def by_reference(case: Case):
    return lambda **call: reference.moe_mlp(**call, **case.rule)


def ours(case: Case, impl: str = "auto"):
    return lambda **call: ops.moe_mlp(**call, **case.rule, impl=impl)


def terms_of(case: Case, exact: dict) -> dict:
    """For each result the sum of the magnitudes of what is summed up, from float64 inputs."""
    x, ids, gates, dy = (exact[n] for n in ("x", "ids", "gates", "dy"))
    w1, w2 = ((exact[n].mT if case.transposed else exact[n]) for n in ("gate_up", "down"))
    b1, b2 = (exact.get(n) for n in ("gate_up_bias", "down_bias"))
    rule = {n: v for n, v in case.rule.items() if n not in ("transposed", "scale_input")}
    t = {n: torch.zeros_like(v) for n, v in exact.items() if n in GRADIENTS}
    t["gate_up"], t["down"], t["y"] = torch.zeros_like(w1), torch.zeros_like(w2), x * 0
    for e in range(case.experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate = gates[token, slot][:, None]
        before, after = (gate, torch.ones_like(gate))[:: 1 if case.scale_input else -1]
        row = x[token] * before
        z = (row @ w1[e].T + (0 if b1 is None else b1[e])).requires_grad_()
        a = reference.gated(z, **rule)
        out = dy[token] * after
        (dz,) = torch.autograd.grad(a, z, out @ w2[e])
        a, dz, z = a.detach(), dz.abs(), z.detach()
        y = a.abs() @ w2[e].abs().T + (0 if b2 is None else b2[e].abs())
        t["y"].index_add_(0, token, y * after.abs())
        t["x"].index_add_(0, token, dz @ w1[e].abs() * before.abs())
        dot = dz @ w1[e].abs() * x[token].abs() if case.scale_input else dy[token].abs() * y
        t["gates"][token, slot] = dot.sum(1)
        t["gate_up"][e] = dz.T @ row.abs()
        t["down"][e] = out.abs().T @ a.abs()
        if b1 is not None:
            t["gate_up_bias"][e], t["down_bias"][e] = dz.sum(0), out.abs().sum(0)
    if case.transposed:
        t["gate_up"], t["down"] = t["gate_up"].mT, t["down"].mT
    return t


@dataclass(frozen=True)
class Prepared:
    """terms: for each result the sums of the magnitudes of what is summed up in float32."""

    inputs: dict
    stock: dict
    truth: dict
    terms: dict


@lru_cache(maxsize=4)
def prepared(case: Case, dtype) -> Prepared:
    inputs = make_inputs(case, dtype)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    stock = with_gradients(by_loop(case), inputs)
    truth = with_gradients(by_reference(case), exact)
    return Prepared(inputs, stock, truth, terms_of(case, exact))


def run(target, case: Case, inputs: dict, gradients=()) -> dict:
    """y and gradients by this target on the CPU, or a skip with its reason."""
    inputs = {n: t if t is None else t.to(target.device) for n, t in inputs.items()}
    call = {n: t for n, t in inputs.items() if n != "dy"}
    target.require("moe_mlp", **call, **case.rule)
    if gradients:
        found = with_gradients(ours(case, target.name), inputs, gradients)
    else:
        found = {"y": ours(case, target.name)(**call)}
    return {n: t.cpu() for n, t in found.items()}


def judge(name: str, got: dict, p: Prepared) -> None:
    for part, value in got.items():
        assert_errs_at_most_twice_stock(
            f"{name} {part}",
            value,
            p.stock[part].to(value.dtype),
            p.truth[part],
            p.terms[part],
        )
