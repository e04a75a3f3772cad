"""The documents on which a refinement keeps the model what it was, and the rows they become.

Opened before anything starts; answered, where they are prompts alone, by the model that refinement starts from; shown under
masks of random rates in every update. What an update sees is a function of (documents, seed, step, part of the step).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.corruption import Sample, mask_states
from fewstep.pipelines.curriculum import normalised
from fewstep.pipelines.frontier import Generate
from fewstep.pipelines.objectives.retaining import RETAINED
from fewstep.pipelines.retain_settings import FAMILY, Retain
from fewstep.pipelines.retained_documents import Document, Found, blurred, family_documents, read_documents
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSet, TaskSource, state_digest
from fewstep.pipelines.tasks.benchmark import Exclusion
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import DecodePolicy
from fewstep.platform.rng import derive_seed, generator

ANSWERED = "retained.jsonl"
"""File of the documents as they are trained on."""
MASK_RATES = (0.1, 1.0)


@dataclass(frozen=True)
class Retention:
    """What is retained.

    Attributes:
        settings: the configuration's.
        documents: in the model's tokens; without texts until `answered`.
        about: name, digest, origin and sizes, for the lineage.
        excluded: documents that were left out, and why.
        answers: digest of the model's own answers; "" where the documents bring texts, and until `answered`.
    """

    settings: Retain
    model: ModelConfig
    documents: tuple[Document, ...]
    about: TaskSet
    excluded: tuple[Exclusion, ...] = ()
    answers: str = ""

    def answered(
        self,
        config: RefineConfig,
        tokenizer: Tokenizer,
        generate: Generate,
        weights: str,
        trained_on: str = "",
    ) -> Retention:
        """With texts; those of prompts alone are asked of `generate`, which holds the weights refinement starts from.

        They are kept in `out`, and taken from there by a run that goes on, and from the recorded run by a replay: a
        second asking may batch them otherwise, and rounding would draw other tokens.

        Args:
            weights: digest of those weights.
            trained_on: `answers` of the checkpoint that the run goes on from; "" = it starts.
        Raises:
            ConfigError: the model answers none of them, or these are others than the checkpoint was trained on.
        """
        if self.settings.has_texts:
            return self
        path = config.out / ANSWERED
        asked = (config.curriculum.start, self.settings.temperature, config.max_tokens, config.seed)
        key = state_digest([self.about.digest, weights, repr(asked)])
        known = _known(path, key)
        if known is None and config.replay is not None:
            known = _known(config.replay.parent / ANSWERED, key)
        documents = self._ask(config, generate) if known is None else known
        answers = state_digest(repr(one) for one in documents)
        if trained_on and answers != trained_on:
            raise ConfigError(
                "retain", f"other answers in {path} than the checkpoint was trained on" if known is not None else
                f"new answers, as {path} is gone, and others than the checkpoint was trained on",
                "those it was trained on", f"put the old {ANSWERED} back, or set resume=false to start over",
            )  # fmt: skip
        texts = [
            json.dumps({
                "prompt_ids": one.prompt_ids, "text_ids": one.text_ids, "ended": one.ended,
                "prompt": tokenizer.decode(list(one.prompt_ids)), "text": tokenizer.decode(list(one.text_ids)),
            }) for one in documents
        ]  # fmt: skip
        atomic_write_text(path, "\n".join([json.dumps({"key": key}), *texts]) + "\n")
        return replace(self, documents=tuple(documents), answers=answers)

    def _ask(self, config: RefineConfig, generate: Generate) -> list[Document]:
        policy = DecodePolicy(
            kind="threshold", threshold=config.curriculum.start, temperature=self.settings.temperature
        )
        requests = [
            Request(
                f"retain-{index}", one.prompt_ids,
                policy.model_copy(update={"seed": derive_seed("retain-answer", config.seed, index)}), config.max_tokens,
            ) for index, one in enumerate(self.documents)
        ]  # fmt: skip
        documents = []
        for one, trajectory in zip(self.documents, generate(requests), strict=True):
            ids = tuple(trajectory.completion_ids.tolist())
            document = Document(one.prompt_ids, ids, ended=trajectory.finish_reason == "stop")
            if ids and (
                document.ended or _whole_blocks(document, self.model) > _num_prompt(document, self.model)
            ):
                documents.append(document)
        if not documents:
            raise ConfigError("retain", "no answer to any prompt", "a model that answers", "give texts")
        print(f"retention: the unrefined model answered {len(documents)} prompts", flush=True)
        return documents

    def rows(self, seed: int, step: int, part: int) -> list[SampleRows]:
        """The documents of one update under masks, weights normalised over all their masked tokens.

        Plain weights: the form with -log p keeps the weights 1/rate of pre-training (`mask_states`).
        """
        draws = generator("retain", seed, step, part)
        count = min(self.settings.documents_per_update, len(self.documents))
        chosen = draws.choice(len(self.documents), count, replace=False)
        shown = normalised([self._shown(self.documents[index], draws) for index in chosen.tolist()])
        for rows in shown:
            rows.extras[RETAINED] = (rows.targets >= 0).astype(np.float32)
        return shown

    def _shown(self, document: Document, draws: np.random.Generator) -> SampleRows:
        sample = as_sample(document, self.model)
        rows = SampleRows.clean(sample.tokens)
        mask_states(
            sample, rows, block_size=self.model.sees_block, mask_token=self.model.mask_token_id, rates=MASK_RATES,
            complementary=True, draws=draws, weighted=self.settings.form == "nll",
        )  # fmt: skip
        return rows


def as_sample(document: Document, model: ModelConfig) -> Sample:
    """Whole blocks: a text that ended is filled up with end-of-sequence, one that was cut loses its last part block."""
    tokens = np.array([*document.prompt_ids, *document.text_ids], np.int64)
    if not document.ended:
        return Sample(tokens[: _whole_blocks(document, model)], _num_prompt(document, model))
    if tokens[-1] != model.eos_token_id:
        tokens = np.append(tokens, model.eos_token_id)
    return Sample.padded(tokens, _num_prompt(document, model), model.block_size, model.eos_token_id)


def _num_prompt(document: Document, model: ModelConfig) -> int:
    # With shifted logits no row predicts the first token.
    return max(len(document.prompt_ids), int(model.logit_shift))


def _whole_blocks(document: Document, model: ModelConfig) -> int:
    """Tokens up to the last block's end."""
    return (len(document.prompt_ids) + len(document.text_ids)) // model.block_size * model.block_size


def open_retention(
    config: RefineConfig, model: ModelConfig, tokenizer: Tokenizer, chat: ChatTemplate, source: TaskSource
) -> Retention | None:
    """The documents of a configuration; None where it retains nothing. Prints what was found.

    Documents with the prompt of a held-out task are left out: what a run is measured by shapes nothing in it.

    Raises:
        ConfigError: sources that are not there or cannot be read, or hold no document that leaves room for an answer.
    """
    settings = config.retain
    if settings is None:
        return None
    found, origin = _find(config, settings, model.mask_token_id, tokenizer, chat, source)
    room = min(settings.sequence_tokens, model.max_position_embeddings)
    documents = [
        short for one in found.documents if (short := _fitted(one, settings, model, room, config.max_tokens))
    ]
    excluded = found.excluded
    if len(documents) < len(found.documents):
        reason = f"its prompt leaves no room in {room} tokens"
        excluded += [Exclusion("retain", reason)] * (len(found.documents) - len(documents))
    if not documents:
        first = f" (left out: {excluded[0].reason})" if excluded else ""
        raise ConfigError(
            "retain.sources", f"no usable document in {origin}", "at least one that leaves room for an answer",
            f"check the columns and sequence_tokens{first}",
        )  # fmt: skip
    digest = state_digest(repr(one) for one in documents)
    about = TaskSet("retained", digest, origin, {"num_documents": len(documents)})
    print(f"retention: {len(documents)} documents from {origin}, {len(excluded)} left out", flush=True)
    return Retention(settings, model, tuple(documents), about, tuple(excluded))


def _find(
    config: RefineConfig, settings: Retain, mask_token: int, tokenizer: Tokenizer, chat: ChatTemplate, source: TaskSource
) -> tuple[Found, str]:  # fmt: skip
    """Documents, and where they are from in words."""
    if settings.sources == (FAMILY,):
        found = Found(family_documents(settings, tokenizer), [])
        origin = "pairs of the embedded family's training side"
    elif settings.sources:
        held_out = {one.task.prompt for one in (*source.held_out, *source.watched)}
        found = read_documents(settings, tokenizer, chat, held_out, mask_token)
        origin = ", ".join(settings.sources)
    else:
        steps = range(-(-settings.num_documents // config.prompts_per_step))
        asked = [one for step in steps for one in source.draw(step, config.prompts_per_step)]
        found = Found([Document(one.prompt_ids) for one in asked[: settings.num_documents]], [])
        origin = "the prompts of the training side"
    if settings.noise:
        found = found._replace(documents=blurred(found.documents, settings.noise, config.seed))
        origin += f", {settings.noise:g} of their tokens replaced"
    return found, origin


def _fitted(
    document: Document, settings: Retain, model: ModelConfig, room: int, max_tokens: int
) -> Document | None:
    """Cut to whole blocks within `room`; None where its prompt leaves none, for a text or for the model's own answer."""
    room -= room % model.block_size
    if not settings.has_texts:
        return document if len(document.prompt_ids) + max_tokens <= room else None
    left = room - len(document.prompt_ids)
    if left < model.block_size:
        return None
    if len(document.text_ids) < left:
        return document
    return replace(document, text_ids=document.text_ids[:left], ended=False)


def _known(path: Path, key: str) -> list[Document] | None:
    """The documents that `answered` kept in a file; None where there is none, or one of others."""
    if not path.is_file():
        return None
    first, *lines = path.read_text().splitlines()
    if json.loads(first)["key"] != key:
        return None
    rows = [json.loads(line) for line in lines]
    return [Document(tuple(row["prompt_ids"]), tuple(row["text_ids"]), row["ended"]) for row in rows]
