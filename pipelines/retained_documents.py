"""Documents to retain a model on: out of files, or prompts of the training side, some of their tokens replaced."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fewstep.actors.serving.chat import ChatTemplate
from fewstep.pipelines.retain_settings import Retain
from fewstep.pipelines.sources import Columns, Row, find_files, plan_units, read_rows
from fewstep.pipelines.tasks.benchmark import Exclusion
from fewstep.pipelines.tasks.family import draw_pair
from fewstep.pipelines.tasks.prepared import prompt_tokens
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import Check, Task
from fewstep.platform.rng import derive_seed, generator

_UNIT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Document:
    """Token ids of a prompt and of the text behind it; `ended` says that the text is whole."""

    prompt_ids: tuple[int, ...]
    text_ids: tuple[int, ...] = ()
    ended: bool = False


class Found(NamedTuple):
    """Documents, and what was left out and why."""

    documents: list[Document]
    excluded: list[Exclusion]


def read_documents(
    settings: Retain, tokenizer: Tokenizer, chat: ChatTemplate, held_out: AbstractSet[str], mask_token: int
) -> Found:
    """`num_documents` of the sources' documents, drawn by a hash of their place, in the order of the files.

    Args:
        held_out: prompts of tasks that the run is measured by; no document may have one.
        mask_token: no document may hold it: the model never predicts it, so its likelihood is 0.
    Raises:
        ConfigError: a source that is not there, cannot be read or lacks a column.
    """
    kept: list[tuple[int, int, Row]] = []
    excluded: list[Exclusion] = []
    for number, row in enumerate(_rows(settings)):
        reason = row.reason or (
            "has the prompt of a held-out task" if _prompt(settings, row) in held_out else ""
        )
        if reason:
            excluded.append(Exclusion(f"{row.path}: row {row.number}", reason))
            continue
        # A heap of the smallest hashes, the largest of them first out: one pass, and memory for what is kept.
        entry = (-derive_seed("retained-document", number), number, row)
        if len(kept) < settings.num_documents:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
    chosen = sorted((number, row) for _, number, row in kept)
    template = chat if settings.chat else None
    documents = []
    for _, row in chosen:
        document = _encoded(settings, row, tokenizer, template)
        if mask_token in (*document.prompt_ids, *document.text_ids):
            excluded.append(Exclusion(f"{row.path}: row {row.number}", "holds the mask token"))
        else:
            documents.append(document)
    return Found(documents, excluded)


def _rows(settings: Retain) -> Iterator[Row]:
    columns = (
        Columns(settings.text_column, settings.prompt_column)
        if settings.text_column
        else Columns(settings.prompt_column, "")
    )
    try:
        units = plan_units(find_files(settings.sources, "auto", ()), columns, _UNIT_BYTES)
    except ConfigError as error:
        raise ConfigError(f"retain.{error.field}", error.got, error.allowed, error.fix) from error
    for unit in units:
        yield from read_rows(unit, columns)


def _prompt(settings: Retain, row: Row) -> str:
    return row.prompt if settings.text_column else row.text


def _encoded(settings: Retain, row: Row, tokenizer: Tokenizer, chat: ChatTemplate | None) -> Document:
    prompt = _prompt(settings, row)
    if not prompt:
        return Document((), tuple(tokenizer.encode(row.text).ids), ended=True)
    task = Task(
        task_id=f"{row.path}:{row.number}", prompt=prompt, check=Check(kind="reference", entry_point="")
    )
    prompt_ids = prompt_tokens(task, tokenizer, chat)
    if not settings.text_column:
        return Document(prompt_ids)
    return Document(prompt_ids, tuple(tokenizer.encode(row.text, add_special_tokens=False).ids), ended=True)


def family_documents(settings: Retain, tokenizer: Tokenizer) -> list[Document]:
    """Prompts and bodies drawn as pre-training draws them: specifications of the training side, the argument always of the
    same name, every other choice free."""
    draws = generator("retain-family")
    pairs = [draw_pair(draws) for _ in range(settings.num_documents)]
    return [
        Document(tuple(tokenizer.encode(prompt).ids), tuple(tokenizer.encode(body).ids), ended=True)
        for prompt, body in pairs
    ]


def blurred(documents: Sequence[Document], share: float, seed: int) -> list[Document]:
    """Prompts of which each token is replaced, with probability `share`, by one drawn from all tokens that the prompts
    hold, each as likely: what the model knows, in places where it never was."""
    known = np.unique(np.concatenate([np.array(one.prompt_ids, np.int64) for one in documents]))
    changed = []
    for index, one in enumerate(documents):
        draws = generator("retain-noise", seed, index)
        ids = np.array(one.prompt_ids, np.int64)
        hit = draws.random(len(ids)) < share
        ids[hit] = draws.choice(known, int(hit.sum()))
        changed.append(replace(one, prompt_ids=tuple(ids.tolist())))
    return changed
