"""A task in one model's tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.schema import Message
from fewstep.platform.records import DecodePolicy, Task


@dataclass(frozen=True)
class Prepared:
    """What a model is asked.

    Attributes:
        suffix_ids: what stands behind the answer (infill); empty otherwise.
        max_tokens: of an answer at most.
        stop: strings that end it.
    """

    task: Task
    prompt_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]

    def request(self, request_id: str, policy: DecodePolicy) -> Request:
        """One completion asked for under a policy."""
        return Request(
            request_id, self.prompt_ids, policy, self.max_tokens, self.stop, suffix_ids=self.suffix_ids
        )


def prompt_tokens(task: Task, tokenizer: Tokenizer, chat: ChatTemplate | None) -> tuple[int, ...]:
    """The prompt's tokens: as a user's message through the chat template where there is one, else the text itself.

    A template brings every special token that the model wants; a plain text gets those of the tokenizer.
    """
    if chat is None:
        return tuple(tokenizer.encode(task.prompt).ids)
    text = chat.render([Message(role="user", content=task.prompt)])
    return tuple(tokenizer.encode(text, add_special_tokens=not chat.templated).ids)
