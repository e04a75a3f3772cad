"""Retention: which documents, what an update sees of them, what they cost, and that they hold a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.pipelines.small_run import IdleTrainer, small_config

from fewstep.actors.engine.engine import Engine
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.trainer_rank import TrainerRank
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.kernels.model.training import RowTensors
from fewstep.kernels.rows import RowBatch, SampleRows
from fewstep.pipelines.objectives.retaining import RETAINED, Retaining
from fewstep.pipelines.policy_update import per_target, retain
from fewstep.pipelines.refine_workers import RETAINING
from fewstep.pipelines.retain_settings import Retain
from fewstep.pipelines.retained_documents import Document, blurred
from fewstep.pipelines.retention import ANSWERED, Retention, as_sample, open_retention
from fewstep.pipelines.task_source import TaskSet, open_tasks
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import WeightVersion


def _opened(tmp_path: Path, max_tokens: int = 80, **settings: object) -> tuple[Retention, Engine]:
    config = small_config(tmp_path / "out", "", retain=settings, max_tokens=max_tokens)
    model, tokenizer = load_model(embedded_model())
    engine = Engine(model, tokenizer, max_sequences=16, weight_version=WeightVersion("test", 0, ""))
    chat = ChatTemplate(embedded_model())
    with LocalVerifier() as verifier:
        source = open_tasks(config, model.config, tokenizer, chat, verifier)
    retention = open_retention(config, model.config, tokenizer, chat, source)
    assert retention is not None
    return retention.answered(config, tokenizer, engine.generate, "weights"), engine


def _lines(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_retained_target_reaches_only_the_distance() -> None:
    own, kept = SampleRows.clean(np.arange(3, 7)), SampleRows.clean(np.arange(3, 7))
    for rows, is_kept in ((own, 0.0), (kept, 1.0)):
        rows.targets[:] = rows.tokens
        rows.weights[:] = 0.25
        rows.extras = {
            RETAINED: np.full(4, is_kept, np.float32),
            "reference_logprob": np.full(4, -1.0, np.float32),
        }
    rows = RowTensors.of(RowBatch.collate([own, kept]))
    logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0, -1.0, -1.0, -1.0, -3.0], requires_grad=True)
    objective = Retaining("distill", {"certainty": 0.0}, weight=0.5, form="k2")
    loss, metrics = objective.loss(logprob, torch.zeros(8), rows)
    # Distillation's mean of 1, 2, 3, 4; and half of the mean of (0, 0, 0, 2² / 2).
    assert float(loss.detach()) == pytest.approx(2.5 + 0.5 * 0.5)
    loss.backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [-0.25] * 4 + [0.0, 0.0, 0.0, 0.5 * 0.25 * -2.0]
    means = per_target({name: float(value) for name, value in metrics.items()} | {"targets": 8.0})
    assert (means["nll"], means["retain_kl"], means["retain_loss"]) == (2.5, 0.5, 0.25)
    # Documents alone in a micro-batch, and none in one.
    only_kept = RowTensors.of(RowBatch.collate([kept]))
    assert float(objective.loss(logprob.detach()[4:], torch.zeros(4), only_kept)[0]) == pytest.approx(0.25)
    only_own = RowTensors.of(RowBatch.collate([own]))
    assert float(objective.loss(logprob.detach()[:4], torch.zeros(4), only_own)[0]) == pytest.approx(2.5)
    nll = Retaining("distill", {"certainty": 0.0}, weight=1.0, form="nll")
    assert float(nll.loss(logprob.detach()[4:], torch.zeros(4), only_kept)[0]) == pytest.approx(1.5)


def test_an_update_sees_other_documents_and_masks_each_time_and_the_same_again(tmp_path: Path) -> None:
    retention, _ = _opened(tmp_path, sources=["family"], num_documents=40, documents_per_update=6)
    first, again, later, other = (
        retention.rows(*key) for key in ((0, 3, 1), (0, 3, 1), (0, 4, 1), (1, 3, 1))
    )
    assert len(first) == 6
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.tokens, two.tokens)
        assert np.array_equal(one.targets, two.targets)
    for elsewhere in (later, other):
        assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(first, elsewhere, strict=True))
    assert sum(float(rows.weights.sum()) for rows in first) == pytest.approx(1.0)
    mask = retention.model.mask_token_id
    for rows in first:
        assert np.array_equal(rows.extras[RETAINED] > 0, rows.targets >= 0)
        assert np.array_equal(rows.targets >= 0, rows.tokens == mask)


def test_texts_come_from_files_without_what_the_run_is_measured_by(tmp_path: Path) -> None:
    config = small_config(tmp_path / "out", "")
    _, tokenizer = load_model(embedded_model())
    with LocalVerifier() as verifier:
        source = open_tasks(
            config,
            load_model(embedded_model())[0].config,
            tokenizer,
            ChatTemplate(embedded_model()),
            verifier,
        )
    asked = source.held_out[0].task.prompt
    rows = [{"q": f"def g{n}(x)", "a": f"\n    return x + {n}"} for n in range(9)]
    file = _lines(tmp_path / "own.jsonl", [*rows, {"q": asked, "a": "\n    return 0"}, {"q": "no answer"}])
    sources = {"sources": [str(file)], "prompt_column": "q", "text_column": "a"}
    retention, _ = _opened(tmp_path, **sources)
    assert [one.reason for one in retention.excluded] == ["has the prompt of a held-out task", "no key 'a'"]
    assert retention.excluded[0].task_id.endswith("own.jsonl: row 10")
    assert [tokenizer.decode(list(one.prompt_ids)) for one in retention.documents] == [
        row["q"] for row in rows
    ]
    few, _ = _opened(tmp_path, **sources, num_documents=4)
    assert len(few.documents) == 4
    assert set(few.documents) < set(retention.documents)
    assert few.about.digest != retention.about.digest
    with pytest.raises(ConfigError, match=r"retain\.sources"):
        _opened(tmp_path, sources=[str(tmp_path / "absent.jsonl")])
    with pytest.raises(ConfigError, match="no key 'prompt'"):
        _opened(tmp_path, sources=[str(file)])


def test_a_document_with_the_mask_token_is_left_out(tmp_path: Path) -> None:
    """The model's likelihood of its mask token is 0, and its logarithm would spoil the update."""
    rows = [
        {"q": "def f(x)", "a": "\n    return x"},
        {"q": "def g(x)", "a": "\n    return <|mask|>"},
        {"q": "def <|mask|>(x)", "a": "\n    return x"},
    ]
    file = _lines(tmp_path / "own.jsonl", rows)
    retention, _ = _opened(tmp_path, sources=[str(file)], prompt_column="q", text_column="a")
    assert len(retention.documents) == 1
    assert [(one.task_id.rpartition(": ")[2], one.reason) for one in retention.excluded] == [
        ("row 2", "holds the mask token"), ("row 3", "holds the mask token")
    ]  # fmt: skip


def test_prompts_alone_are_answered_by_the_unrefined_model_once(tmp_path: Path) -> None:
    retention, engine = _opened(tmp_path, noise=0.3, num_documents=6)
    config = small_config(tmp_path / "out", "", retain={"noise": 0.3, "num_documents": 6})
    assert len(retention.documents) == 6
    assert all(one.text_ids for one in retention.documents)
    kept = (tmp_path / "out" / ANSWERED).read_text()
    assert len(kept.splitlines()) == 7

    def never(requests: object) -> list[object]:
        raise AssertionError("they were answered")

    _, tokenizer = load_model(embedded_model())
    assert retention.answered(config, tokenizer, never, "weights").documents == retention.documents  # type: ignore[arg-type]
    replayed = config.model_copy(update={"out": tmp_path / "replay", "replay": tmp_path / "out" / "rollouts"})
    assert retention.answered(replayed, tokenizer, never, "weights").documents == retention.documents  # type: ignore[arg-type]
    assert (tmp_path / "replay" / ANSWERED).read_text() == kept
    with pytest.raises(AssertionError, match="they were answered"):  # of other weights
        retention.answered(config, tokenizer, never, "other")  # type: ignore[arg-type]
    assert retention.answered(config, tokenizer, engine.generate, "other").documents


def test_noise_replaces_the_share_it_says_by_tokens_of_the_prompts() -> None:
    documents = [Document(tuple(range(start, start + 100))) for start in (0, 100)]
    changed = blurred(documents, 0.2, seed=1)
    assert changed == blurred(documents, 0.2, seed=1)
    assert changed != blurred(documents, 0.2, seed=2)
    moved = [a != b for one, two in zip(documents, changed, strict=True)
             for a, b in zip(one.prompt_ids, two.prompt_ids, strict=True)]  # fmt: skip
    assert 20 < sum(moved) < 60
    assert all(0 <= token < 200 for one in changed for token in one.prompt_ids)
    assert blurred(documents, 0.0, seed=1) == documents


def test_a_text_that_was_cut_is_not_taught_an_end() -> None:
    model = load_model(embedded_model())[0].config
    size, eos = model.block_size, model.eos_token_id
    whole = as_sample(Document(tuple([5] * 10), tuple([6] * size), ended=True), model)
    assert whole.tokens.tolist() == [5] * 10 + [6] * size + [eos] * (size - 10)
    cut = as_sample(Document(tuple([5] * 10), tuple([6] * size), ended=False), model)
    assert cut.tokens.tolist() == [5] * 10 + [6] * (size - 10)


def test_an_own_answer_that_was_cut_before_a_block_ended_is_not_retained(tmp_path: Path) -> None:
    """It would have to be filled up with an end that the model did not write."""
    retention, _ = _opened(tmp_path, max_tokens=5, noise=0.3, num_documents=24)
    assert 0 < len(retention.documents) < 24
    for one in retention.documents:
        sample, written = as_sample(one, retention.model), [*one.prompt_ids, *one.text_ids]
        assert len(sample.tokens) % retention.model.block_size == 0
        assert one.ended or sample.tokens.tolist() == written[: len(sample.tokens)]
        assert len(sample.tokens) > sample.num_prompt


def test_a_run_goes_on_only_with_the_answers_it_was_trained_on(tmp_path: Path) -> None:
    settings = {"noise": 0.3, "num_documents": 6}
    retention, engine = _opened(tmp_path, **settings)
    config, tokenizer = small_config(tmp_path / "out", "", retain=settings), load_model(embedded_model())[1]

    def again() -> Retention:
        return retention.answered(config, tokenizer, engine.generate, "weights", retention.answers)

    file = tmp_path / "out" / ANSWERED
    kept = file.read_text()
    assert again().documents == retention.documents
    file.unlink()
    assert again().documents == retention.documents  # asked anew, and the same
    assert file.read_text() == kept
    first, second, *others = kept.splitlines()
    changed = "\n".join([first, json.dumps(json.loads(second) | {"text_ids": [5]}), *others]) + "\n"
    file.write_text(changed)
    with pytest.raises(ConfigError, match=r"other answers in .* than the checkpoint was trained on"):
        again()
    assert file.read_text() == changed
    file.unlink()
    with pytest.raises(ConfigError, match="is gone, and others than"):
        retention.answered(config, tokenizer, engine.generate, "weights", "of another model")
    assert not file.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs sources, or noise"),
        ({"noise": 0.1, "text_column": "text"}, "do nothing without sources"),
        ({"sources": ["a.jsonl"], "prompt_column": ""}, "cannot both be empty"),
        ({"sources": ["a.jsonl"], "text_column": "text", "noise": 0.1}, "do nothing with text_column"),
        ({"sources": ["family"], "noise": 0.1}, "noise does nothing with sources"),
        ({"sources": ["family", "a.jsonl"]}, "a source on its own"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Retain.model_validate(settings)


def test_retention_holds_a_model_that_learns_something_else(tmp_path: Path) -> None:
    """Thirty updates towards a wrong body; the distance on documents that no update saw, with retention and without."""
    retention, _ = _opened(tmp_path, sources=["family"], num_documents=64)
    model, tokenizer = load_model(embedded_model())
    prompt = tokenizer.encode('def f(xs)\n    """square; sum"""').ids
    body = tokenizer.encode("\n    return max(xs, default=0)").ids
    fixed = Retention(
        retention.settings, model.config, (Document(tuple(prompt), tuple(body), ended=True),),
        TaskSet("one", "", "", {}),
    )  # fmt: skip
    unseen = [rows for step in range(4) for rows in retention.rows(9, step, 0)]
    drift: dict[bool, float] = {}
    for retains in (False, True):
        rank = TrainerRank(
            model.config, embedded_model(), TrainerSettings(), RETAINING,
            {"objective": "distill", "options": {}, "weight": 2.0, "form": "k2"},
        )  # fmt: skip
        rank.connect(0, *rank.endpoint())
        for step in range(30):
            samples = fixed.rows(0, step, 0)
            for rows in samples:
                rows.extras = {RETAINED: np.zeros(len(rows.tokens), np.float32)}
            if retains:
                costs = retain(retention, 0, step, rank, [samples])
                assert costs["train/retain_documents"] == 8.0
                assert 0.5 < costs["train/retain_row_share"] < 1.0
            else:
                for rows in samples:
                    rows.extras["reference_logprob"] = np.zeros(len(rows.tokens), np.float32)
            metrics = rank.update(samples, 3e-4)
            assert "retain_loss" in metrics
            assert (metrics["retain_targets"] > 0) == retains
        before, after = (rank.logprobs(unseen, source) for source in ("reference", "current"))
        drift[retains] = float(np.mean([((a - b) ** 2).mean() for a, b in zip(before, after, strict=True)]))
        shown = fixed.rows(0, 99, 0)
        learned = float(np.mean([v.sum() for v in rank.logprobs(shown, "current")]))
        start = float(np.mean([v.sum() for v in rank.logprobs(shown, "reference")]))
        assert learned > start
    assert drift[True] < drift[False] / 2


def test_the_loop_hands_the_documents_to_every_update(tmp_path: Path) -> None:
    retention, _ = _opened(tmp_path, sources=["family"], num_documents=16)

    class Asked(IdleTrainer):
        def logprobs(self, samples, source):  # type: ignore[no-untyped-def]
            assert source == "reference"
            return [np.full(len(rows.tokens), -2.0, np.float32) for rows in samples]

    own = SampleRows.clean(np.arange(3, 19), ("old_logprob", "advantage"))
    parts = [[own], [SampleRows.clean(np.arange(3, 19), ("old_logprob", "advantage"))]]
    retain(retention, 0, 0, Asked(load_model(embedded_model())[0]), parts)
    for samples in parts:
        assert len(samples) == 1 + retention.settings.documents_per_update
        assert len({tuple(sorted(rows.extras)) for rows in samples}) == 1
        assert not samples[0].extras[RETAINED].any()
        assert all((rows.extras["reference_logprob"] == -2.0).all() for rows in samples[1:])
    first, second = ([rows.tokens.tolist() for rows in samples[1:]] for samples in parts)
    assert first != second
