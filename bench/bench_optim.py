"""An optimizer's step: bound by memory. P parameters of N entries each.

Each variant has parameters and an optimizer of its own, and a call is one more step of them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

import tilewright
from tilewright.bench.variant import Variant

GRADIENTS = ()
STEP = dict(dtypes=("float32",), modes=("fwd",))
OPTIONS: dict[str, Any] = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)

CASES: dict[str, dict] = {
    "adamw-64M": dict(P=16, N=1 << 22, **STEP),
    "adamw-64M-bf16": dict(P=16, N=1 << 22, dtypes=("bf16",), modes=("fwd",)),
    "adamw-64M-clip": dict(P=16, N=1 << 22, clip=1.0, **STEP),
    "adamw-16M-ages": dict(P=4, N=1 << 22, ages=True, **STEP),
    "adamw-64M-8bit": dict(P=16, N=1 << 22, bits=8, **STEP),
    "sm3-64M": dict(P=16, N=1 << 22, kind="sm3", **STEP),
    "adamw-small": dict(P=200, N=2048, **STEP),
}


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case["P"], case["N"])
    return {
        name: (torch.randn(shape, generator=generator, device=device) * size).to(dtype)
        for name, size in (("parameters", 1e-3), ("gradients", 0.01))
    }


def small(case: dict) -> dict:
    return {**case, "P": 3, "N": min(case["N"], 20000)}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: about fifteen an entry. Bytes: p, m, v read and written, g read, once each."""
    n = float(case["P"] * case["N"])
    if case.get("kind") == "sm3":
        return 8 * n, 3 * itemsize * n
    state = 2 if case.get("bits") == 8 else 8
    age = 8 if case.get("ages") else 0
    norm = itemsize if case.get("clip") else 0
    return 15 * n, n * (3 * itemsize + 2 * state + age + norm)


def _parameters(inputs: dict) -> list[nn.Parameter]:
    shape = (-1, 2048) if inputs["parameters"].shape[1] % 2048 == 0 else (-1,)
    own = [nn.Parameter(p.reshape(shape).clone()) for p in inputs["parameters"]]
    for p, g in zip(own, inputs["gradients"], strict=True):
        p.grad = g.reshape(shape)
    return own


class _PlainSM3(torch.optim.Optimizer):
    """The formula, tensor by tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, q = self.state[p], p.view(-1, p.shape[-1])
                g = p.grad.view(q.shape)
                row = state.get("row", q.new_zeros(len(q), 1))
                column = state.get("column", q.new_zeros(1, q.shape[1]))
                s = torch.minimum(row, column).addcmul_(g, g)
                state["row"] = torch.maximum(row, s.amax(1, keepdim=True))
                state["column"] = torch.maximum(column, s.amax(0, keepdim=True))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                q.addcdiv_(g, s.add_(1e-8).sqrt_(), value=-group["lr"])


_SM3: dict[str, Any] = dict(lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])


def _ours(case: dict, own: list[nn.Parameter], impl: str = "auto") -> torch.optim.Optimizer:
    if case.get("kind") == "sm3":
        return tilewright.SM3(own, **_SM3, impl=impl)
    return tilewright.AdamW(
        own, **OPTIONS, clip_norm=case.get("clip"), ages=bool(case.get("ages")),
        state_bits=case.get("bits", 32), impl=impl,
    )  # fmt: skip


def _torch(how: str):
    def make(case: dict, own: list[nn.Parameter]) -> torch.optim.Optimizer:
        if case.get("kind") == "sm3":
            return _PlainSM3(own, _SM3)
        chosen: dict[str, Any] = {how: True} if how else {}
        return torch.optim.AdamW(own, **OPTIONS, **chosen)

    return make


def _is_adamw(case: dict) -> bool:
    return "kind" not in case


def _is_sm3(case: dict) -> bool:
    return not _is_adamw(case)


def _bitsandbytes(case: dict, own: list[nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if case.get("bits") == 8 else bitsandbytes.optim.AdamW
    return kind(own, **OPTIONS)


def _variant(make, **options) -> Variant:
    """Each has parameters and an optimizer of its own; a call is one more step of them."""

    def prepare(case: dict, inputs: dict) -> dict:
        own = _parameters(inputs)
        return {"own": own, "optimizer": make(case, own)}

    return Variant(_step, prepare=prepare, **options)


def _step(case: dict, own: list[nn.Parameter], optimizer) -> torch.Tensor:
    if case.get("clip") and not isinstance(optimizer, tilewright.AdamW):
        nn.utils.clip_grad_norm_(own, case["clip"])
    optimizer.step()
    return own[0].detach()


def stock(case: dict, **inputs) -> torch.Tensor:
    """The first parameter after one step of torch's own."""
    own = _parameters({name: t.clone() for name, t in inputs.items()})
    return _step(case, own, _torch("")(case, own))


truth = stock


def _bitsandbytes_missing() -> str | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return "needs bitsandbytes: pip install bitsandbytes"
    return None


VARIANTS = {
    "tilewright": _variant(_ours),
    "torch": _variant(_torch(""), applies=_is_sm3),
    "torch fused": _variant(_torch("fused"), applies=_is_adamw),
    "torch foreach": _variant(_torch("foreach"), applies=_is_adamw),
    "bitsandbytes": _variant(_bitsandbytes, applies=_is_adamw, why_not=_bitsandbytes_missing),
}
