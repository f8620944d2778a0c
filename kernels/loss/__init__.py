"""Head and loss in one: cross-entropy, log-probabilities and what is built on them."""

from tilewright.ops.loss.api import linear_cross_entropy, linear_log_probs

__all__ = ["linear_cross_entropy", "linear_log_probs"]
