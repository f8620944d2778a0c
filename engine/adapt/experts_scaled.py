"""The table's entry for experts whose gates multiply their input, as Llama 4's.

Such experts do not ask transformers' ExpertsInterface: they get every token for every expert, times
a score that is 0 for all but the chosen. Told, as norms and gates are, by their source.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.models.llama4.modeling_llama4 import (
    Llama4Router,
    Llama4TextExperts,
    Llama4TextMoe,
)

from tilewright.adapt import experts, undo
from tilewright.adapt.forms import derived, is_like
from tilewright.adapt.table import Replacement, Request, Site
from tilewright.ops import moe_mlp


class ScaledMixture:
    """The router's choice goes to the experts instead of every token for every expert."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer: Any = self
        x = hidden_states.reshape(-1, layer.hidden_dim)
        scores, logits = layer.router(x)
        # those that are not chosen have 0, the least a score can be
        gates, ids = scores.topk(layer.top_k, dim=1)
        shared = layer.shared_expert(x)
        return shared + layer.experts(x, ids, gates), logits


class ScaledExperts:
    """The chosen experts of each token; stock when called as the stock layer calls it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        ids: torch.Tensor | None = None,
        gates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layer: Any = self
        if ids is None or gates is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        settings: experts.ExpertsSettings = getattr(layer, experts.SETTINGS)
        updates = vars(layer).get(experts.UPDATES, {})
        reason = experts.why_stock(layer, hidden_states)
        if reason is not None:
            experts.tell(layer, settings, reason)
            with ExitStack() as folded:
                for update in updates.values():
                    folded.enter_context(update.fold())
                return self._every_expert(hidden_states, ids, gates)
        y = moe_mlp(
            hidden_states, ids, gates, layer.gate_up_proj, layer.down_proj,
            transposed=True, scale_input=True, **experts.loras(updates), **settings.rule,
        )  # fmt: skip
        return y.to(hidden_states.dtype)

    def _every_expert(self, x, ids, gates):
        layer: Any = self
        scores = gates.new_zeros(x.shape[0], layer.num_experts).scatter(1, ids, gates)
        out = super().forward((x * scores.mT[:, :, None]).flatten(0, 1))  # type: ignore[misc]
        return out.view(layer.num_experts, *x.shape).sum(dim=0)


@functools.cache
def fused_class(base: type) -> type | None:
    """The subclass that calls our operator, or has its experts do so; or None."""
    for known, form in ((Llama4TextMoe, ScaledMixture), (Llama4TextExperts, ScaledExperts)):
        if is_like(base, known):
            return derived(base, (fused_class, (base,)), form)
    return None


def experts_of(mixture: nn.Module) -> Any:
    """The experts below it, under PEFT's wrappers if there are any, or None."""
    found = mixture._modules.get("experts")
    while found is not None and "base_layer" in found._modules:
        found = found._modules["base_layer"]
    return found


def is_candidate(module: nn.Module) -> bool:
    """A mixture with such experts; they are its part, and no candidates themselves."""
    return is_like(type(experts_of(module)), Llama4TextExperts)


def why_not(site: Site, request: Request) -> str | None:
    mixture: Any = site.module
    if not is_like(type(mixture), Llama4TextMoe):
        return "its forward is not the one known for experts with scaled inputs"
    if not is_like(type(mixture.router), Llama4Router):
        return f"its router is a {type(mixture.router).__name__}"
    inner = experts_of(mixture)
    reason = experts.why_not_weights(inner)
    if reason is None and _rule(inner) is None:
        reason = f"its experts' activation is {type(inner.act_fn).__name__}"
    return reason


def _rule(inner: Any) -> dict | None:
    def apply_gate(z):
        gate, up = z.chunk(2, dim=-1)
        return up * inner.act_fn(gate)

    return experts.gate_rule(SimpleNamespace(_apply_gate=apply_gate, is_concatenated=True))


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    warned: set[str] = set()
    for site in fitting:
        inner = experts_of(site.module)
        settings = experts.ExpertsSettings(_rule(inner) or {}, warned=warned)
        undo.set_attribute(inner, experts.SETTINGS, settings)
        for module in (site.module, inner):
            undo.set_attribute(module, "__class__", fused_class(module.__class__))
    return ["" for _ in fitting]


REPLACEMENT = Replacement("experts", "moe_mlp", is_candidate, why_not, install)
