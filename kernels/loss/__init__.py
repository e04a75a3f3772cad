"""Log-probability of the target tokens of a forward."""

from fewstep.kernels.loss.dispatch import holds_logits, linear_logprob
from fewstep.kernels.loss.reference import target_logprobs

__all__ = ["holds_logits", "linear_logprob", "target_logprobs"]
