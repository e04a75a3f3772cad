"""Conversations to prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.schema import Message
from fewstep.platform.errors import CheckpointError, RequestError

TURNS = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'system' %}\n"
    "        {{ raise_exception('no system messages') }}\n"
    "    {% endif %}\n"
    "{{ eos_token }}{{ message.role }}:{{ message.content }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def settings(folder: Path, **values: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def messages(*pairs: tuple[str, str]) -> list[Message]:
    return [Message.model_validate({"role": role, "content": content}) for role, content in pairs]


def test_without_a_template_one_user_message_is_the_prompt(tmp_path: Path) -> None:
    chat = ChatTemplate(settings(tmp_path, eos_token="<|eos|>"))
    assert not chat.templated
    assert chat.render(messages(("user", "def f():\n"))) == "def f():\n"


@pytest.mark.parametrize("roles", [("assistant",), ("system", "user"), ("user", "assistant", "user")])
def test_without_a_template_anything_else_is_refused(tmp_path: Path, roles: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        ChatTemplate(tmp_path).render(messages(*((role, "x") for role in roles)))
    assert caught.value.field == "messages"


@pytest.mark.parametrize("where", ["settings", "list", "file"])
def test_template_of_the_model_is_rendered(tmp_path: Path, where: str) -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TURNS}]
    template = {"settings": TURNS, "list": several, "file": "loses to the file"}[where]
    settings(tmp_path, eos_token={"content": "<e>", "special": True}, chat_template=template)
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(TURNS)
    text = ChatTemplate(tmp_path).render(messages(("user", "hi"), ("assistant", "yo"), ("user", "so")))
    assert text == "<e>user:hi\n<e>assistant:yo\n<e>user:so\nassistant:"


def test_a_template_that_refuses_is_a_bad_request(tmp_path: Path) -> None:
    chat = ChatTemplate(settings(tmp_path, chat_template=TURNS))
    with pytest.raises(RequestError, match="no system messages"):
        chat.render(messages(("system", "x"), ("user", "y")))


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    chat = ChatTemplate(settings(tmp_path, chat_template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(RequestError, match="unsafe"):
        chat.render(messages(("user", "x")))


@pytest.mark.parametrize("content", ["{", '{"chat_template": "{% for %}"}', '{"chat_template": 5}', "[]"])
def test_broken_settings_name_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ChatTemplate(tmp_path)
