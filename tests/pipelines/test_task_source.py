"""A refinement's two sides of tasks: disjoint, keyed, complete, with every task that was left out named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fewstep.actors.judges import JudgeChoice
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSource, draw_epochwise, open_tasks
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.pipelines.tasks.files import write_tasks
from fewstep.platform.errors import ConfigError, TaskFileError
from fewstep.platform.records import Task

MODEL = ModelConfig.load(embedded_model())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(embedded_model(), MODEL)


@pytest.fixture(scope="module")
def verifier() -> Iterator[LocalVerifier]:
    with LocalVerifier() as one:
        yield one


def own_tasks(count: int) -> list[Task]:
    return [
        replace(task, task_id=f"own/{index}")
        for index, task in enumerate(family_tasks(count, 3, held_out=False))
    ]


def written(path: Path, tasks: list[Task]) -> str:
    write_tasks(path, tasks)
    return f"tasks:{path}"


def opened(
    tokenizer: Tokenizer, verifier: LocalVerifier, chat: Path | None = None, **keys: Any
) -> TaskSource:
    config = RefineConfig.model_validate(
        {"prompts_per_step": 4, "updates_per_step": 1, "trainer": {"num_ranks": 1}, **keys}
    )
    return open_tasks(config, MODEL, tokenizer, ChatTemplate(chat or embedded_model()), verifier)


def names(source: TaskSource, steps: int = 40, count: int = 4) -> set[str]:
    return {one.task.task_id for step in range(steps) for one in source.draw(step, count)}


def test_a_share_is_held_out_by_name_and_never_trained_on(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    tasks = own_tasks(60)
    source = opened(tokenizer, verifier, tasks=written(tmp_path / "a.jsonl", tasks), held_out_share=0.3)
    held_out = {one.task.task_id for one in source.held_out}
    assert 8 <= len(held_out) <= 28
    assert names(source) == {task.task_id for task in tasks} - held_out
    # Order in the file, and further tasks, move nothing across.
    more = written(tmp_path / "b.jsonl", [*reversed(tasks), *(own_tasks(70)[60:])])
    again = {one.task.task_id for one in opened(tokenizer, verifier, tasks=more, held_out_share=0.3).held_out}
    assert {name for name in again if int(name.split("/")[1]) < 60} == held_out


def test_a_held_out_file_is_kept_apart_by_name_and_by_prompt(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    tasks = own_tasks(12)
    held_out = [tasks[0], replace(tasks[1], task_id="another name")]
    source = opened(
        tokenizer, verifier, tasks=written(tmp_path / "train.jsonl", tasks),
        held_out=written(tmp_path / "test.jsonl", held_out),
    )  # fmt: skip
    assert {one.task.task_id for one in source.held_out} == {"own/0", "another name"}
    assert names(source) == {f"own/{index}" for index in range(2, 12)}
    reasons = {one.task_id: one.reason for one in source.excluded}
    assert reasons == {"own/0": "is held out", "own/1": "has the prompt of the held-out task another name"}


def test_what_is_looked_at_during_training_is_neither_trained_on_nor_measured(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", own_tasks(80))
    source = opened(
        tokenizer, verifier, tasks=path, held_out_share=0.3, held_out_checks={"every": 1, "num_tasks": 5}
    )
    sides = [{one.task.task_id for one in side} for side in (source.watched, source.held_out)]
    sides.append(names(source))
    assert len(sides[0]) == 5
    assert sum(map(len, sides)) == len(set.union(*sides)) == 80
    family = opened(tokenizer, verifier, num_eval_tasks=10, held_out_checks={"every": 1, "num_tasks": 5})
    assert len({one.task.task_id for one in (*family.watched, *family.held_out)}) == 15


def test_an_epoch_deals_every_task_once_and_epochs_differ(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    source = opened(
        tokenizer, verifier, tasks=written(tmp_path / "a.jsonl", own_tasks(30)),
        held_out=written(tmp_path / "b.jsonl", [replace(family_tasks(1, 9, held_out=True)[0], task_id="b")]),
        prompts_per_step=10,
    )  # fmt: skip
    epochs = [
        [one.task.task_id for step in range(first, first + 3) for one in source.draw(step, 10)]
        for first in (0, 3)
    ]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1]
    tasks = source.draw(0, 10) + source.draw(1, 10) + source.draw(2, 10)
    assert draw_epochwise(tasks, 1, 0, 10) != draw_epochwise(tasks, 2, 0, 10)
    assert draw_epochwise(tasks, 1, 7, 4) == draw_epochwise(tasks, 1, 7, 4)


def test_what_cannot_be_asked_or_judged_is_left_out_by_name(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    tasks = own_tasks(12)
    tasks[3] = replace(tasks[3], prompt=tasks[3].prompt * 60)
    lines = [json.loads(line) for line in _lines(tmp_path / "a.jsonl", tasks)]
    lines[4]["check"] = {"kind": "reference"}
    lines[5]["check"] = {
        "kind": "source",
        "entry_point": "f",
        "test_code": "x",
        "language": "ruby",
    }
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = opened(tokenizer, verifier, tasks=f"tasks:{path}", held_out_share=0.2)
    reasons = {one.task_id: one.reason for one in source.excluded}
    assert "prompt tokens" in reasons["own/3"]
    assert "no check" in reasons["own/4"]
    if verifier.missing(["ruby"]):
        assert "ruby" in reasons["own/5"]
    assert not names(source) & {"own/3", "own/4"}
    with LocalVerifier(judge=JudgeChoice("exact")) as exact:
        judged = opened(tokenizer, exact, tasks=f"tasks:{path}", held_out_share=0.2)
        assert "own/4" not in {one.task_id for one in judged.excluded}


def _lines(path: Path, tasks: list[Task]) -> list[str]:
    write_tasks(path, tasks)
    return path.read_text().splitlines()


def test_the_models_chat_template_and_the_stop_rules_are_used(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    template = "{% for message in messages %}def g(x):\n{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    path = tmp_path / "a.jsonl"
    write_tasks(path, own_tasks(30))
    chat = opened(tokenizer, verifier, folder, tasks={"name": "tasks", "path": str(path), "chat": True})
    one = chat.draw(0, 4)[0]
    assert tokenizer.decode(list(one.prompt_ids)).startswith("def g(x):\n")
    assert one.task.program("answer") == "answer"
    read = chat.answers.read(one.task, "Here it is:\n```python\ndef f(x): pass\n```\n")
    assert read == "def f(x): pass\n"
    python = opened(tokenizer, verifier, tasks={"name": "tasks", "path": str(path), "answers": "python"})
    assert "\nclass " in python.draw(0, 4)[0].stop
    plain = opened(tokenizer, verifier, tasks=f"tasks:{path}")
    assert plain.draw(0, 4)[0].stop == ()


def test_digests_know_what_is_in_the_tasks(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    tasks = own_tasks(40)
    first = opened(tokenizer, verifier, tasks=written(tmp_path / "a.jsonl", tasks))
    same = opened(tokenizer, verifier, tasks=written(tmp_path / "b.jsonl", tasks))
    assert first.digests == same.digests
    changed = [replace(task, canonical_solution="    return 0\n") for task in tasks]
    other = opened(tokenizer, verifier, tasks=written(tmp_path / "c.jsonl", changed))
    assert all(first.digests[side] != other.digests[side] for side in first.digests)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"held_out_share": 1e-9}, "0 held-out tasks"),
        ({"prompts_per_step": 50}, "training tasks, one for each of prompts_per_step"),
    ],
)
def test_too_few_tasks_are_refused(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    path = written(tmp_path / "a.jsonl", own_tasks(20))
    with pytest.raises(TaskFileError, match=words):
        opened(tokenizer, verifier, tasks=path, **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tasks": "repair"}, "repair is none"),
        ({"tasks": {"name": "family", "seed": 3}}, "holds out by itself"),
        ({"held_out": "humaneval"}, "holds out by itself"),
        ({"tasks": "humaneval", "held_out": "mbpp:x", "held_out_share": 0.2}, "does nothing with held_out"),
        ({"held_out_checks": {"gates_curriculum": True}}, "needs held_out_checks.every"),
        ({"rollouts_only": True, "replay": "x"}, "exclude each other"),
        (
            {"rollouts_only": True, "retain": {"sources": ["family"]}},
            "retain does nothing with rollouts_only",
        ),
        ({"max_staleness": 1, "in_process": True, "trainer": {"num_ranks": 1}}, "max_staleness does nothing"),
        ({"in_process": True}, "one trainer rank"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RefineConfig.model_validate(keys)


def test_tasks_that_are_no_refinement_are_refused(
    tokenizer: Tokenizer, verifier: LocalVerifier, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", own_tasks(20))
    with pytest.raises(ConfigError, match="infilling"):
        opened(tokenizer, verifier, tasks=f"humaneval_infilling:{_infilling(tmp_path)}")
    with pytest.raises(ConfigError, match="set chat and answers alike"):
        opened(
            tokenizer,
            verifier,
            tasks=path,
            held_out={"name": "tasks", "path": str(tmp_path / "a.jsonl"), "chat": True},
        )


def _infilling(folder: Path) -> Path:
    row = {
        "task_id": "SingleLineInfilling/HumanEval/0/L0", "prompt": "def f(x):\n", "suffix": "", "entry_point": "f",
        "canonical_solution": "    return x\n", "test": "def check(candidate):\n    assert candidate(1) == 1\n",
    }  # fmt: skip
    path = folder / "HumanEval-SingleLineInfilling.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path
