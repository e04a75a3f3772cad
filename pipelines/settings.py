"""Configuration of the jobs on this floor; free of torch and Ray, so that the command line reads it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.actors.weight_sync.transport_name import TransportName
from fewstep.pipelines.retain_settings import Retain
from fewstep.pipelines.tasks.choice import BenchmarkChoice, one_spelled_out
from fewstep.platform.config import Config
from fewstep.platform.records import DecodePolicy

VERIFIER_CPUS = 0.1
"""Logical CPUs a verifier reserves: a verdict takes milliseconds."""

RECORDING = (
    "out", "resume", "tracking_uri", "require_tracking", "experiment", "register_as", "keep_models", "traces_per_step"
)  # fmt: skip
"""Keys that say where a run is kept and recorded, of whichever jobs have them: no part of what it computes."""

FREE_ON_RESUME: dict[str, Any] = {**dict.fromkeys(RECORDING, True), "trainer": {"num_ranks"}}
"""What a job that goes on from a checkpoint may have otherwise than the one that wrote it, as pydantic's `exclude`."""


class ModelSize(Config):
    """Sizes of a fresh model; the vocabulary comes with the tokenizer."""

    hidden_size: int = Field(default=128, ge=8)
    num_hidden_layers: int = Field(default=4, ge=1)
    num_attention_heads: int = Field(default=4, ge=1)
    num_key_value_heads: int = Field(default=4, ge=1)
    intermediate_size: int = Field(default=352, ge=8)
    max_position_embeddings: int = Field(default=512, ge=32)
    block_size: int = Field(default=16, ge=1)


class Phase(Config):
    """A stretch of training at one block size (warm-up over block sizes, LLaDA2.0, 2512.15745)."""

    block_size: int = Field(ge=1)
    share: float = Field(gt=0.0, le=1.0)
    """Share of all steps."""
    mask_rates: tuple[float, float] | None = None
    """Range of a block's mask rate, such as 0.45 to 0.95 at block size 4 (BD3-LM, 2503.09573); null = min_mask_rate
    to 1."""

    @model_validator(mode="after")
    def _rates_are_a_range(self) -> Phase:
        if self.mask_rates is not None and not 0.0 <= self.mask_rates[0] < self.mask_rates[1] <= 1.0:
            raise ValueError("mask_rates must be two rising numbers from 0 to 1")
        return self


class CurriculumConfig(Config):
    """What every job of the two-stage curriculum has: masks first, edits added for the last share of the steps."""

    out: Path = Path("runs/pretrain")
    """Run folder: the model, checkpoints, metrics and the resolved configuration."""
    data: str = ""
    """Folder of a prepared corpus (`fewstep prepare`); empty = the embedded task family."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=7000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Samples per step, over all ranks."""
    learning_rate: float = Field(default=2.5e-3, gt=0.0)
    warmup_steps: int = Field(default=100, ge=0)
    decay_share: float = Field(default=0.35, ge=0.0, le=1.0)
    """The rate falls linearly to zero over this last share of the steps."""
    min_mask_rate: float = Field(default=0.1, ge=0.0, lt=1.0)
    rate_warmup_steps: int = Field(default=0, ge=0)
    """Over these first steps the mask rates rise to their range, unweighted; for a model that has never denoised."""
    complementary: bool = True
    """Every masked state is followed by the state that masks the other positions."""
    edit_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """An edited state per sample is added for this last share of the steps."""
    checkpoint_every: int = Field(default=500, ge=1)
    resume: bool = True
    """Go on from the newest checkpoint in `out`; the configuration must be the same but for trainer.num_ranks and where the
    run is recorded."""
    tracking_uri: str | None = None
    """MLflow store; None = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    require_tracking: bool = True
    """Refuse to start while the store does not answer; false = start, and deliver the records later."""
    experiment: str = "fewstep"
    """MLflow experiment; made when missing."""
    trainer: TrainerSettings = TrainerSettings(
        precision="bf16", compiled=True, weight_decay=0.01, ema_decay=0.998, micro_rows=4096
    )

    @model_validator(mode="after")
    def _every_rank_has_samples(self) -> CurriculumConfig:
        if self.batch_size < self.trainer.num_ranks:
            raise ValueError("batch_size must be at least trainer.num_ranks")
        return self


class PretrainConfig(CurriculumConfig):
    """The two-stage curriculum, from scratch or from a given model: masks first, edits for the last share of the steps."""

    model: str = ""
    """Model folder or models:/NAME@ALIAS to start from; empty = fresh weights of the given size."""
    size: ModelSize = ModelSize()
    """Of a fresh model."""
    phases: tuple[Phase, ...] = (
        Phase(block_size=1, share=0.3),
        Phase(block_size=2, share=0.05),
        Phase(block_size=4, share=0.08),
        Phase(block_size=8, share=0.12),
        Phase(block_size=16, share=0.45),
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> PretrainConfig:
        if abs(sum(phase.share for phase in self.phases) - 1.0) > 1e-6:
            raise ValueError("the shares of phases must add up to 1")
        if not self.model and self.phases[-1].block_size != self.size.block_size:
            raise ValueError(f"the last phase must train at size.block_size {self.size.block_size}")
        if not self.model and self.trainer.lora is not None:
            raise ValueError(
                "trainer.lora needs a model: an adapter on fresh weights learns nothing of its own"
            )
        return self


class ConvertConfig(CurriculumConfig):
    """An autoregressive model becomes a block-diffusion model; with data, it is trained to be one."""

    source: str = Field(min_length=1)
    """Model folder, models:/NAME@ALIAS or GGUF file of a Llama, Qwen2 or Qwen3 model."""
    to: Literal["block-diffusion"] = "block-diffusion"
    """What it becomes."""
    out: Path = Path("runs/convert")
    """Run folder; the model is in `out`/model."""
    block_size: int = Field(default=4, ge=1)
    """Positions denoised together once trained."""
    mask_token: str = ""
    """Token that stands for what is not written yet; empty = a mask or reserved token, or a new one."""
    block_warmup_share: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of the steps at the block sizes 1, 2, 4, ... below `block_size`, equally long (LLaDA2.0, 2512.15745)."""
    steps: int = Field(default=2000, ge=1)
    """Of training; used with `data`."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    warmup_steps: int = Field(default=200, ge=0)
    rate_warmup_steps: int = Field(default=200, ge=0)
    """Over these first steps the mask rates rise to their range, unweighted."""
    trainer: TrainerSettings = TrainerSettings(precision="bf16", weight_decay=0.01, micro_rows=4096)

    def phases(self) -> tuple[Phase, ...]:
        """The warm-up over block sizes, then the model's own."""
        sizes = [2**power for power in range(self.block_size.bit_length()) if 2**power < self.block_size]
        share = self.block_warmup_share / max(1, len(sizes))
        warmup = [Phase(block_size=size, share=share) for size in sizes if share]
        rest = 1.0 - sum(phase.share for phase in warmup)
        return (*warmup, Phase(block_size=self.block_size, share=rest))

    def pretraining(self, start: Path) -> PretrainConfig:
        """The training of the converted model in `start`."""
        shared = {name: getattr(self, name) for name in CurriculumConfig.model_fields}
        return PretrainConfig(**shared, model=str(start), phases=self.phases())


class Sweep(Config):
    """The decode policies a frontier is measured at; one token per step is always measured beside them."""

    thresholds: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = (
        0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1
    )  # fmt: skip
    """Confidence thresholds."""
    tokens_per_step: tuple[Annotated[int, Field(ge=1)], ...] = (4, 16)
    """Fixed numbers of tokens opened in a step."""

    def policies(self) -> list[DecodePolicy]:
        """Greedy policies: the thresholds, then the fixed numbers."""
        thresholds = [DecodePolicy(kind="threshold", threshold=value) for value in self.thresholds]
        return [
            *thresholds,
            *(DecodePolicy(kind="static", tokens_per_step=count) for count in self.tokens_per_step),
        ]


class Curriculum(Config):
    """The sampler's threshold falls while the rollouts keep passing, and rises again when they do not."""

    start: float = Field(default=0.9, gt=0.0, le=1.0)
    """Threshold of the first step's rollouts."""
    end: float = Field(default=0.3, gt=0.0, le=1.0)
    """The threshold never falls below this."""
    step: float = Field(default=0.02, ge=0.0, lt=1.0)
    """How far it moves after a training step; 0 = fixed at `start`."""
    pass_rate: float = Field(default=0.9, ge=0.0, le=1.0)
    """Smoothed share of passed rollouts from which on the threshold falls."""

    @model_validator(mode="after")
    def _ordered(self) -> Curriculum:
        if self.end > self.start:
            raise ValueError("end must not be above start")
        return self


class HeldOutChecks(Config):
    """Looks at held-out tasks while training: which weights are kept, and when a run has lost what it had."""

    every: int = Field(default=0, ge=0)
    """Steps between two looks; 0 = none."""
    num_tasks: int = Field(default=32, ge=1)
    """Tasks of a look; none of them is trained on or measured at the end."""
    max_drop: float = Field(default=0.03, ge=0.0, le=1.0)
    """A look is a loss if pass@1 is further than this below the unrefined model's at one token per step."""
    patience: int = Field(default=3, ge=0)
    """Losses in a row that end the run; 0 = it never ends for that."""
    gates_curriculum: bool = False
    """The threshold falls only while the last look was no loss."""


class RefineConfig(Config):
    """On-policy refinement: the model trains on its own verified trajectories to need fewer steps."""

    model: str = ""
    """Model folder or models:/NAME@ALIAS to start from; empty = the embedded model."""
    out: Path = Path("runs/refine")
    """Run folder: model, checkpoint, rollouts, report, figures and the resolved configuration."""
    tasks: Annotated[BenchmarkChoice, BeforeValidator(one_spelled_out)] = BenchmarkChoice(name="family")
    """What is trained on: `tasks:FILE` (pipelines/tasks/files.py), or any benchmark of `fewstep evaluate` but infilling."""
    held_out: Annotated[BenchmarkChoice | None, BeforeValidator(one_spelled_out)] = None
    """What the model is measured by; null = `held_out_share` of the tasks."""
    held_out_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the tasks that is never trained on, chosen by a hash of each task's name; the family has its own."""
    verifier: str = "tests"
    """`tests`, `exact`, `regex`, `json_schema`, `compiles`, `weighted`, or a dotted path package.module:Class."""
    verifier_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the verifier."""
    sandbox_requires: tuple[str, ...] = ()
    """Isolation layers without which the run refuses to start, such as [pidns, netns, mountns]."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=100, ge=1)
    max_seconds: float | None = Field(default=None, gt=0.0)
    """Stop refining after this long even if steps are left; None = no limit."""
    objective: str = "distill"
    """`distill`, `seed`, `trace`, `coupled`, or a dotted path package.module:Class."""
    objective_options: dict[str, float | int | str] = Field(default_factory=dict)
    """Keyword arguments of the objective."""
    retain: Retain | None = None
    """Documents that are not refined on, shown in every update beside the rollouts so that the model stays what it was
    there; null = nothing holds it."""
    prompts_per_step: int = Field(default=48, ge=1)
    group_size: int = Field(default=4, ge=1)
    """Rollouts per prompt."""
    temperature: float = Field(default=0.6, ge=0.0, le=2.0)
    """Of the rollouts."""
    max_tokens: int = Field(default=80, ge=1)
    """Completion budget of rollouts and measurements; the longest right answer of the family has 63 tokens."""
    curriculum: Curriculum = Curriculum()
    held_out_checks: HeldOutChecks = HeldOutChecks()
    learning_rate: float = Field(default=5e-4, gt=0.0)
    warmup_steps: int = Field(default=5, ge=0)
    decay_share: float = Field(default=0.3, ge=0.0, le=1.0)
    """The rate falls linearly to a tenth over this last share of the run (of steps or seconds, whichever ends it)."""
    updates_per_step: int = Field(default=2, ge=1)
    """Optimiser steps per batch of rollouts; each sees its own part of the groups."""
    max_staleness: int = Field(default=0, ge=0)
    """Weight versions between those that made a batch of rollouts and those it trains; 0 = synchronous, 1 = the next
    batch is made while this one trains."""
    rollouts_only: bool = False
    """Write the rollouts of `steps` steps of the model as it is, and train nothing."""
    replay: Path | None = None
    """Train from the rollouts that an earlier run wrote here (its `rollouts` folder), instead of making any."""
    in_process: bool = False
    """Engine, sandbox and trainer in this process, without Ray: for debuggers."""
    num_replicas: int = Field(default=2, ge=1)
    num_verifiers: int = Field(default=2, ge=1)
    max_sequences: int = Field(default=48, ge=1)
    """Requests that share a forward in one replica."""
    weight_transport: TransportName = "auto"
    """How weights reach the replicas: `shared_memory` (one node), `object_store`, `broadcast` (a tree of gloo
    connections); auto = shared memory if every replica is on the driver's node, else the object store."""
    trainer: TrainerSettings = TrainerSettings(num_ranks=2, precision="bf16", micro_rows=4096)
    replica_cpus: float = Field(default=0.5, gt=0.0)
    """Logical CPUs a replica reserves; replicas and trainer ranks take turns, so they may share the cores."""
    trainer_cpus: float = Field(default=0.4, gt=0.0)
    """Logical CPUs a trainer rank reserves."""
    layout: Literal["auto", "colocated", "split"] = "auto"
    """split = nothing shares the trainer's node; colocated = everything on one node; auto = others go elsewhere first."""
    sweep: Sweep = Sweep()
    num_eval_tasks: int = Field(default=500, ge=1)
    """Held-out tasks the frontier is measured on, before and after; of other tasks than the family's, at most so many."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between two checkpoints; each is a logged model with its metrics."""
    keep_models: int = Field(default=2, ge=1)
    """Checkpoints whose weights stay in `out`/models, the newest ones."""
    traces_per_step: float = Field(default=0.25, ge=0.0)
    """Rollouts of a step, drawn at random, that are traced stage by stage: 0.25 = one in every fourth step; 0 = none."""
    resume: bool = True
    """Go on from the checkpoint in `out`; the configuration must be the same but for trainer.num_ranks, layout,
    weight_transport and where the run is recorded."""
    tracking_uri: str | None = None
    """MLflow store; None = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    require_tracking: bool = True
    """Refuse to start while the store does not answer; false = start, and deliver the records later."""
    experiment: str = "fewstep"
    """MLflow experiment; made when missing."""
    register_as: str = "fewstep-tiny"
    """Name in the model registry. The refined model becomes its `candidate`, and `champion` at once if it holds the
    unrefined model's bar and no champion is better anywhere (`fewstep promote`)."""

    @property
    def total_cpus(self) -> float:
        """Logical CPUs of all actors together."""
        ranks = self.trainer.num_ranks * self.trainer_cpus
        return self.num_replicas * self.replica_cpus + self.num_verifiers * VERIFIER_CPUS + ranks

    @model_validator(mode="after")
    def _every_rank_has_work(self) -> RefineConfig:
        if self.prompts_per_step < self.updates_per_step * self.trainer.num_ranks:
            raise ValueError("prompts_per_step must be at least updates_per_step x trainer.num_ranks")
        return self

    @model_validator(mode="after")
    def _tasks_can_be_split(self) -> RefineConfig:
        family = BenchmarkChoice(name="family")
        if self.tasks.name == "repair" or (self.held_out and self.held_out.name in ("repair", "family")):
            raise ValueError(
                "tasks and held_out are files of tasks or benchmarks; repair is none, family is no held_out"
            )
        if self.tasks.name == "family" and (self.tasks != family or self.held_out is not None):
            raise ValueError(
                "the family draws and holds out by itself: set num_eval_tasks and seed, and no held_out"
            )
        if self.held_out is not None and self.held_out_share != 0.1:
            raise ValueError("held_out_share does nothing with held_out")
        return self

    @model_validator(mode="after")
    def _every_key_acts(self) -> RefineConfig:
        if self.held_out_checks.gates_curriculum and not self.held_out_checks.every:
            raise ValueError("held_out_checks.gates_curriculum needs held_out_checks.every")
        if self.rollouts_only and self.replay is not None:
            raise ValueError("rollouts_only and replay exclude each other")
        if self.rollouts_only and self.retain is not None:
            raise ValueError("retain does nothing with rollouts_only, which trains nothing")
        if self.max_staleness and (self.rollouts_only or self.replay is not None or self.in_process):
            raise ValueError("max_staleness does nothing with rollouts_only, replay or in_process")
        if self.in_process and self.weight_transport != "auto":
            raise ValueError("weight_transport does nothing with in_process")
        if self.in_process and self.trainer.num_ranks != 1:
            raise ValueError("in_process has one trainer rank: set trainer.num_ranks=1")
        return self
