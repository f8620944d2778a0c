"""Mixture of experts: routing, the experts' MLPs, balancing; see README.md beside this."""

from tilewright.ops.moe.api import ExpertsLora, moe_mlp
from tilewright.ops.moe.losses import (
    balance_loss,
    importance_loss,
    load_loss,
    mutual_information_loss,
    router_z_loss,
)
from tilewright.ops.moe.mixture import lora_mixture
from tilewright.ops.moe.parallel import moe_mlp_parallel
from tilewright.ops.moe.routes import (
    add_router_noise,
    keep_local,
    route_by_threshold,
    route_examples,
    route_types,
)
from tilewright.ops.moe.routing import (
    Route,
    choose_tokens,
    route_tokens,
    router_logits,
    tokens_per_expert,
    update_router_bias,
)
from tilewright.ops.moe.soft import soft_moe

__all__ = [
    "ExpertsLora",
    "Route",
    "add_router_noise",
    "balance_loss",
    "choose_tokens",
    "importance_loss",
    "keep_local",
    "load_loss",
    "lora_mixture",
    "moe_mlp",
    "moe_mlp_parallel",
    "mutual_information_loss",
    "route_by_threshold",
    "route_examples",
    "route_tokens",
    "route_types",
    "router_logits",
    "router_z_loss",
    "soft_moe",
    "tokens_per_expert",
    "update_router_bias",
]
