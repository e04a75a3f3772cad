"""Configuration of `fewstep distill`; free of torch and Ray, so that the command line reads it at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.platform.config import Config


class PoolConfig(Config):
    """Which orders of opening are tried, and which are kept."""

    num_samples: int = Field(default=1024, ge=1)
    """Documents, or pairs of the embedded family, that orders are drawn for."""
    num_orders: int = Field(default=8, ge=1)
    """Orders drawn for each."""
    temperature: float = Field(default=0.5, ge=0.0)
    """Gumbel noise on the log-confidence that says what opens next; 0 = all orders of a sample are the same."""
    num_free: int = Field(default=0, ge=0)
    """Answers generated freely for each pair of the embedded family; the right ones join its orders. Not for a corpus,
    whose texts nothing verifies."""
    free_temperature: float = Field(default=0.6, ge=0.0, le=2.0)
    """Of the free answers."""
    free_tokens: int = Field(default=80, ge=1)
    """Longest free answer."""
    threshold: float = Field(default=0.9, gt=0.0, le=1.0)
    """Positions of at least this confidence open together; one a block opens in any case."""
    keep_share: float = Field(default=0.25, gt=0.0, le=1.0)
    """Share of a sample's orders that is kept, those of the highest path bound; at least one."""


class DistillConfig(Config):
    """Constrained-order training: the model learns to jump along the best of its own orders of opening."""

    model: str = ""
    """Block-causal model folder or models:/NAME@ALIAS; empty = the embedded model."""
    data: str = ""
    """Folder of a prepared corpus in the model's tokens; empty = pairs of the embedded family."""
    out: Path = Path("runs/distill")
    """Run folder: the pool, the model, checkpoints and metrics."""
    seed: int = Field(default=0, ge=0)
    pool: PoolConfig = PoolConfig()
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Orders per step, over all ranks."""
    learning_rate: float = Field(default=3e-4, gt=0.0)
    warmup_steps: int = Field(default=20, ge=0)
    decay_share: float = Field(default=0.3, ge=0.0, le=1.0)
    """The rate falls linearly to zero over this last share of the steps."""
    certainty: float = Field(default=0.1, ge=0.0)
    """Weight of the entropy at the tokens that are learned (certainty forcing, 2509.26488)."""
    corrupt_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the states that get wrong tokens among the visible ones, which then are learned, too (eq. 9's f)."""
    checkpoint_every: int = Field(default=100, ge=1)
    resume: bool = True
    """Go on with the pool and from the checkpoint in `out`; configuration, data and model must be the same."""
    tracking_uri: str | None = None
    """MLflow store; None = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    require_tracking: bool = True
    """Refuse to start while the store does not answer; false = start, and deliver the records later."""
    experiment: str = "fewstep"
    """MLflow experiment; made when missing."""
    trainer: TrainerSettings = TrainerSettings(precision="bf16", micro_rows=4096)

    @model_validator(mode="after")
    def _every_rank_has_orders(self) -> DistillConfig:
        if self.batch_size < self.trainer.num_ranks:
            raise ValueError("batch_size must be at least trainer.num_ranks")
        if self.data and self.pool.num_free:
            raise ValueError("pool.num_free must be 0 with data: nothing verifies answers to a corpus")
        return self
