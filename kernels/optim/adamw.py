"""AdamW as a torch optimizer: what it keeps for which parameter, and the calls of the operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tilewright.ops.optim import op
from tilewright.ops.optim.api import expect_adamw_options
from tilewright.ops.optim.base import FusedOptimizer, carried, local
from tilewright.ops.optim.problem import NEAREST, STATE_BLOCK, STOCHASTIC

MASTER = "master"
NARROW = (NEAREST, STOCHASTIC, MASTER)


class AdamW(FusedOptimizer):
    """AdamW in one pass over memory, over whole parameters or some of their entries.

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      age = age + 1
        p = p (1 - lr decay) - lr (m / (1 - b1^age)) / (sqrt(v / (1 - b2^age)) + eps)

    params        parameters, or groups of them with their own lr, betas, eps, weight_decay
    lr            0 or more
    betas         b1 and b2, from 0 to below 1
    eps           0 or more
    weight_decay  decoupled from the gradient, as torch.optim.AdamW's
    clip_norm     gradients of all groups together are scaled down to this norm as they are read,
                  none is written; `last_norm` is the norm before that. math.inf: the norm is
                  measured and nothing clipped; None: it is not measured either
    only          parameter -> what of it trains: a bool mask of its shape, or (N,) distinct places
                  in the flattened parameter. State is kept for these alone, and each counts its
                  own age, so that `restrict` can change them later
    ages          True: each entry of every parameter counts its own age
    narrow        what parameters of 16 bits take of a step: "nearest"; "stochastic" (bfloat16),
                  rounded at random so that the mean is exact; or "master", the rounding of a
                  float32 copy that is kept
    state_bits    32, or 8: m and v as numbers of 8 bits over a scale for each 256 entries
    seed          of "stochastic"
    maximize      go up the gradient
    impl          "auto", "reference", "cpp_cpu" or "triton_gpu"

    States are float32 whatever the parameter. The state dict is that of torch.optim.AdamW (step,
    exp_avg, exp_avg_sq) unless only, ages, "master" or 8 bits add to it, and either loads the
    other's. Sharded parameters (DTensor) are updated shard by shard, and the norm is that of the
    whole. Under a GradScaler gradients are unscaled as they are read. Where the norm is not finite,
    or the scaler found an infinity, nothing is changed.
    ValueError: an option outside the above; a gradient that is sparse.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv 1711.05101; ages:
    Ansell et al., arXiv 2401.16405; 8 bits over blocks: Dettmers et al., arXiv 2110.02861.
    """

    _OWN = (*FusedOptimizer._OWN, "_ages", "_narrow", "state_bits", "_seed")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip_norm: float | None = None,
        only: Mapping[torch.Tensor, torch.Tensor] | None = None,
        ages: bool = False,
        narrow: str = NEAREST,
        state_bits: int = 32,
        seed: int = 0,
        maximize: bool = False,
        impl: str = "auto",
    ):
        name = type(self).__name__
        expect_adamw_options(name, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if narrow not in NARROW:
            raise ValueError(f"{name}: no narrow {narrow!r}. Known: {', '.join(NARROW)}")
        if state_bits not in (8, 32):
            raise ValueError(f"{name}: state_bits is {state_bits}, need 8 or 32")
        self._ages, self._narrow, self.state_bits, self._seed = ages, narrow, state_bits, seed
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, clip_norm=clip_norm, only=only, impl=impl)

    # --- state ---

    def _begin(self, p: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        state = self.state[p]
        if state:
            return state
        places = self._places.get(p)
        like = p.detach() if places is None else local(p).new_empty(0)
        shape = like.shape if places is None else places.shape
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32

        def zeros(dtype):
            if places is None:  # in the sharding of the parameter
                return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
            return torch.zeros(shape, dtype=dtype, device=like.device)

        if places is not None:
            state["places"] = places
        if self._ages or places is not None:
            state["age"] = zeros(torch.int32)
        else:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(p).device)
        if self.state_bits == 8:
            n_blocks = -(-local(zeros(torch.uint8)).numel() // STATE_BLOCK)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = zeros(torch.uint8)
                state[name + "_scale"] = torch.zeros(n_blocks, device=local(p).device)
        else:
            state["exp_avg"], state["exp_avg_sq"] = zeros(wide), zeros(wide)
        if self._narrow == MASTER and p.dtype in (torch.bfloat16, torch.float16):
            flat = local(p).detach().reshape(-1)
            chosen = like if places is None else flat[places.long()]
            state["master"] = chosen.float().contiguous()
        return state

    def restrict(self, p: torch.Tensor, chosen: torch.Tensor) -> None:
        """Train other entries of a parameter from now on: a mask or places, as in `only`.

        Entries that go on training keep their state, new ones begin with none and age 0.
        """
        if self.state_bits == 8 and self.state.get(p):
            raise ValueError(
                f"{self._name}: restrict cannot move states in 8 bits, need state_bits 32"
            )
        places = self._as_places(p, chosen)
        state = self.state.get(p)
        if state:
            if "places" in state:
                old = state["places"]
            else:
                old = torch.arange(p.numel(), dtype=places.dtype, device=places.device)
            self._grow_old_alike(p, state)
            for name in ("exp_avg", "exp_avg_sq", "age"):
                state[name] = carried(old, places, state[name].reshape(-1))
            if "master" in state:
                exact = p.detach().reshape(-1).float()
                exact[old.long()] = state["master"].reshape(-1)
                state["master"] = exact[places.long()]
            state["places"] = places
        self._places[p] = places

    @staticmethod
    def _grow_old_alike(p: torch.Tensor, state: dict[str, Any]) -> None:
        """One step count for all entries becomes a count for each."""
        if "step" in state:
            step = int(state.pop("step"))
            state["age"] = torch.full_like(state["exp_avg"], step, dtype=torch.int32)

    def _adopt(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        is_coded = state["exp_avg"].dtype == torch.uint8
        if is_coded != (self.state_bits == 8):
            raise ValueError(
                f"{self._name}: the state dict holds states of {8 if is_coded else 32} bits, need "
                f"{self.state_bits} as in state_bits"
            )
        if "step" in state:  # torch's older state dicts have a plain number
            step = torch.as_tensor(state["step"], dtype=torch.float32).reshape(())
            state["step"] = step.to(local(p).device, copy=True)
        if not is_coded:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(wide).contiguous()
        if self._ages:
            self._grow_old_alike(p, state)

    # --- the step ---

    def _key(self, p: torch.Tensor) -> int:
        """Of a parameter's random numbers: the same in every run, another for each parameter."""
        if not hasattr(self, "_numbers"):
            ordered = (q for group in self.param_groups for q in group["params"])
            self._numbers = {q: i for i, q in enumerate(ordered)}
        if p not in self._numbers:
            self._numbers[p] = len(self._numbers)
        return (self._seed * 0x9E3779B1 + self._numbers[p] * 0x85EBCA77 + 1) & 0xFFFFFFFF

    def _update(self, group, parameters, gradients, scale) -> None:
        kinds: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for p, g in zip(parameters, gradients, strict=True):
            state = self._begin(p)
            kind = (p.dtype, g.device, "places" in state, "master" in state)
            kinds.setdefault(kind, []).append((p, g))
        beta1, beta2 = group["betas"]
        for (dtype, device, has_places, has_master), pairs in kinds.items():
            states = [self.state[p] for p, _ in pairs]

            def each(name, states=states):
                return [local(state[name]) for state in states]

            is_stochastic = self._narrow == STOCHASTIC and dtype == torch.bfloat16
            op.call_adamw(
                [local(p).detach() for p, _ in pairs], [g for _, g in pairs], each("exp_avg"),
                each("exp_avg_sq"), [local(s["age"] if "age" in s else s["step"]) for s in states],
                each("places") if has_places else [], each("master") if has_master else [],
                each("exp_avg_scale") if self.state_bits == 8 else [],
                each("exp_avg_sq_scale") if self.state_bits == 8 else [],
                None if scale is None else scale.to(device), float(group["lr"]), float(beta1),
                float(beta2), float(group["eps"]), float(group["weight_decay"]),
                STOCHASTIC if is_stochastic else NEAREST, [self._key(p) for p, _ in pairs],
                self.impl,
            )  # fmt: skip
