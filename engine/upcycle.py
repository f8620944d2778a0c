"""A dense model made into a mixture of experts that computes the same, to be trained from there."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MLP = ("gate_proj", "up_proj", "down_proj")
# dense model types, and what transformers calls the same model with experts
TARGETS = {"llama": "Mixtral", "mistral": "Mixtral", "qwen3": "Qwen3Moe"}


def moe_upcycle(
    model: PreTrainedModel,
    experts: int = 4,
    top_k: int = 2,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> PreTrainedModel:
    """A new model whose MLPs are mixtures of copies of the dense ones.

        MLP(x) -> sum_k g[k] MLP[e_k](x),  sum_k g[k] = 1:  the same, as long as the copies are

    model       LlamaForCausalLM, MistralForCausalLM or Qwen3ForCausalLM of transformers without
                biases; stays as it is
    experts     copies of each MLP, at least 2
    top_k       of them for each token, 1 to `experts`
    noise       standard deviation of what is added to the copies after the first, in units of each
                weight's own. Equal experts give their router no gradient: with 0 it gets one from
                the second step on, when the tokens that each got have told them apart
    generator   of the noise and the routers, which are drawn as the model's own layers

    Returns a MixtralForCausalLM or Qwen3MoeForCausalLM in the model's dtype and on its device, with
    weights of its own. save_pretrained and from_pretrained are transformers', `accelerate` takes
    its experts over. Without noise its logits are the dense ones up to rounding.
    ValueError: an argument or a model outside the above.

    Source: Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055.
    """
    import transformers

    _check(model, experts, top_k, noise)
    dense: Any = model
    name = TARGETS[dense.config.model_type]
    config = _config(dense.config, getattr(transformers, f"{name}Config"), experts, top_k)
    mixture = getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=dense.dtype)
    mixture = mixture.to(dense.device)
    states = {n: t for n, t in dense.state_dict().items() if not _is_of_mlp(n)}
    with torch.no_grad():
        for number, layer in enumerate(dense.model.layers):
            gate, up, down = (getattr(layer.mlp, n).weight for n in MLP)
            at = f"model.layers.{number}.mlp"
            router = torch.empty(
                experts, config.hidden_size, dtype=torch.float32, device=dense.device
            )
            router.normal_(std=config.initializer_range, generator=generator)
            states[f"{at}.gate.weight"] = router.to(dense.dtype)
            for part, weight in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
                copies = weight.expand(experts, *weight.shape).clone()
                if noise:
                    draw = torch.empty_like(copies[1:], dtype=torch.float32)
                    draw.normal_(std=noise * weight.float().std().item(), generator=generator)
                    copies[1:] += draw.to(copies.dtype)
                states[f"{at}.experts.{part}"] = copies
    mixture.load_state_dict(states)
    if dense.generation_config is not None:
        mixture.generation_config = copy.deepcopy(dense.generation_config)
    return mixture.train(dense.training)


def _config(dense: Any, target: Any, experts: int, top_k: int) -> Any:
    """The configuration of the mixture: what both know, and the experts."""
    known = {f.name for f in dataclasses.fields(target)}
    shared = {n: v for n, v in dense.to_dict().items() if n in known and n != "architectures"}
    shared.pop("model_type", None)
    own: dict[str, Any] = {"num_local_experts": experts, "num_experts_per_tok": top_k}
    if target.model_type == "qwen3_moe":
        own = {
            "num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": True,
            "moe_intermediate_size": dense.intermediate_size, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }  # fmt: skip
    return target(**{**shared, **own})


def _is_of_mlp(name: str) -> bool:
    return name.rpartition(".mlp.")[2].split(".")[0] in MLP


def _check(model: Any, experts: int, top_k: int, noise: float) -> None:
    name = "moe_upcycle"
    for argument, value in (("experts", experts), ("top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}: {argument} is {value!r}, need a whole number")
    if experts < 2:
        raise ValueError(f"{name}: experts is {experts}, need at least 2")
    if not 1 <= top_k <= experts:
        raise ValueError(f"{name}: top_k is {top_k}, need 1 to experts = {experts}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"{name}: noise is {noise}, need a finite number of at least 0")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in TARGETS or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"{name}: model is a {type(model).__name__}, need a causal language model of the type "
            f"{', '.join(TARGETS)}"
        )
    if getattr(model.config, "attention_bias", False):
        raise ValueError(f"{name}: the model's attention has biases, which its mixture has not")
    for number, layer in enumerate(model.model.layers):
        for part in MLP:
            module = getattr(layer.mlp, part, None)
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"{name}: {part} of layer {number} is a {type(module).__name__}, need a plain "
                    "torch.nn.Linear: merge adapters and upcycle before quantizing"
                )
            if module.bias is not None:
                raise ValueError(f"{name}: {part} of layer {number} has a bias, experts have none")
