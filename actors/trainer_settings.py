"""How a trainer is set up; free of torch, so that the command line can read it fast."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fewstep.kernels.model.config import Precision
from fewstep.kernels.model.lora_settings import LoraSettings
from fewstep.platform.config import Config


class TrainerSettings(Config):
    """The optimiser and how it is spread over ranks."""

    num_ranks: int = Field(default=1, ge=1)
    """Data-parallel ranks, one process each."""
    zero_stage: Literal[0, 1] = 0
    """DeepSpeed ZeRO stage: what is sharded over the ranks (1: the optimiser's state)."""
    precision: Precision = "fp32"
    """bf16 = matrix products in bfloat16 over float32 weights."""
    compiled: bool = False
    """torch.compile the forward and backward; costs about 45 s once, then a step takes half."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only and run the layer again in the backward pass: a third more time, far less memory."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    lora: LoraSettings | None = None
    """Train a low-rank adapter over frozen weights; None = all weights. Its keys: rank, alpha, target_modules, dropout,
    seed (docs/training.md)."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep an exponential moving average of the weights and publish that; None = publish the weights."""
    micro_rows: int = Field(default=8192, ge=256)
    """Padded rows per forward; a larger batch is accumulated."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """A step whose gradient is not finite changes nothing and is counted; more than this many in a row end the job."""
    deadline_s: float = Field(default=900.0, gt=0.0)
    """A rank that has not answered a call after this long is given up, and the job with it."""
