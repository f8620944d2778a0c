"""PEFT's wrapper of the experts' weights, with the factors of the update handed to `moe_mlp`."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import ParamWrapper

from tilewright.adapt import experts
from tilewright.ops import ExpertsLora


class UnfoldedExperts(ParamWrapper):
    """Computes what ParamWrapper does, without W + s B A of all experts and its gradient."""

    @contextmanager
    def _activate_lora(self, active_adapters):
        base: Any = self.get_base_layer()
        active = [a for a in active_adapters if a in self.lora_A]
        fold = functools.partial(super()._activate_lora, active_adapters)
        if len(active) != 1 or base.config._experts_implementation != experts.NAME:
            with fold():
                yield
            return
        (name,) = active
        layer: Any = self
        factors = layer.lora_A[name].weight, layer.lora_B[name].weight
        update = ExpertsLora(*factors, self.scaling[name])
        held = vars(base).setdefault(experts.UPDATES, {})
        held[self.parameter_name] = experts.Update(update, fold)
        try:
            yield
        finally:
            del held[self.parameter_name]
            if not held:
                del vars(base)[experts.UPDATES]
