"""The commands of `fewstep`: what each is called, its configuration class, and the function that does it.

Everything is named by `module:attribute` and imported when a command is chosen; a configuration class lives in a
module free of torch, Ray and MLflow, so that parsing and `--help` stay instant.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.platform.config import Config, load_config
from fewstep.platform.errors import ConfigError
from fewstep.platform.registry import nearest


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        summary: one line for `fewstep --help`.
        config: `module:Class`, a subclass of `Config`; imports no torch, Ray or MLflow.
        run: `module:function`, called with one instance of that class.
        ray: the job is one of a cluster. A Ray is started for it and ends with it, unless it is told to join another.
        needs_ray: whether a job of that configuration does use it.
        operands: keys that bare words on the command line set, in order, such as `PATH` of `fewstep inspect PATH`; with
            none a bare word is the configuration file.
        plan: `module:function`, called with the configuration after a dry run has printed it; empty = nothing to add.
    """

    summary: str
    config: str
    run: str
    ray: bool = False
    needs_ray: Callable[[Any], bool] = lambda _config: True
    operands: tuple[str, ...] = ()
    plan: str = ""

    def config_class(self) -> type[Config]:
        """The configuration class, imported now."""
        found: type[Config] = _attribute(self.config)
        return found

    def execute(self, config: Config, ray_address: str | None = None, ray_cpus: int | None = None) -> None:
        """Runs the job to its end inside the session it needs.

        Args:
            config: an instance of the command's configuration class.
            ray_address: `host:port` of a running Ray to join; None = a local one for this job.
            ray_cpus: logical CPUs of the local Ray; None = the cores this process may use.
        """
        run: Callable[[Config], None] = _attribute(self.run)
        with self._session(config, ray_address, ray_cpus):
            run(config)

    def show_plan(self, config: Config) -> None:
        """Prints what the job would do, where that is more than its configuration."""
        if self.plan:
            show: Callable[[Config], None] = _attribute(self.plan)
            show(config)

    def _session(
        self, config: Config, ray_address: str | None, ray_cpus: int | None
    ) -> AbstractContextManager[Any]:
        if not (self.ray and self.needs_ray(config)):
            return nullcontext()
        # Late, so that a command that needs no Ray does not read its module.
        from fewstep.cluster.session import ray_session

        return ray_session(ray_cpus, address=ray_address)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the main job: measure, refine on policy, measure again, track, serve, ask",
        "fewstep.cluster.demo:DemoConfig",
        "fewstep.cluster.demo:run",
    ),
    "prepare": Command(
        "tokenise and pack a corpus on disk for training",
        "fewstep.pipelines.prepare_settings:PrepareConfig",
        "fewstep.pipelines.prepare:run",
    ),
    "pretrain": Command(
        "train a model on masks and edits, from scratch or from a given one, on the family or a corpus",
        "fewstep.pipelines.settings:PretrainConfig",
        "fewstep.pipelines.pretrain:run",
        ray=True,
    ),
    "convert": Command(
        "turn an autoregressive model into a block-diffusion model, and train it to be one",
        "fewstep.pipelines.settings:ConvertConfig",
        "fewstep.pipelines.convert:run",
        ray=True,
        needs_ray=lambda config: bool(config.data),
        operands=("source",),
    ),
    "distill": Command(
        "train a model along the likeliest of its own orders of opening",
        "fewstep.pipelines.distill_settings:DistillConfig",
        "fewstep.pipelines.distill:run",
        ray=True,
    ),
    "export": Command(
        "write a trained model in Hugging Face layout, with a card made from its records",
        "fewstep.pipelines.export_settings:ExportConfig",
        "fewstep.pipelines.export:run",
        operands=("path",),
    ),
    "refine": Command(
        "train a model, on its own rollouts, to need fewer denoising steps",
        "fewstep.pipelines.settings:RefineConfig",
        "fewstep.pipelines.refine_job:command",
        ray=True,
        needs_ray=lambda config: not config.in_process,
    ),
    "evaluate": Command(
        "measure speed and quality on benchmarks, compare two models, prove the verifier",
        "fewstep.pipelines.evaluation_settings:EvaluateConfig",
        "fewstep.pipelines.evaluate:run",
        ray=True,
    ),
    "serve": Command(
        "serve a model over the OpenAI wire format",
        "fewstep.cluster.deploy:ServeConfig",
        "fewstep.cluster.deploy:run",
        plan="fewstep.cluster.serve_plan:show",
    ),
    "key": Command(
        "make an API key for `serve`, or take one away",
        "fewstep.cluster.keys:KeyConfig",
        "fewstep.cluster.keys:run",
        operands=("name",),
    ),
    "loadtest": Command(
        "load a server, and report tokens per second, latencies and errors",
        "fewstep.cluster.loadtest_settings:LoadtestConfig",
        "fewstep.cluster.loadtest:run",
        operands=("url",),
    ),
    "generate": Command(
        "continue one prompt and, if asked, show how the canvas was denoised",
        "fewstep.cluster.generate:GenerateConfig",
        "fewstep.cluster.generate:run",
    ),
    "inspect": Command(
        "say what a model folder holds: family, sizes, memory, what will run it",
        "fewstep.cluster.inspection:InspectConfig",
        "fewstep.cluster.inspection:run",
        operands=("model",),
    ),
    "sweep": Command(
        "run a job over a grid or random draws of its keys",
        "fewstep.cluster.sweep_settings:SweepConfig",
        "fewstep.cluster.sweep:run",
        ray=True,
    ),
    "ui": Command(
        "open MLflow on the project's runs",
        "fewstep.cluster.tracking_ui:UiConfig",
        "fewstep.cluster.tracking_ui:run",
    ),
    "doctor": Command(
        "say what would stop a job on this host or cluster, and the fix",
        "fewstep.cluster.doctor.settings:DoctorConfig",
        "fewstep.cluster.doctor.examination:run",
    ),
    "manifest": Command(
        "write a job's KubeRay manifest or Slurm script from its own configuration",
        "fewstep.cluster.manifests.settings:ManifestConfig",
        "fewstep.cluster.manifests.rendering:run",
    ),
    "up": Command(
        "start a cluster on this host and, over SSH, on others",
        "fewstep.cluster.lifecycle.settings:UpConfig",
        "fewstep.cluster.lifecycle.up:up",
    ),
    "status": Command(
        "say which hosts of the cluster are up",
        "fewstep.cluster.lifecycle.settings:StatusConfig",
        "fewstep.cluster.lifecycle.up:status",
    ),
    "down": Command(
        "end the cluster that `up` started",
        "fewstep.cluster.lifecycle.settings:ClusterFolder",
        "fewstep.cluster.lifecycle.up:down",
    ),
    "submit": Command(
        "run a job on the cluster, with this checkout's code",
        "fewstep.cluster.lifecycle.settings:SubmitConfig",
        "fewstep.cluster.lifecycle.jobs:submit",
    ),
    "logs": Command(
        "show a submitted job's output",
        "fewstep.cluster.lifecycle.settings:JobConfig",
        "fewstep.cluster.lifecycle.jobs:logs",
        operands=("id",),
    ),
    "cancel": Command(
        "end a submitted job",
        "fewstep.cluster.lifecycle.settings:JobConfig",
        "fewstep.cluster.lifecycle.jobs:cancel",
        operands=("id",),
    ),
    "plan": Command(
        "how many devices, which policy, what it costs, where it binds: a simulated fleet",
        "fewstep.cluster.plan.settings:PlanConfig",
        "fewstep.cluster.plan.job:run",
    ),
    "runs": Command(
        "list runs: status, time, quality, speed, registered versions",
        "fewstep.pipelines.tracking_settings:RunsConfig",
        "fewstep.pipelines.run_table:run",
    ),
    "compare": Command(
        "two runs beside each other: what differed, what came out, what it cost",
        "fewstep.pipelines.tracking_settings:CompareConfig",
        "fewstep.pipelines.run_comparison:run",
        operands=("first", "second"),
    ),
    "report": Command(
        "one run as a page: HTML without a network, and Markdown",
        "fewstep.pipelines.tracking_settings:ReportConfig",
        "fewstep.pipelines.run_report:run",
        operands=("run",),
    ),
    "promote": Command(
        "make a registered version the champion, if it is nowhere worse or the trade is accepted",
        "fewstep.pipelines.tracking_settings:PromoteConfig",
        "fewstep.pipelines.promote:run",
        operands=("name",),
    ),
}


def load_job(name: str, file: Path | None, overrides: Sequence[str]) -> Config:
    """The configuration of a job that can run on a cluster, from its file and `key=value` words.

    Raises:
        ConfigError: no such job, or a configuration that is none of its.
    """
    runnable = sorted(name for name, command in COMMANDS.items() if command.ray)
    if name not in runnable:
        raise ConfigError(
            "job", repr(name), ", ".join(runnable), f"choose one of them{nearest(name, runnable)}"
        )
    return load_config(COMMANDS[name].config_class(), file, overrides)


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
