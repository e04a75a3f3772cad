"""What an evaluation leaves behind: report.json, report.md, answers.parquet, and what is printed at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fewstep.pipelines.evaluation import Answer, Contender, Measured, Subject
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.evaluation_summary import FrontierSummary, PolicyComparison
from fewstep.pipelines.evaluation_table import summary_table
from fewstep.pipelines.frontier import cheapest_within
from fewstep.pipelines.repair import RepairSummary
from fewstep.pipelines.significance import CONFIDENCE, NUM_RESAMPLES, PairedTest
from fewstep.pipelines.tasks.benchmark import Benchmark, Exclusion
from fewstep.platform.artifacts import atomic_file, atomic_write_text, git_commit, machine_info

_REASONS_SHOWN = 6


@dataclass
class Results:
    """Everything that has been measured.

    Attributes:
        frontiers: benchmark to slot to the model's frontier; measured: slot and benchmark to what that came from.
        comparisons: benchmark to the tests between the two models.
        repairs: slot to its repair; repair_tests: between the two.
    """

    subjects: list[Subject]
    benchmarks: dict[str, Benchmark]
    isolation: str
    baseline: Contender | None = None
    frontiers: dict[str, dict[str, FrontierSummary]] = field(default_factory=dict)
    measured: dict[tuple[str, str], Sequence[Measured]] = field(default_factory=dict)
    comparisons: dict[str, list[PolicyComparison]] = field(default_factory=dict)
    repairs: dict[str, list[RepairSummary]] = field(default_factory=dict)
    repair_tests: dict[str, PairedTest] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def add(self, benchmark: str, slot: str, frontier: FrontierSummary, measured: Sequence[Measured]) -> None:
        """Takes in one model's frontier on one benchmark."""
        self.frontiers.setdefault(benchmark, {})[slot] = frontier
        self.measured[slot, benchmark] = measured
        self.answers += [answer for one in measured for answer in one.answers]

    @property
    def contenders(self) -> list[Contender]:
        """The models, and the baseline if there is one."""
        return [*self.subjects, *([] if self.baseline is None else [self.baseline])]

    def named(self, by_slot: Mapping[str, Any]) -> dict[str, Any]:
        """The same with the models' addresses as keys, told apart where they are equal."""
        names = {contender.slot: contender.address for contender in self.contenders}
        if len(set(names.values())) < len(names):
            names = {slot: f"{slot}: {name}" for slot, name in names.items()}
        return {names[slot]: value for slot, value in by_slot.items()}


def report_record(config: EvaluateConfig, results: Results, seconds: float) -> dict[str, Any]:
    """The report as JSON."""
    return {
        "models": {contender.slot: contender.identity for contender in results.contenders},
        "benchmarks": {
            name: {
                **_benchmark_record(benchmark),
                "models": {slot: one.record() for slot, one in results.frontiers.get(name, {}).items()},
                "comparison": [one.record() for one in results.comparisons.get(name, ())],
            }
            for name, benchmark in results.benchmarks.items()
        },
        "repair": {
            "models": {slot: [one.record() for one in found] for slot, found in results.repairs.items()},
            "comparison": {name: test.record() for name, test in results.repair_tests.items()},
        },
        "statistics": {
            "interval": f"percentile bootstrap over tasks, {NUM_RESAMPLES} resamples",
            "confidence": CONFIDENCE,
            "comparison": "paired over tasks, Holm's correction within a benchmark",
        },
        "isolation": results.isolation,
        "seconds": seconds,
        "commit": git_commit(),
        "machine": machine_info(),
        "settings": config.model_dump(mode="json"),
    }


def _benchmark_record(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "source": benchmark.source,
        "digest": benchmark.digest,
        "answers_read_as": benchmark.answers.name,
        "num_tasks": len(benchmark.tasks),
        "num_excluded": len(benchmark.excluded),
        "excluded_by_reason": dict(_reasons(benchmark.excluded)),
        "excluded": [asdict(exclusion) for exclusion in benchmark.excluded],
    }


def _reasons(excluded: Sequence[Exclusion]) -> list[tuple[str, int]]:
    return Counter(exclusion.reason for exclusion in excluded).most_common()


def exclusions_text(benchmark: Benchmark) -> str:
    """How many rows of the source are no tasks here, and why; "" where all are."""
    if not benchmark.excluded:
        return ""
    reasons = _reasons(benchmark.excluded)
    lines = [
        f"{len(benchmark.excluded)} of {len(benchmark.tasks) + len(benchmark.excluded)} rows are not measured:"
    ]
    lines += [f"  {count:>5}  {reason}" for reason, count in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        rest = sum(count for _, count in reasons[_REASONS_SHOWN:])
        lines.append(
            f"  {rest:>5}  for {len(reasons) - _REASONS_SHOWN} other reasons (report.json lists every row)"
        )
    return "\n".join(lines)


def report_text(results: Results, style: str = "plain") -> str:
    """Tables, exclusions and comparisons, for the terminal or as Markdown."""
    parts = []
    for name, benchmark in results.benchmarks.items():
        heading = f"{name}: {len(benchmark.tasks)} tasks from {benchmark.source}"
        parts.append(f"## {heading}" if style == "markdown" else heading)
        if excluded := exclusions_text(benchmark):
            parts.append(f"```\n{excluded}\n```" if style == "markdown" else excluded)
        for address, frontier in results.named(results.frontiers.get(name, {})).items():
            parts.append(address)
            parts.append(
                summary_table(frontier, benchmark.first_test, "markdown" if style == "markdown" else "plain")
            )
        if results.comparisons.get(name):
            lines = [one.text() for one in results.comparisons[name]] + _out_of_reach(results, name)
            parts.append(_comparison_text(results, lines))
    for address, repairs in results.named(results.repairs).items():
        parts.append(f"{address}, repair of corrupted answers")
        parts.append("\n".join(_repair_line(one) for one in repairs))
    if results.repair_tests:
        parts.append(
            _comparison_text(
                results, [f"{name}: {test.verdict()}" for name, test in results.repair_tests.items()]
            )
        )
    return "\n\n".join(parts)


def _repair_line(one: RepairSummary) -> str:
    return (
        f"- {one.name}: {one.passed.text()} passed, {one.forwards.value:.2f} forwards a draft, "
        f"{one.restored:.3f} of the wrong tokens restored, {one.damaged:.4f} of the right ones damaged"
    )


def _out_of_reach(results: Results, benchmark: str) -> list[str]:
    """Says so where no policy of the second model is as good as the first one's at one token per step."""
    first, second = (results.frontiers[benchmark][subject.slot] for subject in results.subjects)
    if cheapest_within(second.points, first.bar) is not None:
        return []
    return [f"no policy of {results.subjects[1].address} reaches the first model's bar of {first.bar:.3f}"]


def _comparison_text(results: Results, lines: Sequence[str]) -> str:
    first, second = results.subjects
    head = f"{second.address} against {first.address}, paired over tasks:"
    return "\n".join([head, "", *(f"- {line}" for line in lines)])


def write_report(config: EvaluateConfig, results: Results, seconds: float) -> None:
    """report.json, report.md and answers.parquet into the run's folder."""
    record = report_record(config, results, seconds)
    write_answers(
        config.out / "answers.parquet",
        results.answers,
        {"models": record["models"], "commit": record["commit"]},
    )
    atomic_write_text(config.out / "report.md", report_text(results, "markdown") + "\n")
    atomic_write_text(config.out / "report.json", json.dumps(record, indent=2) + "\n")


def write_answers(path: Path, answers: Sequence[Answer], metadata: Mapping[str, Any]) -> None:
    """One row an answer: model, benchmark, task, policy, seed, sample, outcome class and the text. Columns are Answer's."""
    columns = {name: [getattr(answer, name) for answer in answers] for name in Answer.__dataclass_fields__}
    # Written by models and by the programs they wrote: a lone surrogate must not stop the run.
    for name in ("text", "answer", "detail"):
        columns[name] = [value.encode("utf-8", "backslashreplace").decode() for value in columns[name]]
    columns["tests"] = [list(tests) for tests in columns["tests"]]
    types = {"tests": pa.list_(pa.bool_()), "seed": pa.int64(), "sample": pa.int32()}
    arrays = {name: pa.array(values, type=types.get(name)) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({"fewstep.metadata": json.dumps(dict(metadata))})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
