"""The OpenAPI document is true: its examples work, its answers fit, and it knows every route."""

from __future__ import annotations

import re
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi.routing import APIRoute

from fewstep.actors.serving.app import create_app
from fewstep.actors.serving.desk import Desk, DeskOptions
from fewstep.actors.serving.openapi import openapi_document
from fewstep.actors.serving.openapi_examples import EXAMPLES
from fewstep.actors.serving.schema import ChatBody, CompletionBody, TokenizeBody
from fewstep.actors.serving.service import CompletionService

CASES = [(path, name) for path, examples in EXAMPLES.items() for name in examples]


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def answer_schema(document: dict[str, Any], path: str, verb: str, status: int) -> dict[str, Any]:
    content = document["paths"][path][verb]["responses"][str(status)]["content"]
    found: dict[str, Any] = content["application/json"]["schema"]
    return found


def body_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    return found


def test_it_knows_every_route(service: CompletionService) -> None:
    app = create_app(service, desk=Desk(DeskOptions(), lambda: {"tiny": service.host}))
    routers = [getattr(route, "original_router", None) for route in app.routes]
    found = [*app.routes, *(route for router in routers if router is not None for route in router.routes)]
    routes = {
        (re.sub(r":\w+\}", "}", route.path), verb.lower())
        for route in found
        if isinstance(route, APIRoute)
        for verb in route.methods
    }
    paths = {(path, verb) for path, verbs in openapi_document()["paths"].items() for verb in verbs}
    assert routes - paths == {(path, "get") for path in ("/openapi.json", "/docs", "/", "/playground/{name}")}
    assert paths <= routes


@pytest.mark.parametrize(("path", "name"), CASES)
def test_examples_work_and_their_answers_fit(
    url_of_both: str, document: dict[str, Any], path: str, name: str
) -> None:
    # The model that has a chat template and sees both sides takes all of them.
    body = {**EXAMPLES[path][name]["value"], "model": "both"}
    check(document, body_schema(document, path), body)
    response = httpx.post(url_of_both + path, json=body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.headers["content-type"].startswith("text/event-stream")
    else:
        check(document, answer_schema(document, path, "post", 200), response.json())


def test_the_served_examples_name_a_served_model(document: dict[str, Any]) -> None:
    for path in EXAMPLES:
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert {example["value"]["model"] for example in content["examples"].values()} == {"tiny"}


def test_answers_with_everything_fit(url: str, document: dict[str, Any]) -> None:
    asked = {"model": "tiny", "prompt": "abc", "logprobs": 0, "fewstep": {"return_trajectory": True}}
    answer = httpx.post(f"{url}/v1/completions", json=asked).json()
    check(document, answer_schema(document, "/v1/completions", "post", 200), answer)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "logprobs": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat).json()
    check(document, answer_schema(document, "/v1/chat/completions", "post", 200), answer)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/health", "/ready"])
def test_reading_answers_fit(url: str, document: dict[str, Any], path: str) -> None:
    route = "/v1/models/{name}" if path.endswith("tiny") else path
    check(document, answer_schema(document, route, "get", 200), httpx.get(url + path).json())


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b'{"model": "tiny", "prompt": "a", "x": 1}', 400),
        ("/v1/chat/completions", b'{"model": "gpt", "messages": [{"role": "user", "content": "a"}]}', 404),
        ("/v1/fim/completions", b'"' + b"a" * 5 * 2**20 + b'"', 413),
        ("/tokenize", b"[]", 400),
    ],
)
def test_errors_fit(url: str, document: dict[str, Any], path: str, body: bytes, status: int) -> None:
    response = httpx.post(url + path, content=body)
    assert response.status_code == status
    check(document, answer_schema(document, path, "post", status), response.json())


@pytest.mark.parametrize("cls", [CompletionBody, ChatBody, TokenizeBody])
def test_fields_are_those_that_are_read(document: dict[str, Any], cls: type[Any]) -> None:
    schema = document["components"]["schemas"][cls.__name__]
    assert schema["properties"].keys() == cls.model_fields.keys() | cls.idle.keys()
    assert schema["additionalProperties"] is False


def test_null_is_not_given_in_the_schema_as_in_the_server(url: str, document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["CompletionBody"]
    body = dict.fromkeys(schema["properties"]) | {"model": "tiny", "prompt": "a"}
    check(document, schema, body)
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def test_the_page_needs_no_network(url: str) -> None:
    page = httpx.get(f"{url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in re.sub(r"\$\{location\.origin\}", "", page.text)
    assert 'fetch("openapi.json")' in page.text
