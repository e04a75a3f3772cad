"""Log-probability of the target tokens of a forward."""

from fewstep.kernels.loss.reference import target_logprobs

__all__ = ["target_logprobs"]
