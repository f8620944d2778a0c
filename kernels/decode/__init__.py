"""From logits to a token: sampling, and the fusion of several models' logits."""

from tilewright.ops.decode.api import fuse_logits, sample_tokens

__all__ = ["fuse_logits", "sample_tokens"]
