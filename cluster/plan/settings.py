"""Configuration of `fewstep plan`; free of torch and Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fewstep.platform.config import Config

DeviceName = Literal["a100", "h20", "h100", "h200", "b200", "l4", "cpu"]


class PlannedModel(Config):
    """Sizes of the model that is planned for."""

    folder: str = ""
    """A model folder, or models:/NAME@ALIAS, whose sizes replace the ones below; empty = the ones below."""
    name: str = "SDAR-8B"
    """What the report calls it."""
    parameters: float = Field(default=8.2e9, gt=0)
    active_parameters: float = Field(default=8.2e9, gt=0)
    """Those a token meets; fewer than `parameters` in a mixture of experts."""
    expert_parameters: float = Field(default=0.0, ge=0)
    """Of `parameters`, those in routed experts."""
    num_hidden_layers: int = Field(default=36, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    num_attention_heads: int = Field(default=32, ge=1)
    num_key_value_heads: int = Field(default=8, ge=1)
    head_dim: int = Field(default=128, ge=1)
    vocab_size: int = Field(default=151936, ge=1)
    num_experts: int = Field(default=0, ge=0)
    num_experts_per_tok: int = Field(default=0, ge=0)
    weight_bytes_per_parameter: float = Field(default=2.0, gt=0)
    """2 = bf16, 1 = fp8."""
    kv_bytes_per_number: float = Field(default=2.0, gt=0)

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.weight_bytes_per_parameter

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one position over all layers."""
        return (
            2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * self.kv_bytes_per_number
        )

    @model_validator(mode="after")
    def _experts_fit(self) -> PlannedModel:
        if self.active_parameters > self.parameters or self.expert_parameters > self.parameters:
            raise ValueError("active_parameters and expert_parameters are parts of parameters")
        if bool(self.num_experts) != bool(self.num_experts_per_tok and self.expert_parameters):
            raise ValueError("num_experts, num_experts_per_tok and expert_parameters are set together")
        return self


class PolicyProfile(Config):
    """What one decode policy does to this model: measured by `fewstep evaluate`, or published."""

    block_size: int = Field(ge=1)
    threshold: float = Field(gt=0.0, le=1.0)
    tokens_per_forward: float = Field(ge=0.1)
    """Committed tokens per forward of a request alone."""
    quality: float = Field(ge=0.0, le=1.0)
    """pass@1 or another score, the same for all profiles."""

    @model_validator(mode="after")
    def _at_most_a_block(self) -> PolicyProfile:
        if self.tokens_per_forward > self.block_size:
            raise ValueError("tokens_per_forward cannot be above block_size: a forward opens one block")
        return self

    def label(self) -> str:
        return f"block {self.block_size}, threshold {self.threshold:g}"


class Workload(Config):
    """What is asked of the fleet."""

    tokens_per_s: float = Field(default=50_000.0, gt=0)
    """Committed tokens that all users together take per second."""
    p95_s: float = Field(default=6.0, gt=0)
    """95 of 100 answers are complete within this many seconds of their arrival."""
    min_quality: float = Field(default=0.0, ge=0.0, le=1.0)
    """Profiles below are not considered."""
    prompt_tokens: int = Field(default=512, ge=1)
    shared_prompt_tokens: int = Field(default=0, ge=0)
    """Of them, those that the prefix cache holds already."""
    answer_tokens: int = Field(default=256, ge=1)
    """Mean; lengths are gamma distributed."""
    answer_spread: float = Field(default=0.5, ge=0.0, le=2.0)
    """Standard deviation of answer lengths over their mean."""

    @model_validator(mode="after")
    def _shared_fits(self) -> Workload:
        if self.shared_prompt_tokens > self.prompt_tokens:
            raise ValueError("shared_prompt_tokens must not be above prompt_tokens")
        return self


class PlannedFleet(Config):
    """What it may be built from, and what happens to it."""

    devices: tuple[DeviceName, ...] = ("h100", "h200", "h20", "b200", "a100", "l4")
    tensor_parallel: int = Field(default=1, ge=1)
    """Devices of one replica; all on one node."""
    max_sequences: int = Field(default=128, ge=1)
    """Requests that one replica denoises together."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """USD for a device hour; null = the assumption beside each device."""
    memory_share: float = Field(default=0.9, gt=0.0, le=1.0)
    """Of a device's memory, for weights and pages."""
    compute_share: float = Field(default=0.6, gt=0.0, le=1.0)
    """Of a device's peak arithmetic that matrix products reach."""
    bandwidth_share: float = Field(default=0.85, gt=0.0, le=1.0)
    """Of peak bandwidth that weight reads reach: vLLM's DiffusionGemma, 26 GB a step on an H100, takes 9.1 ms where the
    peak allows 7.8."""
    overhead_s: float = Field(default=1.5e-3, ge=0)
    """Host time a step that no device hides."""
    link_latency_s: float = Field(default=1e-5, ge=0)
    """Of one all-reduce between tensor-parallel ranks."""
    mean_hours_between_failures: float = Field(default=1000.0, gt=0)
    """Of one replica."""
    restart_s: float = Field(default=120.0, ge=0)
    """From a replica's death to its first step."""
    push_every_s: float | None = Field(default=None, gt=0)
    """New weights come this often; null = never."""
    network_bytes_per_s: float = Field(default=12.5e9, gt=0)
    """Of one node's link to the others, one direction; 12.5e9 = 100 Gbit/s."""
    replicas_per_node: int = Field(default=8, ge=1)


class RefineShape(Config):
    """A refinement job, for the ratio of trainer to replica devices."""

    num_devices: int = Field(default=64, ge=2)
    rollouts_per_step: int = Field(default=1024, ge=1)
    states_per_rollout: float = Field(default=2.0, gt=0)
    """Noisy copies of each answer that the estimator trains on."""
    trainer_share: float = Field(default=0.35, gt=0.0, le=1.0)
    """Of peak arithmetic that training reaches (MFU)."""
    verify_s: float = Field(default=2.0, ge=0)
    """The last answers' verdicts, which overlap with nothing."""
    bytes_per_trained_parameter: float = Field(default=16.0, gt=0)
    """float32 weight, gradient and AdamW's two moments, over all ranks together (ZeRO)."""


class ControlPlane(Config):
    """What one controller and one weight push cost, for the question where a large fleet binds."""

    num_replicas: tuple[Annotated[int, Field(ge=1)], ...] = (10, 100, 1000, 10_000)
    fan_out: int = Field(default=2, ge=1)
    """Children of a node in the tree that weights travel down."""
    bucket_bytes: float = Field(default=64e6, gt=0)
    """A node passes a bucket on while the next one arrives."""
    hop_s: float = Field(default=2e-3, ge=0)
    """Latency of one bucket's call from node to node."""
    call_s: float = Field(default=2.5e-4, gt=0)
    """Of the controller's thread, for one remote call and its answer."""
    heartbeat_s: float = Field(default=2.0, gt=0)
    decision_s: float = Field(default=5e-7, ge=0)
    """Of the fleet's state machine, a replica and tick; `python bench/fleet_scale.py` measures it."""
    load_s_per_gb: float = Field(default=0.05, ge=0)
    """A replica writes arrived weights into its tensors and proves their checksum."""
    object_put_bytes_per_s: float = Field(default=1.0e9, gt=0)
    """The driver writes a push into the object store."""


class PlanConfig(Config):
    """The model, its policies, the demand and the means."""

    out: Path = Path("runs/plan")
    """Folder of report.json, report.md and the figures."""
    seed: int = Field(default=0, ge=0)
    num_requests: int = Field(default=400, ge=50)
    """Simulated at each load."""
    max_simulated_replicas: int = Field(default=16, ge=1)
    """The fleet that confirms a size has at most as many; a larger one behaves as several of them."""
    model: PlannedModel = PlannedModel()
    profiles: tuple[PolicyProfile, ...] = (
        PolicyProfile(block_size=4, threshold=0.9, tokens_per_forward=2.28, quality=0.718),
    )
    workload: Workload = Workload()
    fleet: PlannedFleet = PlannedFleet()
    refine: RefineShape = RefineShape()
    control: ControlPlane = ControlPlane()

    @model_validator(mode="after")
    def _something_to_choose(self) -> PlanConfig:
        if not any(profile.quality >= self.workload.min_quality for profile in self.profiles):
            raise ValueError("no profile reaches workload.min_quality")
        if not self.fleet.devices:
            raise ValueError("fleet.devices is empty")
        return self
