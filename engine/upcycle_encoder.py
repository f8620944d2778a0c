"""A dense encoder made into one with an expert for each domain: every example to its own expert."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tilewright.ops import moe_mlp, route_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "SiLUActivation": "silu",
               "ReLU": "relu"}  # fmt: skip


class DomainExperts(nn.Module):
    """Copies of an MLP; an example goes to the one that `route_to` names for it.

        y[b] = W2[e] act(W1[e] x[b] + b1[e]) + b2[e],  e = experts[b]

    Each expert's matrices are parameters of their own: one whose domain is not in a batch gets no
    gradient at all, so that no optimizer's momentum moves it.
    """

    def __init__(self, up: nn.Linear, down: nn.Linear, activation: str, experts: int):
        super().__init__()
        self.activation = activation
        self.ups = nn.ModuleList(copy.deepcopy(up) for _ in range(experts))
        self.downs = nn.ModuleList(copy.deepcopy(down) for _ in range(experts))
        self.route: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H) from (B, L, H)."""
        if self.route is None:
            raise RuntimeError(
                "DomainExperts: no route; call the model inside `with tilewright.route_to(model, "
                "experts)`, which says for each example of the batch which expert it goes to"
            )
        if self.route.shape != x.shape[:1]:
            raise ValueError(
                f"route_to: experts has shape {tuple(self.route.shape)}, need ({x.shape[0]},): "
                "one for each example of the batch"
            )
        present, place = self.route.unique(return_inverse=True)
        chosen = present.tolist()
        ids = route_examples(place.to(x.device), length=x.shape[1])
        ups, downs = ([layers[e] for e in chosen] for layers in (self.ups, self.downs))
        return moe_mlp(
            x, ids, None, _stacked(ups, "weight"), _stacked(downs, "weight"),
            gate_up_bias=_stacked(ups, "bias"), down_bias=_stacked(downs, "bias"),
            activation=self.activation,
        )  # fmt: skip


def _stacked(layers: list, name: str) -> Any:
    """That parameter of all layers, (E', ..), None where they have none; a lone one's is a view."""
    tensors = [getattr(layer, name) for layer in layers]
    if tensors[0] is None:
        return None
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def moe_upcycle_encoder(
    model: PreTrainedModel, experts: int = 4, layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """A copy of a BERT-like encoder whose MLPs are one expert for each domain.

    model     a transformers model whose layers have `intermediate.dense` and `output.dense`, as
              BERT's and RoBERTa's; stays as it is
    experts   copies of each MLP, at least 1
    layers    numbers of the layers that get them, from 0; default all

    Returns the new model, which is called inside `route_to`. All experts are equal at first, so
    that whatever the route it computes what the dense model does; the other weights are shared by
    all domains. `accelerate` takes over the rest of it.
    ValueError: an argument or a model outside the above.

    Source: contrastive learning with a mixture of experts, arXiv 2401.15713.
    """
    if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
        raise ValueError(f"moe_upcycle_encoder: experts is {experts!r}, need at least 1")
    new = copy.deepcopy(model)
    found = [m for m in new.modules() if _is_layer(m)]
    if not found:
        raise ValueError(
            f"moe_upcycle_encoder: model is a {type(model).__name__}, need one whose layers have "
            "intermediate.dense and output.dense, as BERT's"
        )
    chosen = range(len(found)) if layers is None else layers
    for number in chosen:
        if not 0 <= number < len(found):
            raise ValueError(
                f"moe_upcycle_encoder: layers has {number}, the model has layers 0 to "
                f"{len(found) - 1}"
            )
        layer: Any = found[number]
        name = type(layer.intermediate.intermediate_act_fn).__name__
        if name not in ACTIVATIONS:
            raise ValueError(
                f"moe_upcycle_encoder: the activation of layer {number} is {name}, need one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        # the whole MLP stands where its first half did; what follows adds the residual
        layer.intermediate = DomainExperts(
            layer.intermediate.dense, layer.output.dense, ACTIVATIONS[name], experts
        )
        layer.output.dense = nn.Identity()
    return new


def _is_layer(module: Any) -> bool:
    first, second = (module._modules.get(name) for name in ("intermediate", "output"))
    return all(type(getattr(m, "dense", None)) is nn.Linear for m in (first, second)) and hasattr(
        first, "intermediate_act_fn"
    )


@contextlib.contextmanager
def route_to(model: nn.Module, experts: torch.Tensor | int | Sequence[int]) -> Iterator[None]:
    """Within, example b of a batch goes to expert experts[b] in every layer that has experts.

    model     from `moe_upcycle_encoder`, or around one
    experts   (B,) whole numbers

    ValueError: a model without experts, or an expert that it has not.
    """
    layers = [m for m in model.modules() if isinstance(m, DomainExperts)]
    if not layers:
        raise ValueError(f"route_to: model is a {type(model).__name__} without experts")
    route = torch.as_tensor(experts)
    known = len(layers[0].ups)
    if route.dim() != 1 or route.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"route_to: experts is {route.dtype} of shape {tuple(route.shape)}, need whole numbers "
            "of shape (B,)"
        )
    if route.numel() and not 0 <= int(route.min()) <= int(route.max()) < known:
        raise ValueError(
            f"route_to: experts holds {int(route.min())} to {int(route.max())}, need 0 to "
            f"{known - 1}"
        )
    before = [layer.route for layer in layers]
    try:
        for layer in layers:
            layer.route = route
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.route = was
