"""tilewright: hand-written kernels behind the operators of PyTorch and Hugging Face models."""

if __name__ != "tilewright":
    raise ImportError(
        f"this package is imported as 'tilewright', not as {__name__!r}; "
        "leave the source folder or install it with `pip install -e .`"
    )

# torch first: the kernels' OpenMP regions must bind to the runtime that torch has loaded
import torch  # noqa: F401

from tilewright.adapt import accelerate, restore
from tilewright.choose import explain
from tilewright.generate import generate
from tilewright.half import HalfPlan
from tilewright.merge import merge
from tilewright.ops import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    SM3,
    AdamW,
    ErrorStatistics,
    ExpertsLora,
    Int4,
    Int8,
    LinearLayer,
    PackedWeight,
    Regrowth,
    Route,
    SavedDeltas,
    SavedWeights,
    ShiftedSegments,
    WeightDelta,
    adamw_update,
    add_router_noise,
    alignment_loss,
    append_to_cache,
    balance_loss,
    cached_step,
    choose_tokens,
    dequantize_blockwise,
    dequantize_weight,
    dpo_loss,
    embedding,
    error_statistics,
    flash_attention,
    flash_decode,
    fuse_logits,
    fused_linear,
    gather_across_ranks,
    geglu,
    gradient_norm,
    group_advantages,
    grpo_loss,
    importance_loss,
    info_nce,
    keep_local,
    kto_loss,
    largest_gradients,
    layer_norm,
    linear_cross_entropy,
    linear_distillation,
    linear_group,
    linear_log_probs,
    listwise_weights,
    load_deltas,
    load_loss,
    load_packed,
    lora_linear,
    lora_mixture,
    many_shot_weights,
    merge_delta,
    meta_weights,
    moe_mlp,
    moe_mlp_parallel,
    multi_lora_linear,
    mutual_information_loss,
    orpo_loss,
    quantize_activations,
    quantize_blockwise,
    quantize_weight,
    quantized_linear,
    read_awq,
    read_bitsandbytes,
    read_compressed_tensors,
    read_gguf,
    read_gptq,
    regrow_by_extremes,
    regrow_by_gradient,
    rms_norm,
    rope,
    route_by_threshold,
    route_examples,
    route_tokens,
    route_types,
    router_logits,
    router_z_loss,
    sample_tokens,
    sampled_product,
    save_deltas,
    save_packed,
    sequence_log_probs,
    share_to_regrow,
    simpo_loss,
    sm3_update,
    soft_moe,
    swiglu,
    to_bitsandbytes,
    tokens_per_expert,
    unmerge_delta,
    update_router_bias,
)
from tilewright.plug_in import register_when_imported
from tilewright.quantized import QuantizedLinear, dequantize, quantize
from tilewright.train import finetune
from tilewright.upcycle import moe_upcycle
from tilewright.upcycle_encoder import moe_upcycle_encoder, route_to

__version__ = "0.1.0"

__all__ = [
    "FP4",
    "FP8",
    "IA3",
    "MXFP4",
    "NF4",
    "SM3",
    "AdamW",
    "BitFit",
    "DoRA",
    "ErrorStatistics",
    "ExpertsLora",
    "HalfPlan",
    "Int4",
    "Int8",
    "LinearLayer",
    "LoRA",
    "Mask",
    "PackedWeight",
    "Parallel",
    "Prefix",
    "QuantConfig",
    "QuantizedLinear",
    "Regrowth",
    "Route",
    "SavedDeltas",
    "SavedWeights",
    "Sequential",
    "ShiftedSegments",
    "SparseDelta",
    "WeightDelta",
    "__version__",
    "accelerate",
    "adamw_update",
    "add_router_noise",
    "alignment_loss",
    "append_to_cache",
    "balance_loss",
    "cached_step",
    "choose_tokens",
    "dequantize",
    "dequantize_blockwise",
    "dequantize_weight",
    "dpo_loss",
    "embedding",
    "error_statistics",
    "explain",
    "finetune",
    "flash_attention",
    "flash_decode",
    "fuse_logits",
    "fused_linear",
    "gather_across_ranks",
    "geglu",
    "generate",
    "gradient_norm",
    "group_advantages",
    "grpo_loss",
    "importance_loss",
    "info_nce",
    "keep_local",
    "kto_loss",
    "largest_gradients",
    "layer_norm",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_group",
    "linear_log_probs",
    "listwise_weights",
    "load_adapted",
    "load_deltas",
    "load_loss",
    "load_packed",
    "load_peft_deltas",
    "lora_linear",
    "lora_mixture",
    "many_shot_weights",
    "merge",
    "merge_delta",
    "meta_weights",
    "moe_mlp",
    "moe_mlp_parallel",
    "moe_upcycle",
    "moe_upcycle_encoder",
    "multi_lora_linear",
    "mutual_information_loss",
    "orpo_loss",
    "quantize",
    "quantize_activations",
    "quantize_blockwise",
    "quantize_weight",
    "quantized_linear",
    "read_awq",
    "read_bitsandbytes",
    "read_compressed_tensors",
    "read_gguf",
    "read_gptq",
    "regrow_by_extremes",
    "regrow_by_gradient",
    "restore",
    "rms_norm",
    "rope",
    "route_by_threshold",
    "route_examples",
    "route_to",
    "route_tokens",
    "route_types",
    "router_logits",
    "router_z_loss",
    "sample_tokens",
    "sampled_product",
    "save_deltas",
    "save_packed",
    "save_peft_deltas",
    "sequence_log_probs",
    "share_to_regrow",
    "simpo_loss",
    "sm3_update",
    "soft_moe",
    "swiglu",
    "to_bitsandbytes",
    "tokens_per_expert",
    "unmerge_delta",
    "update_router_bias",
]

_METHODS = ("IA3", "BitFit", "DoRA", "LoRA", "Mask", "Parallel", "Prefix", "Sequential")

register_when_imported()


def __getattr__(name: str):
    if name in _METHODS:
        from tilewright.adapt import methods

        return getattr(methods, name)
    if name == "SparseDelta":
        from tilewright.adapt import sparse

        return sparse.SparseDelta
    if name == "load_adapted":
        from tilewright.adapt import call

        return call.load_adapted
    if name in ("load_peft_deltas", "save_peft_deltas"):
        from tilewright.adapt import sparse_peft

        return getattr(sparse_peft, name)
    if name == "QuantConfig":  # derived from a class of transformers, which is slow to import
        from tilewright.quantizer import QuantConfig

        return QuantConfig
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
