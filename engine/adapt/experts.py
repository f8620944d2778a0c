"""The table's entry for mixtures of experts: the experts' MLPs, by transformers' ExpertsInterface.

The router stays the model's own; what it chooses is handed to `moe_mlp`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from tilewright import choose
from tilewright.adapt import undo
from tilewright.adapt.forms import Renewed
from tilewright.adapt.table import Replacement, Request, Site
from tilewright.ops import ExpertsLora, moe_mlp

NAME = "tilewright"
SETTINGS = "_tilewright_experts"  # attribute of an accelerated experts module
UPDATES = "_tilewright_updates"  # of one during a call: Update by the weight's name
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, nn.Parameter)  # no DTensor, whose data_ptr() is not the whole weight
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


class Update(NamedTuple):
    """A low-rank update of a weight, for the time of a call.

    fold   a context in which the module's weight is the updated one
    """

    lora: ExpertsLora
    fold: Callable[[], AbstractContextManager]


@dataclass
class ExpertsSettings:
    """What is settled for one module of experts.

    rule          how moe_mlp computes what the module's _apply_gate does
    was           the experts implementation before: the stock path returns to it
    stays_stock   why this module is not replaced though its configuration says so, or None
    warned        reasons already told, shared by the modules of one model
    """

    rule: dict = field(default_factory=dict)
    was: str | None = None
    stays_stock: str | None = None
    warned: set = field(default_factory=set)


def register() -> None:
    """Make the name known to transformers."""
    ExpertsInterface.register(NAME, tilewright_experts)


def tilewright_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of one layer, with transformers' arguments: (T, H), (T, K) and (T, K)."""
    settings = vars(self).get(SETTINGS)
    if settings is None:  # the name was set on the configuration, without accelerate
        reason = why_not_experts(self)
        settings = ExpertsSettings(gate_rule(self) or {}, stays_stock=reason)
        setattr(self, SETTINGS, settings)
    reason = settings.stays_stock or why_stock(self, hidden_states)
    updates = vars(self).get(UPDATES, {})
    if reason is not None:
        tell(self, settings, reason)
        with ExitStack() as folded:
            for update in updates.values():
                folded.enter_context(update.fold())
            return _stock(self, settings)(self, hidden_states, top_k_index, top_k_weights)
    biases = (self.gate_up_proj_bias, self.down_proj_bias) if self.has_bias else (None, None)
    y = moe_mlp(
        hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj,
        gate_up_bias=biases[0], down_bias=biases[1], transposed=self.is_transposed,
        **loras(updates), **settings.rule,
    )  # fmt: skip
    return y.to(hidden_states.dtype)


def loras(updates: dict[str, Update]) -> dict[str, Any]:
    """moe_mlp's arguments for the updates of the weights with these names."""
    arguments = {"gate_up_proj": "gate_up_lora", "down_proj": "down_lora"}
    return {arguments[weight]: update.lora for weight, update in updates.items()}


def is_candidate(module: nn.Module) -> bool:
    """A module that holds the weights of all experts of a layer, and no entry has taken yet."""
    if isinstance(module, Renewed):
        return False
    if all(hasattr(module, flag) for flag in FLAGS):
        return True
    weight = getattr(module, "gate_up_proj", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 3


def why_not(site: Site, request: Request) -> str | None:
    """Why the experts of this layer cannot be replaced, or None."""
    return why_not_experts(site.module)


def why_not_experts(module: Any) -> str | None:
    if not all(hasattr(module, flag) for flag in FLAGS) or not hasattr(module, "config"):
        return "its class does not ask transformers' ExpertsInterface for its experts"
    if not module.has_gate:
        return "its experts have no gate"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes after each expert"
    reason = why_not_weights(module)
    if reason is None and gate_rule(module) is None:
        reason = "its _apply_gate is none of the activations of moe_mlp"
    return reason


def why_not_weights(module: Any) -> str | None:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"it has no {name} of three axes"
        reason = why_no_kernel(weight.device.type)
        if reason is not None:
            return f"its weights are on {weight.device.type}: {reason}"
        if not weight.is_floating_point():
            return f"its {name} is {weight.dtype}"
    return None


@functools.cache
def why_no_kernel(device: str) -> str | None:
    """Why moe_mlp would run its reference there, or None."""
    if device in ("cpu", "meta"):  # what the CPU lacks is said when it is called
        return None
    if device != "cuda":
        return "moe_mlp has no kernel there"
    weight = torch.zeros(1, 32, 16, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    explained = choose.explain("moe_mlp", weight[0, :1], ids, None, weight, weight.mT[:, :, :16])
    return explained.reasons["triton_gpu"] if explained.chosen == "reference" else None


def gate_rule(module: Any) -> dict | None:
    """The options with which moe_mlp computes what the module's _apply_gate does, or None.

    Found out by trying: both get the same numbers, in float64.
    """
    width = 48
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(8, 2 * width, generator=generator, dtype=torch.float64)
    options: list[dict] = [{"activation": a} for a in ("swiglu", "geglu", "geglu_tanh")]
    alpha, limit = (getattr(module, name, None) for name in ("alpha", "limit"))
    if isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        z = torch.cat([z, z * limit])  # beyond the limit on both sides
        options.append({"activation": "clamped_swiglu", "alpha": alpha, "limit": limit})
    try:
        with torch.no_grad():
            wanted = module._apply_gate(z)
    except Exception:  # whatever it needs, it is not one of ours
        return None
    if not isinstance(wanted, torch.Tensor) or wanted.shape != (z.shape[0], width):
        return None
    # one expert whose weights are identities hands the activation through
    gate_up = torch.eye(2 * width, dtype=torch.float64)[None]
    ids = torch.zeros(z.shape[0], 1, dtype=torch.int64)
    for option in options:
        rule = {**option, "interleaved": not module.is_concatenated}
        got = moe_mlp(z, ids, None, gate_up, gate_up[:, :, :width], impl="reference", **rule)
        if torch.allclose(got[:, :width], wanted, rtol=1e-9, atol=1e-9):
            return rule
    return None


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    """Point the modules' configurations, already the model's own, at our function."""
    register()
    warned: set[str] = set()
    was = {id(s.module.config): s.module.config._experts_implementation for s in fitting}
    for site in fitting:
        settings = ExpertsSettings(gate_rule(site.module) or {}, was[id(site.module.config)],
                                   warned=warned)  # fmt: skip
        undo.set_attribute(site.module, SETTINGS, settings)
    for site, reason in unfit:  # may share a configuration with one that is replaced
        config = getattr(site.module, "config", None)
        if id(config) in was:
            settings = ExpertsSettings({}, was[id(config)], reason, warned)
            undo.set_attribute(site.module, SETTINGS, settings)
    for site in fitting:
        site.module.config._experts_implementation_internal = NAME
    return ["" for _ in fitting]


def why_stock(module: Any, x: torch.Tensor) -> str | None:
    """Why this call stays on transformers' own function, or None."""
    for what, t in (
        ("input", x),
        ("gate_up_proj", module.gate_up_proj),
        ("down_proj", module.down_proj),
    ):
        if not torch.compiler.is_compiling() and type(t) not in PLAIN:
            return f"its {what} is a {type(t).__name__}, not a plain tensor"
        if t.dtype not in DTYPES:
            return f"its {what} is {t.dtype}"
        if t.device.type != "cpu" and not torch.compiler.is_compiling():
            reason = why_no_kernel(t.device.type)
            if reason is not None:
                return f"its {what} is on {t.device.type}: {reason}"
        if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"its {what} is {t.dtype}, its input {x.dtype}"
    return None


def _stock(module: Any, settings: ExpertsSettings):
    """transformers' own function, as before; eager where that is not known."""
    eager = inspect.unwrap(type(module).forward)
    if settings.was is None or settings.was == "eager":
        return eager
    return ExpertsInterface().get_interface(settings.was, eager)


def tell(module: Any, settings: ExpertsSettings, reason: str) -> None:
    """Warn once a model and reason. Not in a compiled graph, which has no place for a warning."""
    if torch.compiler.is_compiling() or reason in settings.warned:
        return
    settings.warned.add(reason)
    warnings.warn(
        f"tilewright: {type(module).__name__} runs transformers' own experts: {reason}",
        stacklevel=3,
    )


REPLACEMENT = Replacement("experts", "moe_mlp", is_candidate, why_not, install)
