"""Optimizers of sparse deltas, whose values come and go."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.ops import Regrowth


class DeltaAdamW(torch.optim.Optimizer):
    """AdamW in which each value counts its own steps, as values come at different times.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        age = age + 1
        value = value (1 - lr decay) - lr (m / (1 - b1^age)) / (sqrt(v / (1 - b2^age)) + eps)

    params         (N,) parameters, of float32 or bfloat16; moments are float32, ages int32
    lr             0 or more
    betas          b1 and b2
    eps            more than 0
    weight_decay   towards the weight without its delta

    Source: Loshchilov and Hutter, arXiv 1711.05101; ages: Ansell et al., arXiv 2401.16405.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        _expect_options("DeltaAdamW", lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"DeltaAdamW: betas are {betas}, need 0 <= beta < 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = _loss(closure)
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad.float()
                if not state:
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(g)
                    state["age"] = torch.zeros_like(g, dtype=torch.int32)
                m, v, age = (state[n] for n in ("exp_avg", "exp_avg_sq", "age"))
                age += 1
                m.lerp_(g, 1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                ages = age.double()  # 1 - 0.999^1 in float32 is off by 1e-5
                first, second = (1 - b1**ages).float(), (1 - b2**ages).float()
                change = (m / first) / ((v / second).sqrt() + group["eps"])
                value = p.float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change
                p.copy_(value)
        return loss

    @torch.no_grad()
    def carry(self, p: torch.Tensor, regrown: Regrowth, watch: Any, betas=None) -> None:
        """Move the state with the values, after `regrow_by_gradient` over a watch's candidates.

        A new value begins as if Adam had seen its mean gradient in each of the watched steps, so
        that with a constant gradient its first step is lr.
        """
        state = self.state.get(p)
        if not state:
            return
        b1, b2 = next(g["betas"] for g in self.param_groups if any(q is p for q in g["params"]))
        n = max(watch.steps, 1)
        seeds = {
            "exp_avg": watch.sums / n * (1 - b1**n),
            "exp_avg_sq": watch.squares / n * (1 - b2**n),
            "age": n,
        }
        for name, seed in seeds.items():
            state[name].copy_(regrown.carry(state[name], seed))


class DeltaSM3(torch.optim.Optimizer):
    """SM3 over a delta: O + I numbers of state for N values, which new ones need not be given.

        s = min(row[o], column[i]) + g^2       row[o] = max over its values of s, column[i] likewise
        value = value (1 - lr decay) - lr g / sqrt(s + eps)

    layers         whose delta_values train; their places are read at each step
    lr             0 or more; about 100 times Adam's
    eps            more than 0
    weight_decay   towards the weight without its delta

    Source: Anil et al., arXiv 1901.11150; Ansell et al., arXiv 2401.16405, section 3.2.
    """

    def __init__(self, layers, lr=1e-3, eps=1e-8, weight_decay=0.0):
        _expect_options("DeltaSM3", lr=lr, eps=eps, weight_decay=weight_decay)
        self._layers = {layer.delta_values: layer for layer in layers}
        super().__init__(list(self._layers), dict(lr=lr, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = _loss(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                delta, g = self._layers[p].delta, p.grad.float()
                row, column = self.extremes(p)
                o, i = delta.rows(), delta.wide_columns()
                s = torch.minimum(row[o], column[i]).addcmul_(g, g)
                row.scatter_reduce_(0, o, s, "amax")
                column.scatter_reduce_(0, i, s, "amax")
                value = p.float() * (1 - group["lr"] * group["weight_decay"])
                p.copy_(value - group["lr"] * g / (s + group["eps"]).sqrt())
        return loss

    def extremes(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(O,) and (I,) float32 of a parameter."""
        state = self.state[p]
        if not state:
            n_out, n_in = self._layers[p].delta.shape
            state["row"] = torch.zeros(n_out, device=p.device)
            state["column"] = torch.zeros(n_in, device=p.device)
        return state["row"], state["column"]


def _loss(closure):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _expect_options(name: str, *, lr: float, eps: float, weight_decay: float) -> None:
    if not 0.0 <= lr < float("inf"):
        raise ValueError(f"{name}: lr is {lr}, need 0 or more")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"{name}: eps is {eps}, need more than 0")
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(f"{name}: weight_decay is {weight_decay}, need 0 or more")
