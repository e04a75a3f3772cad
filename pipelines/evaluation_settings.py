"""Configuration of `fewstep evaluate`; free of torch and Ray, so that the command line reads it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from fewstep.kernels.model.config import ComputeDtype
from fewstep.pipelines.settings import Sweep
from fewstep.pipelines.tasks.choice import BenchmarkChoice, spelled_out
from fewstep.platform.config import Config

BASELINE_MARK = "(autoregressive)"
"""Ends the name of a baseline in tables and figures."""


class EvaluateConfig(Config):
    """Speed and quality of a model, or of two, on benchmarks; or the verifier's own test on their solutions."""

    model: str = ""
    """A model folder, or models:/NAME@ALIAS; empty = the model shipped with the package."""
    compare: tuple[str, str] | None = None
    """Two models instead of one: the same tasks, tested in pairs."""
    baseline: Path | None = None
    """Folder of an autoregressive model in Hugging Face's layout: the same tasks, one token a forward, through
    transformers (`pip install 'fewstep[baseline]'`). null = none."""
    dtype: ComputeDtype = "saved"
    """What the models under test compute in; saved = as their weights are stored."""
    tracking_uri: str = ""
    """MLflow store of the run, and of models:/ addresses; empty = MLFLOW_TRACKING_URI, else the project's."""
    experiment: str = "fewstep"
    """MLflow experiment; made when missing."""
    out: Path = Path("runs/evaluate")
    """Folder for the report, the figure, the answers and the trajectories."""
    benchmarks: Annotated[tuple[BenchmarkChoice, ...], BeforeValidator(spelled_out)] = (
        BenchmarkChoice(name="family"),
    )
    """What is measured: names, `name:path`, or mappings with the keys of a benchmark."""
    self_test: bool = False
    """Instead of measuring a model, judge the benchmarks' own solutions, right and broken."""
    num_samples: int = Field(default=1, ge=1)
    """Answers a task, a policy and a seed (n)."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Every seed is a run of its own; their spread is reported."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    """pass@k that are reported; at most num_samples x seeds."""
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    """0 = greedy, which has one answer a task."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the probability that is sampled from."""
    max_tokens: int = Field(default=80, ge=1)
    """Tokens of an answer at most; the longest right answer of the embedded family has 63."""
    infill_tokens: int | None = Field(default=None, ge=1)
    """Infilling: masks between prefix and suffix; null = as many as the canonical answer has, which tells its length."""
    sweep: Sweep = Sweep()
    edit_thresholds: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = (0.3, 0.5, 0.7, 0.9)
    """repair: a token is replaced by another one of more than this confidence."""
    tasks_per_part: int = Field(default=64, ge=1)
    """Tasks whose answers are saved at once; what an interruption costs at most."""
    resume: bool = True
    """Go on with what is saved in `out`; the configuration and the weights must be the same."""
    num_replicas: int = Field(default=2, ge=1)
    """Engines that answer."""
    replica_cpus: float = Field(default=0.4, gt=0.0)
    """Logical CPUs each of them reserves; two and their verifiers fit on a single core."""
    max_sequences: int = Field(default=48, ge=1)
    """Requests that share a forward in one replica."""
    num_verifiers: int = Field(default=2, ge=1)
    """Sandboxes that judge."""

    @model_validator(mode="after")
    def _makes_sense(self) -> EvaluateConfig:
        answers = self.num_samples * len(self.seeds)
        if not self.benchmarks:
            raise ValueError("benchmarks must name at least one")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ")
        if self.temperature == 0.0 and answers > 1:
            raise ValueError(
                "temperature 0 has one answer a task; raise temperature, or ask for one sample and one seed"
            )
        if max(self.k, default=0) > answers:
            raise ValueError(f"k must be at most num_samples x seeds, {answers}")
        if self.compare is not None and self.model:
            raise ValueError("model and compare exclude each other")
        names = [
            (choice.name, choice.chosen_variant, choice.chat, choice.languages) for choice in self.benchmarks
        ]
        if len(set(names)) != len(names):
            raise ValueError("a benchmark is named twice")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The addresses, in order: one, or the two that are compared."""
        return (self.model,) if self.compare is None else self.compare
