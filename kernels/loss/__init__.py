"""Head and loss in one: cross-entropy, log-probabilities and what is built on them."""

from tilewright.ops.loss.api import linear_cross_entropy, linear_log_probs
from tilewright.ops.loss.contrastive import cached_step, gather_across_ranks, info_nce
from tilewright.ops.loss.distill import linear_distillation
from tilewright.ops.loss.preference import (
    alignment_loss,
    dpo_loss,
    group_advantages,
    grpo_loss,
    kto_loss,
    listwise_weights,
    many_shot_weights,
    meta_weights,
    orpo_loss,
    sequence_log_probs,
    simpo_loss,
)

__all__ = [
    "alignment_loss",
    "cached_step",
    "dpo_loss",
    "gather_across_ranks",
    "group_advantages",
    "grpo_loss",
    "info_nce",
    "kto_loss",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_log_probs",
    "listwise_weights",
    "many_shot_weights",
    "meta_weights",
    "orpo_loss",
    "sequence_log_probs",
    "simpo_loss",
]
