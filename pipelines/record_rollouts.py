"""`fewstep refine rollouts_only=true`: the rollouts of a model as it is, judged and credited, for a later replay."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from fewstep.actors.verifier import Verifier
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.frontier import Generate
from fewstep.pipelines.objectives.credit import RefineObjective
from fewstep.pipelines.refine import credited, give_credit, rollout_metrics
from fewstep.pipelines.rollouts import RolloutMaker, rollout_file
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSource
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.tracking import Tracker
from fewstep.platform.trajectories import describe_rollouts, write_rollouts


def record_rollouts(
    config: RefineConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    source: TaskSource,
    objective: RefineObjective,
    generate: Generate,
    verifier: Verifier,
    tracker: Tracker,
) -> None:
    """Writes one file a step, at the curriculum's first threshold, and rollouts.json, which lists them with their
    digests. Files that are there are kept: an interrupted recording goes on behind them."""
    maker = RolloutMaker(config, source, tokenizer, generate, verifier.verify)
    folder, threshold = config.out / "rollouts", config.curriculum.start
    for step in range(config.steps):
        path = rollout_file(folder, step)
        if path.is_file():
            continue
        batch = maker.make(step, threshold, step / config.steps)
        credits = give_credit(objective, batch)
        write_rollouts(path, credited(credits), batch.facts(step))
        metrics = rollout_metrics(credits, 0)
        tracker.log_metrics(metrics, step + 1)
        print(
            f"rollouts {step + 1:>4}/{config.steps}  pass {metrics['reward/pass_rate']:.2f}"
            f"  forwards {metrics['rollout/forwards_per_answer']:.2f}  {path.name}",
            flush=True,
        )
    index = describe_rollouts(folder.glob("step_*.parquet"), config.out)
    facts = {"files": index, "isolation": verifier.isolation, "block_size": model.block_size}
    atomic_write_text(config.out / "rollouts.json", json.dumps(facts, indent=1) + "\n")
    tracker.log_artifact(config.out / "rollouts.json")
    print(f"wrote {len(index)} files to {folder}; train on them with replay={folder}", flush=True)
