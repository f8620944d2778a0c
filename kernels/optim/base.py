"""What the optimizers share: gradients, their norm and scale, chosen entries, state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from tilewright.ops.optim import op
from tilewright.ops.optim.api import DTYPES

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_sharded(t: torch.Tensor) -> bool:
    # a DTensor, whose module is slow to import; so is asking a plain tensor for what it lacks
    return type(t) not in _PLAIN and hasattr(t, "to_local")


def local(t: Any) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return t.to_local() if is_sharded(t) else t


class FusedOptimizer(Optimizer):
    """A torch optimizer whose step reads gradients once, scaled and clipped on the way."""

    # a GradScaler then hands over grad_scale and found_inf and leaves the gradients alone
    _step_supports_amp_scaling = True
    _OWN: tuple[str, ...] = ("clip_norm", "impl", "last_norm", "_places")

    def __init__(self, params, defaults, *, clip_norm, only, impl):
        self._name = type(self).__name__
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"{self._name}: clip_norm is {clip_norm}, need more than 0, or None")
        self.clip_norm, self.impl = clip_norm, impl
        self.last_norm: torch.Tensor | None = None
        self._places: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, defaults)
        known = {p for group in self.param_groups for p in group["params"]}
        for p, chosen in (only or {}).items():
            if p not in known:
                raise ValueError(f"{self._name}: only names a tensor that is none of params")
            self._places[p] = self._as_places(p, chosen)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in (*self._OWN, "_name")}
        return {**super().__getstate__(), **own}

    def _update(self, group, parameters, gradients, scale) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """One step from the gradients; of a closure, which is called first, returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for number, group in enumerate(self.param_groups):
            trained = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            gradients = [self._gradient(p, i, number) for i, p in trained]
            work.append((group, [p for _, p in trained], gradients))
        scale = self._scale(work)
        if scale is not None and scale.device.type == "cpu" and not scale.isfinite():
            return loss
        for group, parameters, gradients in work:
            if parameters:
                one_way = scale
                if group.get("maximize"):
                    one_way = -gradients[0].new_ones((), dtype=torch.float32)
                    one_way = one_way if scale is None else -scale
                self._update(group, parameters, gradients, one_way)
        return loss

    def _gradient(self, p: Any, i: int, group: int) -> torch.Tensor:
        g: Any = p.grad
        what = f"{self._name}: the gradient of parameter {i} in group {group}"
        if g.layout != torch.strided:
            raise ValueError(
                f"{what} is {g.layout}, need a dense one; torch.optim.SparseAdam takes sparse ones"
            )
        if p.dtype not in DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"{what} belongs to one of {p.dtype}, need one of {names}")
        if is_sharded(p):
            if not is_sharded(g):
                raise ValueError(f"{what} is a plain tensor, need a DTensor as the parameter")
            if g.placements != p.placements:
                g = g.redistribute(placements=p.placements)
        return local(g)

    # --- scale ---

    def _scale(self, work) -> torch.Tensor | None:
        """What gradients are multiplied by; not finite: the step must not be made."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scale = None if grad_scale is None else 1.0 / grad_scale.float()
        if self.clip_norm is not None:
            norm = self._norm(work)
            if scale is not None:
                norm = norm * scale.to(norm.device)
            self.last_norm = norm.float()
            limit = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            limit = torch.where(norm.isfinite(), limit, torch.nan)
            scale = (limit if scale is None else limit * scale.to(limit.device)).float()
        if found_inf is not None:
            scale = torch.ones_like(found_inf) if scale is None else scale
            scale = torch.where(found_inf.to(scale.device) == 0, scale, torch.nan)
        return None if scale is None else scale.reshape(())

    def _norm(self, work) -> torch.Tensor:
        """Of all gradients of all groups; of sharded ones, of the whole tensors."""
        alike: dict[Any, list[torch.Tensor]] = {}
        for _, parameters, gradients in work:
            for p, g in zip(parameters, gradients, strict=True):
                if p in self._places:
                    g = g.reshape(-1).index_select(0, self._places[p])
                where = (p.device_mesh, p.placements) if is_sharded(p) else None
                alike.setdefault((where, g.device, g.dtype), []).append(g)
        total: torch.Tensor | None = None
        for (where, device, _), gradients in alike.items():
            squares = op.call_sum_of_squares(gradients, self.impl)
            if where is not None:
                from torch.distributed.tensor import DTensor, Partial, Replicate

                mesh, placements = where
                parts = [Partial() if placed.is_shard() else Replicate() for placed in placements]
                squares = DTensor.from_local(squares, mesh, parts).full_tensor()
            total = squares if total is None else total.to(device) + squares
        return (torch.zeros((), dtype=torch.float64) if total is None else total).sqrt()

    # --- chosen entries ---

    def _as_places(self, p: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        what = f"{self._name}: only, for a parameter of shape {tuple(p.shape)},"
        if is_sharded(p):
            raise ValueError(f"{what} is given for a sharded one, need a plain tensor")
        if chosen.dtype == torch.bool:
            if chosen.shape != p.shape:
                raise ValueError(f"{what} is a mask of shape {tuple(chosen.shape)}")
            places = chosen.reshape(-1).nonzero()[:, 0]
        else:
            if chosen.dtype not in (torch.int32, torch.int64) or chosen.dim() != 1:
                raise ValueError(
                    f"{what} is {chosen.dtype} of {chosen.dim()} axes, need a bool mask, or (N,) "
                    "int32 or int64 places"
                )
            places = chosen.long().sort().values
            if bool((places[1:] == places[:-1]).any()):
                raise ValueError(f"{what} holds a place twice")
            if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < p.numel():
                stray = int(places[0]) if places[0] < 0 else int(places[-1])
                raise ValueError(f"{what} holds place {stray}, need 0 to {p.numel() - 1}")
        wide = p.numel() > 2**31 - 1
        return places.to(p.device, torch.int64 if wide else torch.int32).contiguous()

    # --- state dicts ---

    def _adopt(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        """Look at what was loaded for a parameter, and make it what this optimizer keeps."""

    def load_state_dict(self, state_dict) -> None:
        """Go on from a state dict of this class, or of torch's optimizer of the same name."""
        for number, group in enumerate(state_dict["param_groups"]):
            if group.get("amsgrad"):
                raise ValueError(
                    f"{self._name}: group {number} of the state dict has amsgrad, need one without"
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name in ("amsgrad", "foreach", "capturable", "differentiable", "fused",
                         "decoupled_weight_decay"):  # fmt: skip
                group.pop(name, None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            saved: Mapping[str, Any] = state_dict["state"].get(number, {})
            state = self.state[p] if saved else {}
            for name, value in saved.items():
                # torch has cast everything to the parameter's dtype, counts and codes included
                if isinstance(value, torch.Tensor):
                    state[name] = value.detach().to(local(p).device, copy=True)
            if "places" in state:
                state["places"] = self._places[p] = self._as_places(p, state["places"])
            if state:
                self._adopt(p, state)


def carried(old: torch.Tensor, new: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """What is held for the places `old` as it lies for the places `new`, both ascending; 0 for
    those that were not among them."""
    found = held.new_zeros(new.shape)
    if len(old):
        at = torch.searchsorted(old, new).clamp(max=len(old) - 1)
        stays = old[at] == new
        found[stays] = held[at[stays]]
    return found
