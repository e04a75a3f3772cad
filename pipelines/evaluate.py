"""`fewstep evaluate`: the speed and quality of a model, or of two, on benchmarks; or the proof that verdicts can be trusted."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from fewstep.actors.replica import ReplicaSettings
from fewstep.actors.replica_pool import ReplicaPool
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.verifier import Verifier, VerifierPool
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines.baseline import SLOT, Baseline, open_baseline
from fewstep.pipelines.evaluation import (
    Contender,
    Subject,
    measure_policy,
    policies,
    prepare,
    without,
)
from fewstep.pipelines.evaluation_figure import draw_evaluation
from fewstep.pipelines.evaluation_film import draw_film
from fewstep.pipelines.evaluation_report import Results, exclusions_text, report_text, write_report
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.evaluation_summary import compare_models, summarise_frontier
from fewstep.pipelines.evaluation_tracking import (
    log_comparison,
    log_frontier,
    log_repair,
    log_report,
    open_tracker,
)
from fewstep.pipelines.frontier import Generate
from fewstep.pipelines.models import pinned_model
from fewstep.pipelines.progress import read_progress, write_progress
from fewstep.pipelines.repair import compare_repairs, corrupted, measure_repair
from fewstep.pipelines.self_test import refuse_misjudged, self_test
from fewstep.pipelines.settings import RECORDING
from fewstep.pipelines.tasks.benchmark import Benchmark, unrunnable
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.pipelines.tasks.prepared import Prepared
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info, weights_digest
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import Tracker

OpenEngine = Callable[[Subject], AbstractContextManager[Generate]]
# Where the answers are computed and kept changes none of them.
_FREE = (*RECORDING, "num_replicas", "replica_cpus", "max_sequences", "num_verifiers", "k", "model", "compare", "baseline")  # fmt: skip


def run(config: EvaluateConfig) -> None:
    """Measures, prints tables, and writes report.json, report.md, frontier.png, answers.parquet and the trajectories.

    With `self_test` the benchmarks' own solutions are judged instead, and self-test.json written.

    Raises:
        UserError: a model, a benchmark or a folder that cannot be used, before anything is measured.
        FewstepError: the verifier passed a broken program or failed a right one.
    """
    benchmarks = [load_benchmark(choice) for choice in config.benchmarks if choice.name != "repair"]
    if config.self_test:
        with VerifierPool(config.num_verifiers) as verifier:
            prove(config, benchmarks, verifier, verifier.isolation)
        return
    subjects = open_subjects(config)
    settings = ReplicaSettings(
        max_sequences=config.max_sequences, num_cpus=config.replica_cpus, dtype=config.dtype
    )

    @contextmanager
    def engine(subject: Subject) -> Iterator[Generate]:
        with ReplicaPool(subject.folder, config.num_replicas, run_id="evaluate", settings=settings) as pool:
            yield pool.generate

    baseline = None if config.baseline is None else open_baseline(config.baseline, config.max_sequences)
    with VerifierPool(config.num_verifiers) as verifier:
        evaluate(config, subjects, benchmarks, engine, verifier, verifier.isolation, baseline)


def evaluate(
    config: EvaluateConfig,
    subjects: list[Subject],
    benchmarks: Sequence[Benchmark],
    engine: OpenEngine,
    verifier: Verifier,
    isolation: str,
    baseline: Baseline | None = None,
) -> Results:
    """The whole measurement, from where an earlier one in `config.out` was interrupted.

    Args:
        engine: a context per model that gives what turns requests into trajectories.
        baseline: measured last, on every benchmark but infilling, which it cannot do.
    """
    started = time.monotonic()
    contenders: list[Contender] = [*subjects, *([] if baseline is None else [baseline])]
    benchmarks, prepared = plan(config, contenders, benchmarks, verifier)
    results = Results(subjects, {benchmark.name: benchmark for benchmark in benchmarks}, isolation, baseline)
    resumed = begin(config, contenders, benchmarks)
    with open_tracker(config, contenders, benchmarks, resumed=resumed) as tracker:
        measure = partial(_measure, config, prepared, results, verifier, tracker)
        for subject in subjects if benchmarks else ():
            with engine(subject) as generate:
                measure(subject, generate, policies(config))
        if baseline is not None:
            measure(baseline, baseline.engine.generate, policies(config)[:1])
        for choice in config.benchmarks:
            if choice.name == "repair":
                _repair(config, choice, subjects, results, verifier)
                for slot, summaries in results.repairs.items():
                    log_repair(tracker, slot, summaries)
        if config.compare is not None:
            _compare(results)
            for name, comparisons in results.comparisons.items():
                log_comparison(tracker, name, comparisons)
        _conclude(config, results, time.monotonic() - started)
        log_report(tracker, config)
    return results


def _measure(
    config: EvaluateConfig,
    prepared: Mapping[tuple[str, str], Sequence[Prepared]],
    results: Results,
    verifier: Verifier,
    tracker: Tracker,
    contender: Contender,
    generate: Generate,
    chosen: Sequence[DecodePolicy],
) -> None:
    """One contender on every benchmark that it was prepared for."""
    for name, benchmark in results.benchmarks.items():
        tasks = prepared.get((contender.slot, name))
        if tasks is None:
            continue
        print(f"{contender.address} on {name}, {len(tasks)} tasks", flush=True)
        found = [
            measure_policy(contender, benchmark, tasks, policy, config, generate, verifier)
            for policy in chosen
        ]
        frontier = summarise_frontier(found, benchmark, config.k)
        results.add(name, contender.slot, frontier, found)
        log_frontier(tracker, name, contender.slot, frontier)


def open_subjects(config: EvaluateConfig) -> list[Subject]:
    """The models, pinned: an alias that moves while they are measured changes nothing.

    Raises:
        UserError: an address or a folder that is no model.
    """
    slots = ("model",) if config.compare is None else ("first", "second")
    subjects = []
    for slot, address in zip(slots, config.models, strict=True):
        pinned, folder = pinned_model(address, config.tracking_uri)
        model = ModelConfig.load(folder)
        subjects.append(
            Subject(
                address=address or "embedded",
                pinned=pinned,
                folder=folder,
                weights_sha256=weights_digest(folder),
                slot=slot,
                model=model,
                tokenizer=load_tokenizer(folder, model),
                chat=ChatTemplate(folder),
            )
        )
    return subjects


def plan(
    config: EvaluateConfig,
    contenders: Sequence[Contender],
    benchmarks: Sequence[Benchmark],
    verifier: Verifier,
) -> tuple[list[Benchmark], dict[tuple[str, str], list[Prepared]]]:
    """What can be measured: tasks in a language that runs here and within the context of every model.

    Returns:
        The benchmarks without the rest, each row of which is listed with its reason; the tasks in each model's tokens,
        by slot and benchmark: none of infilling for the baseline.
    Raises:
        TaskFileError: nothing of a benchmark is left.
    """
    planned, prepared = [], {}
    for benchmark in benchmarks:
        benchmark = without(benchmark, unrunnable(benchmark.tasks, verifier))
        ready = {
            contender.slot: prepare(contender, benchmark, config)
            for contender in contenders
            if not (benchmark.infill and contender.slot == SLOT)
        }
        too_long = {one.task_id: one for _, excluded in ready.values() for one in excluded}
        benchmark = without(benchmark, list(too_long.values()))
        if excluded := exclusions_text(benchmark):
            print(f"{benchmark.name}: {excluded}", flush=True)
        if not benchmark.tasks:
            raise TaskFileError(
                benchmark.name, "no task that can be measured", "at least one", "see the reasons above"
            )
        planned.append(benchmark)
        for slot, (tasks, _) in ready.items():
            prepared[slot, benchmark.name] = [item for item in tasks if item.task.task_id not in too_long]
    return planned, prepared


def begin(config: EvaluateConfig, contenders: Sequence[Contender], benchmarks: Sequence[Benchmark]) -> bool:
    """Makes `config.out` ready: for going on, if it holds the same evaluation, else from the start. Whether it goes on.

    Raises:
        ConfigError: it holds another one.
    """
    same = config.model_dump(mode="json", exclude=set(_FREE))
    weights = [contender.weights_sha256 for contender in contenders]
    data = [(benchmark.digest, len(benchmark.tasks)) for benchmark in benchmarks]
    fingerprint = json.dumps([same, weights, data], sort_keys=True)
    config.out.mkdir(parents=True, exist_ok=True)
    if read_progress(config.out, fingerprint, resume=config.resume) is None:
        shutil.rmtree(config.out / "trajectories", ignore_errors=True)
        write_progress(config.out, fingerprint, {"models": [contender.identity for contender in contenders]})
        return False
    print(f"going on with what {config.out} holds", flush=True)
    return True


def _repair(
    config: EvaluateConfig,
    choice: BenchmarkChoice,
    subjects: Sequence[Subject],
    results: Results,
    verifier: Verifier,
) -> None:
    tasks = load_benchmark(choice).tasks
    for subject in subjects:
        model, tokenizer = load_model(subject.folder)
        print(f"{subject.address} on repair, {len(tasks)} corrupted answers", flush=True)
        drafts = corrupted(tasks, tokenizer, model.config, choice.corrupted_share, choice.seed)
        results.repairs[subject.slot] = measure_repair(
            model, tokenizer, drafts, config.edit_thresholds, verifier.verify
        )
    if len(subjects) == 2:
        results.repair_tests = compare_repairs(*results.repairs.values())


def _compare(results: Results) -> None:
    for name in results.benchmarks:
        summaries = [results.frontiers[name][slot] for slot in ("first", "second")]
        results.comparisons[name] = compare_models(
            results.measured["first", name], results.measured["second", name], summaries, name
        )


def _conclude(config: EvaluateConfig, results: Results, seconds: float) -> None:
    draw_evaluation(
        config.out / "frontier.png",
        {name: results.named(frontiers) for name, frontiers in results.frontiers.items()},
        results.named(results.repairs),
    )
    for name, frontiers in list(results.frontiers.items())[:1]:
        subject = results.subjects[-1]
        draw_film(config, subject, name, frontiers[subject.slot])
    write_report(config, results, seconds)
    print(f"\n{report_text(results)}\n\nwrote {config.out}", flush=True)


def prove(
    config: EvaluateConfig, benchmarks: Sequence[Benchmark], verifier: Verifier, isolation: str
) -> list[dict[str, Any]]:
    """Judges the benchmarks' own solutions, right and broken, and writes self-test.json before it raises.

    Raises:
        FewstepError: names the programs that were judged wrongly.
    """
    print(f"isolation {isolation}", flush=True)
    reports = [self_test(benchmark, verifier) for benchmark in benchmarks]
    record = {
        "benchmarks": reports,
        "isolation": isolation,
        "num_verifiers": config.num_verifiers,
        "commit": git_commit(),
        "machine": machine_info(),
    }
    path = config.out / "self-test.json"
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}", flush=True)
    for benchmark, report in zip(benchmarks, reports, strict=True):
        refuse_misjudged(benchmark, report)
    return reports
