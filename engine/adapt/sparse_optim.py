"""Optimizers of sparse deltas, whose values come and go."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.ops import SM3, AdamW, Cells, Regrowth


class DeltaAdamW(AdamW):
    """AdamW in which each value counts its own steps, as values come at different times.

    params         (N,) parameters, of float32 or bfloat16; moments are float32, ages int32
    lr             0 or more
    betas          b1 and b2
    eps            more than 0
    weight_decay   towards the weight without its delta
    options        clip_norm, narrow ("nearest" or "stochastic"), seed, maximize and impl of `AdamW`

    Source: Loshchilov and Hutter, arXiv 1711.05101; ages: Ansell et al., arXiv 2401.16405.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        _expect_eps("DeltaAdamW", eps)
        for name in options:  # what `carry` could not move with the values
            if name in ("only", "ages", "state_bits") or options[name] == "master":
                raise ValueError(
                    f"DeltaAdamW: {name} is {options[name]!r}, need it left out: values come and go"
                )
        super().__init__(params, lr, betas, eps, weight_decay, ages=True, **options)

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


class DeltaSM3(SM3):
    """SM3 over a delta: O + I numbers of state for N values, which new ones need not be given.

    layers         whose delta_values train; their places are read at each step
    lr             0 or more; about 100 times Adam's
    eps            more than 0
    weight_decay   towards the weight without its delta
    options        clip_norm, maximize and impl of `SM3`

    Source: Anil et al., arXiv 1901.11150; Ansell et al., arXiv 2401.16405, section 3.2.
    """

    _OWN = (*SM3._OWN, "_layers")

    def __init__(self, layers, lr=1e-3, eps=1e-8, weight_decay=0.0, **options):
        _expect_eps("DeltaSM3", eps)
        if "only" in options:
            raise ValueError("DeltaSM3: only is given, need it left out: deltas say what trains")
        self._layers = {layer.delta_values: layer for layer in layers}
        super().__init__(list(self._layers), lr, eps, weight_decay, **options)

    def _cells(self, p: torch.Tensor) -> Cells:
        delta = self._layers[p].delta.short()
        n_out, n_in = delta.shape
        return Cells(n_out, n_in, delta.row_offsets, delta.columns, is_compact=True)

    def extremes(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(O,) and (I,) float32 of a parameter."""
        return self._extremes(p, Cells(*self._layers[p].delta.shape))


def _expect_eps(name: str, eps: float) -> None:
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"{name}: eps is {eps}, need more than 0")
