"""From a checked body to token ids: what stands before the answer, and what stands behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from fewstep.actors.engine.request import context_length
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.schema import ApplyBody, ChatBody, CompletionBody, EditBody, Message
from fewstep.actors.serving.tagged_message import EditRequest, parse_apply, parse_edit
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import RequestError

# Tokens that a rewritten piece of code may have more than what it was made of, when the request does not say.
_ROOM_TO_GROW = 32


@dataclass(frozen=True)
class Prompt:
    """One canvas to fill.

    Attributes:
        ids, suffix_ids: before and behind the masks. The suffix of a block-causal model is cut to what shares a block
            with the last mask: the model never looks further.
        max_tokens: masks, at most for an answer without a suffix, exactly for one with.
        stop: further strings that end the answer.
        opening, closing: text around the answer that the model does not write.
    """

    ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    opening: str = ""
    closing: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of the request on the canvas."""
        return len(self.ids) + len(self.suffix_ids)


class Prompts:
    """How one model reads request bodies.

    Args:
        max_tokens: of one answer when the request does not say.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, chat: ChatTemplate, max_tokens: int
    ) -> None:
        self._config, self._tokenizer, self._chat, self._max_tokens = config, tokenizer, chat, max_tokens

    def of(self, body: CompletionBody | ChatBody) -> list[Prompt]:
        """The canvases a body asks for.

        Raises:
            RequestError: messages the endpoint or the chat template does not take; an empty list of prompts.
        """
        if isinstance(body, ApplyBody):
            return [self._apply(body)]
        if isinstance(body, EditBody):
            return [self._edit(body)]
        if isinstance(body, ChatBody):
            ids = self.chat_ids(body.messages)
            return [Prompt(ids, (), self._limit(len(ids), body.token_limit))]
        if not body.prompts:
            raise RequestError("prompt", "an empty list", "at least one prompt", "send a prompt")
        suffix = self._suffix_ids(body.suffix)
        return [self._filled(self.text_ids(prompt), suffix, body.token_limit) for prompt in body.prompts]

    def text_ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt that is text, or ids already."""
        return tuple(self._tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt)

    def chat_ids(self, messages: Sequence[Message], opening: str = "") -> tuple[int, ...]:
        """Token ids of a conversation, and of the beginning of its answer."""
        text = self._chat.render(messages) + opening
        return tuple(self._tokenizer.encode(text, add_special_tokens=not self._chat.templated).ids)

    def _apply(self, body: ApplyBody) -> Prompt:
        parts = parse_apply(_only_message(body))
        fence = _fence(parts.original_code, parts.update_snippet)
        task = (
            "Merge the update into the original code and write the whole merged file.\n\n"
            f"Original code:\n{fence}\n{parts.original_code}\n{fence}\n\n"
            "Update (existing code that it leaves out stays as it is):\n"
            f"{fence}\n{parts.update_snippet}\n{fence}\n\nMerged file:\n"
        )
        ids = self.chat_ids([Message(role="user", content=task)], f"{fence}\n")
        usual = self._count(parts.original_code) + self._count(parts.update_snippet) + _ROOM_TO_GROW
        return Prompt(ids, (), self._limit(len(ids), body.token_limit, usual), (f"\n{fence}",))

    def _edit(self, body: EditBody) -> Prompt:
        parts = parse_edit(_only_message(body))
        fence = _fence(parts.before, parts.region, parts.after)
        task = Message(role="user", content=_edit_task(parts, fence))
        ids = self.chat_ids([task], f"{fence}\n{parts.before}")
        suffix = self._suffix_ids(f"{parts.after}\n{fence}")
        usual = self._count(parts.region) + _ROOM_TO_GROW
        filled = self._filled(ids, suffix, body.token_limit, usual)
        return Prompt(filled.ids, filled.suffix_ids, filled.max_tokens, (), f"{fence}\n", f"\n{fence}")

    def _filled(
        self, ids: tuple[int, ...], suffix: tuple[int, ...], asked: int | None, usual: int | None = None
    ) -> Prompt:
        """A canvas with a hole before a suffix.

        A block-causal model sees of the suffix what shares the hole's last block. Where the hole ends is the caller's
        choice: a length nobody asked for is shortened until all but one of that block's positions hold suffix, and one
        that was asked for by one position if the suffix would share nothing.
        """
        if not suffix:
            return Prompt(ids, (), self._limit(len(ids), asked, usual))
        if self._config.attention_kind != "block_causal":
            return Prompt(ids, suffix, self._limit(len(ids) + len(suffix), asked, usual))
        size, limit = self._config.block_size, self._limit(len(ids), asked, usual)
        over = (len(ids) + limit) % size
        limit = max(1, limit - ((over - 1) % size if asked is None else int(over == 0)))
        return Prompt(ids, suffix[: -(len(ids) + limit) % size] or suffix[:1], limit)

    def _limit(self, num_taken: int, asked: int | None, usual: int | None = None) -> int:
        if asked is not None:
            return asked
        wanted = self._max_tokens if usual is None else usual
        # At least 1: a prompt that fills the context is then refused by the engine, which says why.
        return max(1, min(wanted, context_length(self._config) - num_taken))

    def _suffix_ids(self, text: str) -> tuple[int, ...]:
        # No special tokens: they would stand in the middle of the text.
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _count(self, text: str) -> int:
        return len(self._suffix_ids(text))


def _only_message(body: ChatBody) -> str:
    if len(body.messages) != 1 or body.messages[0].role != "user":
        roles = ", ".join(message.role for message in body.messages)
        raise RequestError("messages", roles, "one user message", "send the tagged message alone")
    return body.messages[0].text


def _edit_task(parts: EditRequest, fence: str) -> str:
    seen = "".join(f"{path}:\n{fence}\n{code}\n{fence}\n\n" for path, code in parts.snippets)
    return (
        (f"Recently viewed code:\n\n{seen}" if seen else "")
        + (f"Recent edits, newest last:\n{fence}\n{parts.diffs}\n{fence}\n\n" if parts.diffs.strip() else "")
        + f"Rewrite this part of {parts.path} as its author would go on:\n"
        + f"{fence}\n{parts.shown_region}\n{fence}\n\nThe file with the part rewritten:\n"
    )


def _fence(*texts: str) -> str:
    """Backticks enough that no text closes the fence by itself."""
    runs = [len(run) for text in texts for run in re.findall("`+", text)]
    return "`" * max([3, *(length + 1 for length in runs)])
