"""Requests that schemathesis makes of our own OpenAPI document, right ones and wrong ones, at every operation."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.schemas import APIOperation

from fewstep.actors.serving.openapi import openapi_document

load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    ]
)
OPERATIONS = [
    (path, verb, mode)
    for path, verbs in openapi_document()["paths"].items()
    for verb, operation in verbs.items()
    # A GET takes nothing that could be wrong.
    for mode in (GenerationMode if "requestBody" in operation else (GenerationMode.POSITIVE,))
]


@pytest.fixture(scope="module")
def described(url_of_both: str) -> Any:
    return schemathesis.openapi.from_url(f"{url_of_both}/openapi.json")


@pytest.mark.parametrize(("path", "verb", "mode"), OPERATIONS)
def test_the_answer_is_one_that_is_described(
    described: Any, path: str, verb: str, mode: GenerationMode
) -> None:
    operation: APIOperation[Any, Any, Any, Any] = described[path][verb]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Case) -> None:
        case.call_and_validate(checks=CHECKED, timeout=60)

    send()
