"""Mixture of experts: routing, the experts' MLPs, balancing; see README.md beside this."""

from tilewright.ops.moe.api import moe_mlp
from tilewright.ops.moe.losses import balance_loss, importance_loss, load_loss, router_z_loss
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
    "Route",
    "balance_loss",
    "choose_tokens",
    "importance_loss",
    "load_loss",
    "moe_mlp",
    "route_tokens",
    "router_logits",
    "router_z_loss",
    "soft_moe",
    "tokens_per_expert",
    "update_router_bias",
]
