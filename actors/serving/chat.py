"""Messages to prompt text: the model folder's own Jinja template, or nothing but the one user message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fewstep.actors.serving.schema import Message
from fewstep.platform.errors import CheckpointError, RequestError

_SETTINGS = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


class ChatTemplate:
    """How a model wants to see a conversation.

    Hugging Face's conventions: the source is `chat_template.jinja` or `chat_template` in
    `tokenizer_config.json`, rendered with `messages`, `add_generation_prompt=True`, the special tokens'
    strings, `raise_exception` and `strftime_now`. The template is part of a downloaded model, so it runs in
    Jinja's sandbox and cannot change what it is given.

    Args:
        folder: the model folder.
    Raises:
        CheckpointError: the settings cannot be read or the template does not compile.
    """

    def __init__(self, folder: Path) -> None:
        self._special: dict[str, str] = {}
        source = self._read(Path(folder))
        self._template: Template | None = None
        if source is not None:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
            try:
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise CheckpointError(
                    f"{folder}: chat template", f"{error}", "a Jinja template", "repair it or remove it"
                ) from error

    @property
    def templated(self) -> bool:
        """Whether the model brought a template; its output already holds every special token it wants."""
        return self._template is not None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text.

        Raises:
            RequestError: no template and anything but one user message, or the template refused.
        """
        if self._template is None:
            if len(messages) != 1 or messages[0].role != "user":
                roles = ", ".join(message.role for message in messages)
                raise RequestError(
                    "messages",
                    roles,
                    "one user message: this model has no chat template and continues text",
                    "send one user message, or use a model with a chat template",
                )
            return messages[0].text
        plain = [
            {
                "role": message.role,
                "content": message.text,
                **({"name": message.name} if message.name else {}),
            }
            for message in messages
        ]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._special)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                "messages",
                str(error),
                "a conversation the model's chat template takes",
                "change the messages",
            ) from error

    def _read(self, folder: Path) -> str | None:
        """The template's source; fills in the special tokens' strings on the way."""
        path, source = folder / _SETTINGS, None
        if path.is_file():
            try:
                settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                self._special = {
                    name: token["content"] if isinstance(token, dict) else token
                    for name, token in settings.items()
                    if name.endswith("_token") and isinstance(token, str | dict)
                }
                source = _default_of(settings.get("chat_template"))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    str(path), f"{type(error).__name__}: {error}", "a tokenizer's settings", "copy it again"
                ) from error
        file = folder / _TEMPLATE
        return file.read_text(encoding="utf-8") if file.is_file() else source


def _default_of(templates: Any) -> str | None:
    """One template, or the one called `default` of several."""
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}["default"]
    if templates is None or isinstance(templates, str):
        return templates
    raise TypeError(f"chat_template is {type(templates).__name__}")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
