"""PEFT's wrapper of the experts' weights, with the factors of the update handed to `moe_mlp`."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import ParamWrapper

from tilewright.adapt import experts
from tilewright.adapt.experts_scaled import ScaledExperts
from tilewright.ops import ExpertsLora


class UnfoldedExperts(ParamWrapper):
    """Computes what ParamWrapper does, without W + s B A of all experts and its gradient."""

    @contextmanager
    def _activate_lora(self, active_adapters):
        base: Any = self.get_base_layer()
        active = [a for a in active_adapters if a in self.lora_A]
        fold = functools.partial(super()._activate_lora, active_adapters)
        is_scaled = isinstance(base, ScaledExperts)
        takes = is_scaled or base.config._experts_implementation == experts.NAME
        if len(active) != 1 or not takes:
            with fold():
                yield
            return
        (name,) = active
        layer: Any = self
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if is_scaled:  # its weights are (E, in, out), which PEFT takes for (E, out, in)
            a, b = (
                b.unflatten(1, (-1, self.num_experts)).permute(2, 1, 0),
                a.unflatten(0, (self.num_experts, -1)).mT,
            )
        update = ExpertsLora(a, b, self.scaling[name])
        held = vars(base).setdefault(experts.UPDATES, {})
        held[self.parameter_name] = experts.Update(update, fold)
        try:
            yield
        finally:
            del held[self.parameter_name]
            if not held:
                del vars(base)[experts.UPDATES]
