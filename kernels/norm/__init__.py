"""The memory-bound operators: norms, rotary positions, gated activations, embeddings."""

from tilewright.ops.norm.api import embedding, geglu, layer_norm, rms_norm, rope, swiglu

__all__ = ["embedding", "geglu", "layer_norm", "rms_norm", "rope", "swiglu"]
