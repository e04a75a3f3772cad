"""`fewstep evaluate`: a model's speed-quality frontier, or the proof that the verifier can be trusted."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.replica import ReplicaSettings
from fewstep.actors.replica_pool import ReplicaPool
from fewstep.actors.verifier import Verifier, VerifierPool
from fewstep.kernels.model.checkpoint import load_tokenizer
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.figures import draw_frontier
from fewstep.pipelines.film_strip import Strip, draw_film_strips, token_texts
from fewstep.pipelines.frontier import (
    SEQUENTIAL,
    Generate,
    accuracy_under_parallelism,
    cheapest_within,
    measure,
    point_record,
    quality_bar,
    sequential_point,
)
from fewstep.pipelines.frontier_table import frontier_table
from fewstep.pipelines.models import model_folder
from fewstep.pipelines.settings import EvaluateConfig
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.pipelines.tasks.files import read_tasks
from fewstep.pipelines.tasks.humaneval import load_humaneval, with_body
from fewstep.platform.artifacts import atomic_write_text, file_digest, git_commit, machine_info
from fewstep.platform.errors import FewstepError, RequestError
from fewstep.platform.records import DecodePolicy, FrontierPoint, Rollout, Task
from fewstep.platform.trajectories import write_rollouts

# What takes the place of a right body: a wrong answer, no answer, and two ways to leave that look like success.
BROKEN_BODIES = ("return None", "raise NotImplementedError", "raise SystemExit(0)", "import os; os._exit(0)")


def run(config: EvaluateConfig) -> None:
    """Measure, print a table, and write report.json, frontier.png, frontier.md, film.png and trajectories.parquet.

    With `humaneval` the verifier is tested instead, and humaneval.json written.

    Raises:
        UserError: a model, a task file or a prompt that cannot be used, before anything starts.
        FewstepError: the verifier passed a broken program or failed a right one.
    """
    if config.humaneval:
        tasks = load_humaneval()
        with VerifierPool(config.num_verifiers) as verifier:
            prove_verifier(config, tasks, verifier, verifier.isolation)
        return
    folder = model_folder(config.model, config.tracking_uri)
    model = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, model)
    tasks = choose_tasks(config)
    refuse_what_does_not_fit(config, tasks, model, tokenizer)
    identity = {
        "address": config.model or "embedded",
        "weights_sha256": file_digest(folder / "model.safetensors"),
    }
    settings = ReplicaSettings(max_sequences=config.max_sequences, num_cpus=config.replica_cpus)
    with (
        ReplicaPool(folder, config.num_replicas, run_id="evaluate", settings=settings) as replicas,
        VerifierPool(config.num_verifiers) as verifier,
    ):
        evaluate(config, identity, model, tokenizer, tasks, replicas.generate, verifier)


def choose_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks of the file, or held-out ones of the embedded family."""
    if config.tasks is not None:
        return read_tasks(config.tasks)
    return family_tasks(config.num_tasks, config.seed, held_out=True)


def refuse_what_does_not_fit(
    config: EvaluateConfig, tasks: Sequence[Task], model: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Raises a RequestError that names the first task whose prompt the model cannot serve."""
    for task in tasks:
        prompt = tuple(tokenizer.encode(task.prompt).ids)
        try:
            Request(task.task_id, prompt, SEQUENTIAL, config.max_tokens).validate(model)
        except RequestError as error:
            raise RequestError(
                f"task {task.task_id}, {error.field}", error.got, error.allowed, error.fix
            ) from error


def evaluate(
    config: EvaluateConfig,
    identity: dict[str, str],
    model: ModelConfig,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    generate: Generate,
    verifier: Verifier,
) -> list[FrontierPoint]:
    """Measure and write everything into `config.out`.

    Args:
        identity: what the report says of the model: its address and the digest of its weights.
    """
    name = identity["address"]
    print(f"measuring {name} on {len(tasks)} tasks", flush=True)
    start = time.monotonic()
    rollouts: dict[DecodePolicy, list[Rollout]] = {}
    points = measure(
        tasks,
        config.sweep.policies(),
        generate,
        verifier.verify,
        tokenizer,
        max_tokens=config.max_tokens,
        observe=lambda point, found: rollouts.update({point.policy: found}),
    )
    bar = quality_bar(points)
    report = {
        "model": identity,
        "tasks": {
            "source": "held-out specifications of the embedded family"
            if config.tasks is None
            else config.tasks.name,
            "num_tasks": len(tasks),
        },
        **_summary(points, bar),
        "seconds": time.monotonic() - start,
        "commit": git_commit(),
        "machine": machine_info(),
        "settings": config.model_dump(mode="json"),
    }
    everything = [rollout for found in rollouts.values() for rollout in found]
    write_rollouts(
        config.out / "trajectories.parquet", everything, {"model": identity, "commit": report["commit"]}
    )
    title = f"{name}: speed-quality frontier, {len(tasks)} tasks"
    draw_frontier(config.out / "frontier.png", points, bar=bar, title=title)
    _draw_film(config, points, bar, rollouts, tokenizer, model.block_size)
    atomic_write_text(config.out / "frontier.md", frontier_table(points, bar, "markdown") + "\n")
    atomic_write_text(config.out / "report.json", json.dumps(report, indent=2) + "\n")
    print(f"\n{frontier_table(points, bar)}\n\nwrote {config.out}", flush=True)
    return points


def _summary(points: Sequence[FrontierPoint], bar: float) -> dict[str, Any]:
    reference, cheapest = sequential_point(points), cheapest_within(points, bar) or sequential_point(points)
    return {
        "points": [point_record(point) for point in points],
        "bar": bar,
        "cheapest": cheapest.policy.label(),
        "speedup_vs_sequential": reference.forwards_per_answer / cheapest.forwards_per_answer,
        "accuracy_under_parallelism": accuracy_under_parallelism(points),
    }


def _draw_film(
    config: EvaluateConfig,
    points: Sequence[FrontierPoint],
    bar: float,
    rollouts: dict[DecodePolicy, list[Rollout]],
    tokenizer: Tokenizer,
    block_size: int,
) -> None:
    """One task under the reference and under the cheapest good policy; a task both solve, if there is one."""
    cheapest = cheapest_within(points, bar) or sequential_point(points)
    policies = dict.fromkeys((sequential_point(points).policy, cheapest.policy))
    answers = list(zip(*(rollouts[policy] for policy in policies), strict=True))
    chosen = next((row for row in answers if all(rollout.verdict.passed for rollout in row)), answers[0])
    strips = [
        Strip(
            f"{policy.label()}: {rollout.trajectory.num_tokens} tokens in {rollout.trajectory.forwards} forwards, "
            f"{rollout.verdict.outcome}",
            rollout.trajectory,
            token_texts(tokenizer, rollout.trajectory),
        )
        for policy, rollout in zip(policies, chosen, strict=True)
    ]
    draw_film_strips(config.out / "film.png", strips, block_size)


def prove_verifier(
    config: EvaluateConfig, tasks: Sequence[Task], verifier: Verifier, isolation: str
) -> dict[str, Any]:
    """Every canonical solution must pass, and none of them with its body replaced.

    Writes humaneval.json before it raises.

    Raises:
        FewstepError: names the programs that were judged wrongly.
    """
    print(f"{len(tasks)} HumanEval tasks, isolation {isolation}", flush=True)
    canonical = _judge(verifier, tasks, "canonical", should_pass=True)
    broken = {
        body: _judge(verifier, [with_body(task, body) for task in tasks], f"body = {body}", should_pass=False)
        for body in BROKEN_BODIES
    }
    report = {
        "canonical": canonical,
        "broken": broken,
        "num_tasks": len(tasks),
        "isolation": isolation,
        "num_verifiers": config.num_verifiers,
        "commit": git_commit(),
        "machine": machine_info(),
    }
    atomic_write_text(config.out / "humaneval.json", json.dumps(report, indent=2) + "\n")
    print(f"wrote {config.out / 'humaneval.json'}", flush=True)
    wrong = [f"{task_id} failed" for task_id in canonical["misjudged"]]
    wrong += [
        f"{task_id} passed with `{body}`" for body, found in broken.items() for task_id in found["misjudged"]
    ]
    if wrong:
        raise FewstepError(f"the verifier misjudged {len(wrong)} programs: {', '.join(wrong[:5])}")
    return report


def _judge(verifier: Verifier, tasks: Sequence[Task], name: str, *, should_pass: bool) -> dict[str, Any]:
    """Verdicts over the tasks' own solutions, summed up, with the ids of those judged wrongly."""
    start = time.perf_counter()
    verdicts = verifier.verify([(task, task.canonical_solution) for task in tasks])
    seconds = time.perf_counter() - start
    passed = sum(verdict.passed for verdict in verdicts)
    print(
        f"  {name:<32} {passed:>3} passed, {len(tasks) - passed:>3} failed  {seconds:6.2f} s  "
        f"{len(tasks) / seconds:6.1f} verdicts/s",
        flush=True,
    )
    return {
        "passed": passed,
        "failed": len(tasks) - passed,
        "misjudged": [
            task.task_id
            for task, verdict in zip(tasks, verdicts, strict=True)
            if verdict.passed != should_pass
        ],
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
        "isolation": sorted({verdict.isolation for verdict in verdicts}),
        "seconds": seconds,
        "verdicts_per_second": len(tasks) / seconds,
    }
