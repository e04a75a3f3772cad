"""A finished run read back: listed, compared, reported, from its folder and from its store alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.pipelines.small_run import small_config, small_run

from fewstep.__main__ import main
from fewstep.pipelines.refine_report import RefineResult
from fewstep.pipelines.rollout_samples import num_traces
from fewstep.pipelines.run_figures import telling_tasks
from fewstep.pipelines.run_record import config_difference, folder_record, load_run
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_runs import RunStore
from fewstep.platform.mlflow_store import open_client, sqlite_uri
from fewstep.platform.trajectories import read_rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return sqlite_uri(folder)


@pytest.fixture(scope="module")
def first(folder: Path, uri: str) -> RefineResult:
    return small_run(small_config(folder / "first", uri))


@pytest.fixture(scope="module")
def second(folder: Path, uri: str, first: RefineResult) -> RefineResult:
    return small_run(small_config(folder / "second", uri, learning_rate=1e-3, seed=1))


class _Page(HTMLParser):
    """Counts tags, keeps text and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_run_leaves_everything_a_reader_asks_for(first: RefineResult, uri: str) -> None:
    client = open_client(uri, create=False)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    files = {item.path for item in client.list_artifacts(first.run_id)}
    assert {
        "config.yaml", "environment.txt", "report.json", "report.html", "history.jsonl", "trajectories.json", "samples.json",
        "figures", "answers", "images",
    } <= files  # fmt: skip
    figures = {item.path.removeprefix("figures/") for item in client.list_artifacts(first.run_id, "figures")}
    assert {"frontier.png", "curves.png", "steps.png", "sync.png", "film.png"} <= figures
    inputs = {item.dataset.name: item for item in run.inputs.dataset_inputs}
    assert set(inputs) == {"family-held-out", "family-training", "rollouts"}
    assert json.loads(inputs["rollouts"].dataset.profile) == {"num_files": 2, "num_rows": 16}
    for question in (
        "What changed?",
        "On which data?",
        "At what cost?",
        "Is it significant?",
        "Which version is served?",
    ):
        assert question in run.data.tags["mlflow.note.content"]
    groups = {key.split("/")[0] for key in run.data.metrics}
    assert {"reward", "rollout", "train", "sync", "perf", "eval"} <= groups
    assert {
        "rollout/forwards_min",
        "rollout/forwards_p50",
        "rollout/forwards_p95",
        "rollout/forwards_max",
    } <= run.data.metrics.keys()
    assert run.data.metrics["rollout/outcome/timeout"] == 0.0


def test_rollouts_are_pointed_to_and_can_be_checked(first: RefineResult, folder: Path) -> None:
    index = json.loads((folder / "first" / "trajectories.json").read_text())
    rows = {entry["path"]: entry["rows"] for entry in index["files"]}
    assert rows["rollouts/step_00000.parquet"] == 8
    assert rows["trajectories/before_threshold_0.9.parquet"] == 12
    for entry in index["files"]:
        assert len(read_rollouts(folder / "first" / entry["path"])) == entry["rows"]


def test_each_step_has_a_trace_from_rollout_to_reward(first: RefineResult, uri: str) -> None:
    client = open_client(uri, create=False)
    experiment = client.get_run(first.run_id).info.experiment_id
    found = client.search_traces(locations=[experiment], run_id=first.run_id)
    assert sorted(trace.info.tags["step"] for trace in found) == ["0", "1"]
    for trace in found:
        spans = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
        assert [span.name for span in spans if span.parent_id] == [
            "rollout",
            "extraction",
            "sandbox",
            "reward",
        ]
        by_name = {span.name: span for span in spans}
        assert by_name["rollout"].attributes["forwards"] >= 1
        assert by_name["sandbox"].outputs["outcome"] == trace.info.tags["outcome"]
        assert by_name["sandbox"].inputs["program"].startswith("def f(xs):")
        verdicts = {item.name: item.value for item in trace.info.assessments}
        assert verdicts["passed"] == (trace.info.tags["outcome"] == "passed")


def test_the_page_needs_no_network_and_shows_the_run(first: RefineResult, folder: Path) -> None:
    page = _Page((folder / "first" / "report.html").read_text())
    assert page.addresses
    assert [
        address[:40] for address in page.addresses if not address.startswith("data:image/png;base64,")
    ] == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    text = " ".join(page.words)
    for word in (
        "What changed?",
        "threshold_0.9",
        "passed",
        "def f(xs):",
        "learning_rate",
        "core hours",
        "12 tasks, one answer each",
    ):
        assert word in text, word
    markdown = (folder / "first" / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown)
    assert len(links) >= 5
    assert [link for link in links if not (folder / "first" / link).is_file()] == []


def test_a_report_from_the_store_alone_says_the_same(
    first: RefineResult, uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["report", first.run_id[:8], "--tracking-uri", uri, "--examples", "1"]) == 0
    name = RunStore(uri).find(first.run_id).name
    made = tmp_path / "runs" / "reports" / name
    assert str(made.relative_to(tmp_path) / "report.html") in capsys.readouterr().out
    text = (made / "report.html").read_text()
    for word in ("family-held-out", "Answers by outcome", "data:image/png", "def f(xs):", "FINISHED"):
        assert word in text, word
    assert main(["report", str(folder / "first"), "--tracking-uri", uri]) == 0
    assert "fewstep-tiny/" in (folder / "first" / "report.html").read_text()


def test_hostile_text_stays_text(first: RefineResult, folder: Path, tmp_path: Path) -> None:
    from fewstep.pipelines.run_report import write_report

    copy = tmp_path / "<img src=x>"
    shutil.copytree(folder / "first", copy)
    report = json.loads((copy / "report.json").read_text())
    report["text"] = "<script>alert(1)</script> | ``` "
    (copy / "report.json").write_text(json.dumps(report))
    write_report(folder_record(copy), copy)
    page = _Page((copy / "report.html").read_text())
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png") for address in page.addresses)


def test_two_runs_beside_each_other(
    first: RefineResult, second: RefineResult, folder: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = folder / "compare.png"
    argv = ["compare", str(folder / "first"), second.run_id, "--tracking-uri", uri, "--out", str(figure)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    for pattern in (
        r"learning_rate\s+0\.0005\s+0\.001", r"seed\s+0\s+1", r"threshold_0\.9", r"core hours", r"generate\s+\d",
        r"paired over 12 tasks", r"not significant", r"family-held-out:\w{16}\s+family-held-out:\w{16}",
    ):  # fmt: skip
        assert re.search(pattern, text), pattern
    assert not re.search(r"^(out|tracking_uri)\s", text, re.MULTILINE), "where a run is kept is no difference"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", first.run_id, str(folder / "first"), "--tracking-uri", uri]) == 2
    assert "another run than the first" in capsys.readouterr().err


def test_runs_are_listed_newest_first_and_found_by_whatever_they_are_called(
    first: RefineResult, second: RefineResult, uri: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--tracking-uri", uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [second.run_id[:8], first.run_id[:8]]
    assert "FINISHED" in lines[2]
    assert re.search(r"fewstep-tiny/\d", lines[2])
    store = RunStore(uri)
    name = store.find(first.run_id).name
    key = json.loads((folder / "first" / "tracking.json").read_text())["key"]
    version = store.find(first.run_id).versions[0].partition("@")[0]
    for reference in (first.run_id, first.run_id[:8], name, key, f"models:/{version}"):
        assert store.find(reference).run_id == first.run_id
    for reference, word in (("unheard-of", name), ("ffffffff", name)):
        with pytest.raises(ConfigError, match=re.escape(word)):
            store.find(reference)
    assert main(["runs", "--experiment", "unheard-of", "--tracking-uri", uri]) == 2
    assert "fewstep" in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_run(str(tmp_path), uri, tmp_path)


def test_nested_runs_stand_below_their_parent(
    uri: str, first: RefineResult, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    from fewstep.platform.mlflow_tracker import MlflowTracker

    with MlflowTracker(uri, experiment="nested", run_name="parent", system_metrics=False) as parent:
        for name in ("one", "two"):
            tags = {"mlflow.parentRunId": parent.run_id}
            MlflowTracker(uri, experiment="nested", run_name=name, system_metrics=False, tags=tags).finish(
                "FINISHED"
            )
    assert main(["runs", "--experiment", "nested", "--tracking-uri", uri]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["parent", "two", "one"]
    assert [row.startswith("  ") for row in rows] == [False, True, True]
    assert [run.name for run in RunStore(uri).children(parent.run_id)] == ["one", "two"]


@pytest.mark.parametrize("gone", [False, True])
def test_only_differences_that_say_something_are_shown(gone: bool) -> None:
    one = {"out": "a", "seed": "1", "lr": "0.1"}
    two = {"out": "b", "seed": "2", **({} if gone else {"lr": "0.1"})}
    expected = {"seed": ("1", "2")} | ({"lr": ("0.1", "-")} if gone else {})
    assert config_difference(one, two) == expected


def test_films_show_a_right_answer_one_made_right_and_one_made_wrong(
    first: RefineResult, folder: Path
) -> None:
    from dataclasses import replace

    answers = read_rollouts(folder / "first" / "trajectories" / "before_threshold_0.9.parquet")[:4]

    def judged(outcomes: Iterator[str]) -> list[object]:
        return [
            replace(answer, verdict=replace(answer.verdict, outcome=outcome))  # type: ignore[arg-type]
            for answer, outcome in zip(answers, outcomes, strict=True)
        ]

    before = judged(iter(["passed", "wrong_answer", "passed", "wrong_answer"]))
    after = judged(iter(["passed", "passed", "timeout", "wrong_answer"]))
    assert telling_tasks(before, after) == [0, 1, 2]  # type: ignore[arg-type]
    wrong = judged(iter(["timeout"] * 4))
    assert telling_tasks(wrong, wrong) == [0]  # type: ignore[arg-type]


def test_traces_are_spread_evenly_over_the_steps() -> None:
    rate, drawn = 0.3, []
    for step in range(20):
        drawn.append(num_traces(step, rate))
    assert sum(drawn) == 6
    assert set(drawn) == {0, 1}
    assert drawn[0] == 1
    assert [num_traces(step, 2.0) for step in range(3)] == [2, 2, 2]
    assert num_traces(5, 0.0) == 0


def test_a_jobs_own_figure_wins_over_the_copy_of_an_earlier_report(tmp_path: Path) -> None:
    for path in (
        tmp_path / "curves.png",
        tmp_path / "figures" / "curves.png",
        tmp_path / "figures" / "steps.png",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert folder_record(tmp_path).figures == {
        "curves": tmp_path / "curves.png", "steps": tmp_path / "figures" / "steps.png"
    }  # fmt: skip
