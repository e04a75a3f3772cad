"""`fewstep evaluate`: what it measures and writes, what it refuses, how it goes on, and how it compares two models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.judges import JudgeChoice
from fewstep.actors.verifier import LocalVerifier
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import embedded_model, load_model, save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.baseline import open_baseline
from fewstep.pipelines.evaluate import evaluate, open_subjects, plan, prove, run
from fewstep.pipelines.evaluation import Subject, policies, prepare
from fewstep.pipelines.evaluation_report import Results
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.evaluation_summary import by_task
from fewstep.pipelines.frontier import Generate
from fewstep.pipelines.publish import publish_model
from fewstep.pipelines.settings import Sweep
from fewstep.pipelines.tasks.benchmark import Benchmark
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.pipelines.tasks.vocabulary import EOS, MASK, PAD, build_tokenizer
from fewstep.platform.errors import CheckpointError, ConfigError, FewstepError, TaskFileError
from fewstep.platform.mlflow_store import open_client, sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy, Task, Trajectory, Verdict, WeightVersion
from fewstep.platform.trajectories import read_metadata, read_rollouts

SWEEP = Sweep(thresholds=(0.9, 0.3), tokens_per_step=())
FILES = [
    "answers.parquet", "artifacts", "config.yaml", "environment.txt", "film.png", "frontier.png", "mlflow.db", "progress.json",
    "report.json", "report.md", "spool", "tracking.json", "trajectories",
]  # fmt: skip


@pytest.fixture(scope="module")
def verifier() -> Iterator[LocalVerifier]:
    with LocalVerifier() as found:
        yield found


def tiny_model(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A model that has learned nothing."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    mask, eos, pad = (tokenizer.token_to_id(token) for token in (MASK, EOS, PAD))
    config = ModelConfig(**{
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "max_position_embeddings": 96,
        "block_size": 8, "mask_token_id": mask, "eos_token_id": eos, "pad_token_id": pad, **settings,
    })  # fmt: skip
    model = Transformer(config)
    model.initialise(seed)
    save_model(folder, model.state_dict(), config, tokenizer)
    return folder


@contextmanager
def engine(subject: Subject) -> Iterator[Generate]:
    """One engine in this process."""
    model, tokenizer = load_model(subject.folder)
    yield Engine(model, tokenizer, weight_version=WeightVersion("test", 0, "0")).generate


def counting(calls: list[int], stop_after: int | None = None, hook: Callable[[], None] | None = None) -> Any:
    """An engine that notes how many requests each call had, and is interrupted after some calls."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[Generate]:
        with engine(subject) as generate:

            def counted(requests: Sequence[Request]) -> list[Trajectory]:
                if stop_after is not None and len(calls) == stop_after:
                    raise KeyboardInterrupt
                calls.append(len(requests))
                if hook is not None:
                    hook()
                return generate(requests)

            yield counted

    return opened


def measure(config: EvaluateConfig, verifier: LocalVerifier, opened: Any = engine) -> Results:
    benchmarks = [load_benchmark(choice) for choice in config.benchmarks if choice.name != "repair"]
    baseline = None if config.baseline is None else open_baseline(config.baseline, config.max_sequences)
    return evaluate(config, open_subjects(config), benchmarks, opened, verifier, verifier.isolation, baseline)


def config_for(out: Path, **settings: Any) -> EvaluateConfig:
    family = {"name": "family", "num_tasks": 6}
    return EvaluateConfig.model_validate(
        {
            "out": out,
            "benchmarks": [family],
            "sweep": SWEEP,
            "tasks_per_part": 4,
            "tracking_uri": f"sqlite:///{out}/mlflow.db",
            **settings,
        }
    )


def report_of(config: EvaluateConfig) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((config.out / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, verifier: LocalVerifier
) -> tuple[EvaluateConfig, Results]:
    """The embedded model on ten tasks."""
    config = config_for(tmp_path_factory.mktemp("measured") / "run")
    return config, measure(config, verifier)


def test_a_measurement_leaves_report_figures_answers_and_trajectories(
    measured: tuple[EvaluateConfig, Results],
) -> None:
    config, results = measured
    assert sorted(path.name for path in config.out.iterdir()) == FILES
    report = report_of(config)
    family = report["benchmarks"]["family"]
    assert (family["num_tasks"], family["num_excluded"], len(family["digest"])) == (6, 0, 64)
    points = family["models"]["model"]["points"]
    assert [point["label"] for point in points] == ["static_1", "threshold_0.9", "threshold_0.3"]
    assert all(sum(point["outcomes"].values()) == 6 for point in points)
    assert points[0]["pass_at_1"] >= 0.8  # the embedded model at one token per step
    for point in points:
        interval = point["pass_at_k"]["1"]
        assert interval["low"] <= point["pass_at_1"] == interval["value"] <= interval["high"]
    assert points[0]["dominated"] == (points[1]["pass_at_1"] >= points[0]["pass_at_1"])
    assert not points[2]["dominated"]  # nothing is cheaper
    assert report["models"]["model"]["pinned"] == "embedded"
    assert len(report["models"]["model"]["weights_sha256"]) == 64
    assert report["settings"]["sweep"]["thresholds"] == [0.9, 0.3]
    text = (config.out / "report.md").read_text()
    assert "| threshold_0.9 |" in text
    assert "95% interval" in text
    assert results.frontiers["family"]["model"].points[0].pass_at_1 == points[0]["pass_at_1"]


def test_the_answers_are_one_table_with_outcome_classes(measured: tuple[EvaluateConfig, Results]) -> None:
    config, _ = measured
    frame = pd.read_parquet(config.out / "answers.parquet")
    assert len(frame) == 18
    points = report_of(config)["benchmarks"]["family"]["models"]["model"]["points"]
    for point in points:
        rows = frame[frame.policy == point["label"]]
        assert rows.passed.mean() == pytest.approx(point["pass_at_1"])
        assert rows.forwards.mean() == pytest.approx(point["forwards_per_answer"])
        assert rows.outcome.value_counts().to_dict() == point["outcomes"]
    assert set(frame.columns) >= {
        "benchmark",
        "task_id",
        "policy",
        "seed",
        "sample",
        "outcome",
        "text",
        "answer",
        "isolation",
    }
    part = config.out / "trajectories" / "model" / "family" / "static_1" / "000004.parquet"
    rollouts = read_rollouts(part)
    assert [rollout.task_id for rollout in rollouts] == frame.task_id.tolist()[4:6]
    assert (
        read_metadata(part)["model"]["weights_sha256"]
        == report_of(config)["models"]["model"]["weights_sha256"]
    )


def test_the_run_is_in_mlflow(measured: tuple[EvaluateConfig, Results]) -> None:
    config, _ = measured
    client = open_client(sqlite_uri(config.out), create=False)
    (run,) = client.search_runs([client.get_experiment_by_name("fewstep").experiment_id])
    points = report_of(config)["benchmarks"]["family"]["models"]["model"]["points"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/family/static_1/pass_at_1"] == pytest.approx(points[0]["pass_at_1"])
    assert run.data.metrics["eval/family/threshold_0.9/forwards_per_answer"] == pytest.approx(
        points[1]["forwards_per_answer"]
    )
    assert run.data.tags["fewstep.evaluated.model.pinned"] == "embedded"
    (lineage,) = run.inputs.dataset_inputs
    assert lineage.dataset.name == "family"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"report.json", "report.md", "answers.parquet", "config.yaml"} <= names


def without_clock(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what the machine's speed decides."""
    points = [
        {key: value for key, value in point.items() if key != "tokens_per_second"}
        for point in report["benchmarks"]["family"]["models"]["model"]["points"]
    ]
    return {"points": points, "models": report["models"]}


def test_an_interrupted_evaluation_goes_on_where_it_was(
    tmp_path: Path,
    verifier: LocalVerifier,
    measured: tuple[EvaluateConfig, Results],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_for(tmp_path / "run")
    before: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        measure(config, verifier, counting(before, stop_after=4))
    assert before == [4, 2, 4, 2]
    assert not (config.out / "report.json").exists()
    client = open_client(sqlite_uri(config.out), create=False)
    (run,) = client.search_runs([client.get_experiment_by_name("fewstep").experiment_id])
    assert run.info.status == "KILLED"
    after: list[int] = []
    measure(config, verifier, counting(after))
    assert after == [4, 2]
    assert f"going on with what {config.out} holds" in capsys.readouterr().out
    assert without_clock(report_of(config)) == without_clock(report_of(measured[0]))
    again: list[int] = []
    measure(config, verifier, counting(again))
    assert again == []
    (same,) = client.search_runs([run.info.experiment_id])
    assert (same.info.run_id, same.info.status) == (run.info.run_id, "FINISHED")
    assert {
        "eval/family/static_1/pass_at_1",
        "eval/family/threshold_0.3/pass_at_1",
    } <= same.data.metrics.keys()


def test_a_folder_of_another_evaluation_is_not_mixed_in(tmp_path: Path, verifier: LocalVerifier) -> None:
    folder = tiny_model(tmp_path / "model")
    config = config_for(tmp_path / "run", model=str(folder), max_tokens=24)
    measure(config, verifier)
    with pytest.raises(ConfigError, match=r"out: got .*another configuration"):
        measure(config.model_copy(update={"max_tokens": 16}), verifier)
    tiny_model(folder, seed=1)
    with pytest.raises(ConfigError, match="other starting weights"):
        measure(config, verifier)
    calls: list[int] = []
    measure(config.model_copy(update={"resume": False}), verifier, counting(calls))
    assert sum(calls) == 18


def test_samples_seeds_and_pass_at_k(tmp_path: Path, verifier: LocalVerifier) -> None:
    config = config_for(
        tmp_path / "run",
        temperature=1.0,
        num_samples=2,
        seeds=[3, 5],
        k=[2, 4],
        sweep=Sweep(thresholds=(0.6,), tokens_per_step=()),
    )
    results = measure(config, verifier)
    point = report_of(config)["benchmarks"]["family"]["models"]["model"]["points"][1]
    frame = pd.read_parquet(config.out / "answers.parquet")
    rows = frame[frame.policy == "threshold_0.6"]
    assert len(rows) == 24
    assert rows.groupby("task_id").text.nunique().max() > 1  # draws differ between samples
    assert list(point["pass_at_k"]) == ["1", "2", "4"]
    solved = rows.groupby("task_id", sort=False).passed.any().mean()
    assert point["pass_at_k"]["4"]["value"] == pytest.approx(solved)
    assert (
        point["pass_at_k"]["1"]["value"]
        <= point["pass_at_k"]["2"]["value"]
        <= point["pass_at_k"]["4"]["value"]
    )
    assert point["pass_at_1_per_seed"] == {
        str(seed): pytest.approx(rows[rows.seed == seed].passed.mean()) for seed in (3, 5)
    }
    again = config_for(
        tmp_path / "again",
        **{key: getattr(config, key) for key in ("temperature", "num_samples", "seeds", "k", "sweep")},
    )
    assert [a.text for a in measure(again, verifier).answers] == [a.text for a in results.answers]
    assert {
        len(group) for group in by_task([a for a in results.answers if a.policy == "static_1"]).values()
    } == {4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 2}, "temperature 0 has one answer a task"),
        ({"seeds": [1, 1], "temperature": 1.0}, "seeds must differ"),
        ({"k": [3], "temperature": 1.0, "num_samples": 2}, "k must be at most num_samples x seeds, 2"),
        ({"model": "a", "compare": ["a", "b"]}, "exclude each other"),
        ({"benchmarks": ["humaneval", "humaneval"]}, "named twice"),
        ({"benchmarks": []}, "at least one"),
        ({"benchmarks": "nothing"}, "humaneval_plus"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluateConfig.model_validate(settings)


def test_benchmarks_are_spelled_shortly() -> None:
    config = EvaluateConfig.model_validate(
        {"benchmarks": ["humaneval", "mbpp:data/mbpp.jsonl", {"name": "family"}]}
    )
    assert [(choice.name, choice.path) for choice in config.benchmarks] == [
        ("humaneval", None), ("mbpp", Path("data/mbpp.jsonl")), ("family", None),
    ]  # fmt: skip
    assert EvaluateConfig.model_validate({"benchmarks": "humaneval"}).benchmarks[0].name == "humaneval"


def damaged(folder: Path) -> Path:
    """The embedded model with noise on its weights: right less often."""
    source = embedded_model()
    model, tokenizer = load_model(source)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value + 0.2 * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    save_model(folder, state, model.config, tokenizer)
    return folder


def test_two_models_are_compared_in_pairs(
    tmp_path: Path, verifier: LocalVerifier, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = damaged(tmp_path / "worse")
    benchmarks = [{"name": "family", "num_tasks": 16}, {"name": "repair", "num_tasks": 16}]
    config = config_for(tmp_path / "run", compare=(str(embedded_model()), str(worse)), benchmarks=benchmarks,
                        sweep=Sweep(thresholds=(0.9,), tokens_per_step=()), edit_thresholds=(0.5,))  # fmt: skip
    results = measure(config, verifier)
    report = report_of(config)
    comparison = {row["name"]: row for row in report["benchmarks"]["family"]["comparison"]}
    quality = comparison["threshold_0.9"]["quality"]
    points = {
        slot: report["benchmarks"]["family"]["models"][slot]["points"][1] for slot in ("first", "second")
    }
    assert quality["difference"]["value"] == pytest.approx(
        points["second"]["pass_at_1"] - points["first"]["pass_at_1"]
    )
    assert quality["num_tasks"] == 16
    assert quality["significant"]
    assert quality["verdict"].startswith("worse: -")
    assert quality["adjusted"] >= quality["p_value"]
    assert "cheapest at the bar" not in comparison
    assert report["models"]["first"]["weights_sha256"] != report["models"]["second"]["weights_sha256"]
    printed = capsys.readouterr().out
    assert "paired over tasks" in printed
    assert f"no policy of {worse} reaches the first model's bar of" in printed
    assert set(results.repair_tests) == {"edit_0.5"}
    frame = pd.read_parquet(config.out / "answers.parquet")
    assert frame.groupby("slot").task_id.nunique().to_dict() == {"first": 16, "second": 16}


def test_a_model_is_not_better_than_itself(tmp_path: Path, verifier: LocalVerifier) -> None:
    folder = str(embedded_model())
    config = config_for(
        tmp_path / "run", compare=(folder, folder), sweep=Sweep(thresholds=(0.9,), tokens_per_step=())
    )
    measure(config, verifier)
    rows = report_of(config)["benchmarks"]["family"]["comparison"]
    assert [row["name"] for row in rows] == ["static_1", "threshold_0.9", "cheapest at the bar"]
    assert all(not row["quality"]["significant"] and row["fewer_forwards"]["value"] == 1.0 for row in rows)
    assert all(row["text"].count("not significant") == 2 for row in rows)


def test_rows_that_cannot_be_measured_are_listed(
    tmp_path: Path, verifier: LocalVerifier, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"entry_point": "f", "test": "x", "canonical_solution": "", "prompt": "p"}
    rows = [
        {**row, "task_id": "C/1", "language": "cobol"},
        {**row, "task_id": "L/1", "language": "python", "test": "def check(c): pass", "prompt": "x = 1\n" * 60},
        {**row, "task_id": "N/1", "language": "python"},
        {**row, "task_id": "P/1", "language": "python", "test": "def check(c):\n    assert c(1) == 1", "prompt": "def f(x):\n"},
    ]  # fmt: skip
    (tmp_path / "mbcbp_release_v1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(
        tmp_path / "run",
        model=str(tiny_model(tmp_path / "model")),
        max_tokens=24,
        benchmarks=[f"mbxp:{tmp_path}"],
    )
    measure(config, verifier)
    found = report_of(config)["benchmarks"]["mbxp"]
    assert (found["num_tasks"], found["num_excluded"]) == (1, 3)
    reasons = {one["task_id"]: one["reason"] for one in found["excluded"]}
    assert reasons["C/1"] == "cobol: this sandbox has no way to run it"
    assert "at most 96 together" in reasons["L/1"]
    assert reasons["N/1"] == "its tests define no check(candidate)"
    assert "3 of 4 rows are not measured:" in capsys.readouterr().out
    assert found["models"]["model"]["points"][0]["num_tasks"] == 1
    with pytest.raises(TaskFileError, match="no task that can be measured"):
        plan(
            config.model_copy(update={"max_tokens": 95}),
            open_subjects(config),
            [load_benchmark(config.benchmarks[0])],
            verifier,
        )


INFILL = [
    {"task_id": f"SingleLineInfilling/{number}", "entry_point": "f", "prompt": "def f(x):\n", "suffix": f"    return y + {number}\n",
     "canonical_solution": "    y = x + 1\n", "test": f"def check(candidate):\n    assert candidate(1) == {2 + number}\n"}
    for number in range(3)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shown"), [("bidirectional", "    return y + 0\n"), ("block_causal", None)])
def test_infilling_puts_the_answer_between_prefix_and_suffix(
    tmp_path: Path, verifier: LocalVerifier, kind: str, shown: str | None
) -> None:
    path = tmp_path / "HumanEval-infilling-SingleLine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in INFILL))
    folder = tiny_model(tmp_path / "model", attention_kind=kind)
    config = config_for(
        tmp_path / "run", model=str(folder), benchmarks=[{"name": "humaneval_infilling", "path": path}]
    )
    (subject,) = open_subjects(config)
    benchmark = load_benchmark(config.benchmarks[0])
    ready, excluded = prepare(subject, benchmark, config)
    assert excluded == []
    hole = len(subject.tokenizer.encode(str(INFILL[0]["canonical_solution"])).ids)
    assert [item.max_tokens for item in ready] == [hole] * 3
    text = subject.tokenizer.decode(list(ready[0].suffix_ids))
    if shown is not None:
        assert text == shown
    else:  # a block-causal model is shown what shares the last mask's block
        end = len(ready[0].prompt_ids) + hole
        assert len(ready[0].suffix_ids) == -end % 8
        assert str(INFILL[0]["suffix"]).startswith(text)
    results = measure(config, verifier)
    assert {len(answers) for answers in by_task(results.answers).values()} == {3}
    assert all(answer.num_tokens <= hole for answer in results.answers)
    task = benchmark.tasks[2]
    assert task.program(task.canonical_solution) == "def f(x):\n    y = x + 1\n    return y + 2\n"
    fixed, _ = prepare(subject, benchmark, config.model_copy(update={"infill_tokens": 5}))
    assert {item.max_tokens for item in fixed} == {5}


def test_chat_prompts_go_through_the_models_template(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", max_position_embeddings=512)
    (folder / "chat_template.jinja").write_text("<user>{{ messages[0].content }}<assistant>")
    config = config_for(
        tmp_path / "run", model=str(folder), benchmarks=[{"name": "humaneval", "chat": True, "num_tasks": 1}]
    )
    (subject,) = open_subjects(config)
    benchmark = load_benchmark(config.benchmarks[0])
    ((item,), _) = prepare(
        replace(subject, model=subject.model.model_copy(update={"max_position_embeddings": 2048})),
        benchmark,
        config,
    )
    text = subject.tokenizer.decode(list(item.prompt_ids))
    assert text.startswith("<user>Complete the following Python function.")
    assert text.endswith("<assistant>")


def test_greedy_and_sampled_policies_share_the_reference() -> None:
    found = policies(
        EvaluateConfig(temperature=0.7, top_p=0.9, sweep=Sweep(thresholds=(0.5,), tokens_per_step=(1, 2)))
    )
    assert [policy.label() for policy in found] == ["static_1", "threshold_0.5", "static_2"]
    assert {(policy.temperature, policy.top_p) for policy in found} == {(0.7, 0.9)}


class Broken:
    """A verifier whose host fails."""

    judge = JudgeChoice().build()

    def verify(self, answers: Sequence[tuple[Task, str]]) -> list[Verdict]:
        return [Verdict("sandbox_error", 0.0, (), 0.0, "none", "no zygote") for _ in answers]

    def missing(self, languages: Sequence[str]) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing was started."""


class Gullible(Broken):
    """A verifier that passes everything."""

    def verify(self, answers: Sequence[tuple[Task, str]]) -> list[Verdict]:
        return [Verdict("passed", 1.0, (True,), 0.0, "none") for _ in answers]


def test_a_broken_verifier_is_no_low_score(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", model=str(tiny_model(tmp_path / "model")), max_tokens=24)
    benchmarks = [load_benchmark(choice) for choice in config.benchmarks]
    with pytest.raises(FewstepError, match="the verifier itself failed on 4 of 4 answers: no zygote"):
        evaluate(config, open_subjects(config), benchmarks, engine, Broken(), "none")
    with LocalVerifier() as verifier:  # what it broke on was not kept
        results = evaluate(config, open_subjects(config), benchmarks, engine, verifier, verifier.isolation)
    assert all(answer.outcome != "sandbox_error" for answer in results.answers)


def register(uri: str, folder: Path, name: str, alias: str) -> None:
    with MlflowTracker(uri, experiment="models", run_name="made", system_metrics=False) as tracker:
        publish_model(
            tracker, folder, name=name, alias=alias, metrics={}, input_example="x", policy=DecodePolicy()
        )


def test_an_alias_that_moves_meanwhile_changes_nothing(tmp_path: Path, verifier: LocalVerifier) -> None:
    uri = sqlite_uri(tmp_path / "store")
    first, second = (tiny_model(tmp_path / f"model{seed}", seed=seed) for seed in (0, 1))
    register(uri, first, "moving", "champion")
    config = config_for(tmp_path / "run", model="models:/moving@champion", tracking_uri=uri, max_tokens=24)
    moved: list[int] = []

    def move() -> None:
        if not moved:
            register(uri, second, "moving", "champion")
            moved.append(1)

    measure(config, verifier, counting([], hook=move))
    identity = report_of(config)["models"]["model"]
    assert (identity["address"], identity["pinned"]) == ("models:/moving@champion", "models:/moving/1")
    assert moved
    # Asked again, the alias means the new version, whose answers are not mixed with the old one's.
    assert open_subjects(config)[0].pinned == "models:/moving/2"
    with pytest.raises(ConfigError, match="other starting weights"):
        measure(config, verifier)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("models:/moving@nobody", "which is not there"),
        ("models:/moving/9", "which is not there"),
        ("models:/x y@", "like models:/"),
    ],
)
def test_a_missing_version_is_one_clear_line(tmp_path: Path, address: str, words: str) -> None:
    uri = sqlite_uri(tmp_path / "store")
    open_client(uri, create=True)
    with pytest.raises(ConfigError, match=words):
        open_subjects(EvaluateConfig(model=address, tracking_uri=uri))


def test_a_missing_model_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    # No Ray session is open here, so a pool could not even be asked for.
    with pytest.raises(CheckpointError, match="absent"):
        run(EvaluateConfig(model=str(tmp_path / "absent"), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_verifier_that_can_be_fooled_is_told_on(tmp_path: Path) -> None:
    config = EvaluateConfig.model_validate(
        {"out": tmp_path, "self_test": True, "benchmarks": [{"name": "humaneval", "num_tasks": 2}]}
    )
    benchmarks = [load_benchmark(choice) for choice in config.benchmarks]
    with pytest.raises(
        FewstepError, match=r"misjudged 6 programs: HumanEval/0 passed although broken \(python: unreadable\)"
    ):
        prove(config, benchmarks, Gullible(), "none")
    (report,) = json.loads((tmp_path / "self-test.json").read_text())["benchmarks"]
    assert report["solutions"]["python"]["exceptions"] == []
    assert len(report["broken"]["python: wrong value"]["exceptions"]) == 2


def test_a_self_test_counts_what_has_no_solution(tmp_path: Path, verifier: LocalVerifier) -> None:
    rows = [{"task_id": f"MBPP/{n}", "entry_point": "f", "language": "python", "prompt": "def f(x):\n", "test": "def check(c):\n    assert c(1) == 2",
             "canonical_solution": solution} for n, solution in enumerate(("    return x + 1\n", None, "    return x\n"))]  # fmt: skip
    (tmp_path / "mbpp_release_v1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark: Benchmark = load_benchmark(BenchmarkChoice(name="mbxp", path=tmp_path))
    (report,) = prove(EvaluateConfig(out=tmp_path), [benchmark], verifier, verifier.isolation)
    assert report["tasks_without_solution"] == {"python": 1}
    assert [(row["task_id"], row["outcome"]) for row in report["solutions"]["python"]["exceptions"]] == [
        ("MBPP/2", "wrong_answer")
    ]
    assert report["solutions"]["python"]["verdicts_per_second"] > 0
    # One more than x is right where x was wrong: only what passes is broken.
    assert report["broken"]["python: wrong value"]["num"] == 1


@pytest.mark.ray
def test_the_job_runs_on_replicas_and_verifiers(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    config = config_for(
        tmp_path / "run", model=str(folder), max_tokens=24, benchmarks=[{"name": "family", "num_tasks": 20}]
    )
    with ray_session(num_cpus=1):
        run(config)
        run(
            EvaluateConfig.model_validate(
                {
                    "out": tmp_path / "proof",
                    "self_test": True,
                    "benchmarks": [{"name": "humaneval", "num_tasks": 4}],
                }
            )
        )
    points = report_of(config)["benchmarks"]["family"]["models"]["model"]["points"]
    assert [sum(point["outcomes"].values()) for point in points] == [20, 20, 20]
    (report,) = json.loads((tmp_path / "proof" / "self-test.json").read_text())["benchmarks"]
    assert report["solutions"]["python"]["passed"] == 4
