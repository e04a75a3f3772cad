"""The OpenAPI document of the endpoint, from the classes that read bodies and the package that shapes answers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from openai.types import Completion
from openai.types import Model as ModelEntry
from openai.types.chat import ChatCompletion
from pydantic.json_schema import models_json_schema

from fewstep.actors.serving.generation_routes import BODIES
from fewstep.actors.serving.openapi_examples import EXAMPLES
from fewstep.actors.serving.schema import TokenizeBody

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[Any], ...] = (*BODIES.values(), TokenizeBody)
_ANSWERS: tuple[type[Any], ...] = (Completion, ChatCompletion, ModelEntry)

# path -> (answer, what it does)
_GENERATION: dict[str, tuple[type[Any], str]] = {
    "/v1/completions": (Completion, "Continue a text, or fill in between it and `suffix`"),
    "/v1/chat/completions": (ChatCompletion, "Answer a conversation"),
    "/v1/fim/completions": (Completion, "Fill in the middle: one prefix and one suffix"),
    "/v1/apply/completions": (ChatCompletion, "Merge a tagged update into tagged code"),
    "/v1/edit/completions": (ChatCompletion, "Rewrite the tagged region of a file"),
}
_ERRORS = {
    "400": "A field that is malformed, unknown, or cannot be honoured; `param` names it",
    "401": "The server asks for an API key, and this is none of its keys",
    "404": "No such model",
    "408": "The request's deadline passed before its answer was done",
    "413": "The body is longer than 4 MiB",
    "429": "Too many requests wait, or the key's budget is spent; `retry-after` says for how long",
    "500": "The request failed in the engine",
    "503": "The engine is restarting, or the server is about to end",
}


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes, with an example for each body."""
    references, schemas = _schemas()
    paths: dict[str, Any] = {
        path: {"post": _generation(path, body, *_GENERATION[path], references)}
        for path, body in BODIES.items()
    }
    paths |= _reading(references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fewstep",
            "version": version("fewstep"),
            "description": "OpenAI's API over a diffusion language model. `null` means that a field is not given. "
            "Fields and streams are described in docs/serving.md.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A server without keys asks for none.
        "security": [{}, {"key": []}],
    }


def _schemas() -> tuple[dict[type[Any], dict[str, Any]], dict[str, Any]]:
    """A reference to each model's schema, and all of them by name."""
    found, definitions = models_json_schema(
        [*((cls, "validation") for cls in _BODIES), *((cls, "serialization") for cls in _ANSWERS)],
        ref_template=_REF,
    )
    schemas: dict[str, Any] = definitions["$defs"]
    references = {cls: reference for (cls, _), reference in found.items()}
    for cls in _BODIES:
        name = references[cls]["$ref"].rpartition("/")[2]
        schemas[name] = _as_read(cls, schemas[name])
    schemas["Error"] = _error_schema()
    return references, schemas


def _as_read(cls: type[Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A body's schema as `parse_body` reads it: null is "not given", and idle fields have the values that ask for nothing."""
    required = schema.get("required", [])
    properties = {
        name: value if name in required else _nullable(value) for name, value in schema["properties"].items()
    }
    for name, values in sorted(cls.idle.items()):
        properties[name] = {
            "enum": [*values, None],
            "description": "Accepted at a value that asks for nothing; refused by name at any other.",
        }
    return {**schema, "properties": properties}


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in schema.items() if key in ("default", "description", "title")}
    shape = {key: value for key, value in schema.items() if key not in kept}
    if any(option == {"type": "null"} for option in shape.get("anyOf", ())):
        return dict(schema)
    return {**kept, "anyOf": [shape, {"type": "null"}]}


def _error_schema() -> dict[str, Any]:
    text, optional = {"type": "string"}, {"type": ["string", "null"]}
    error = {"message": text, "type": text, "param": optional, "code": optional}
    inner = {
        "type": "object",
        "properties": error,
        "required": sorted(error),
        "additionalProperties": False,
    }
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}


def _errors(*codes: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {code: {"description": _ERRORS[code], "content": content} for code in codes}


def _body(schema: Mapping[str, Any], path: str) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "examples": EXAMPLES[path]}}
    return {"required": True, "content": content}


def _generation(
    path: str,
    body: type[Any],
    answer: type[Any],
    summary: str,
    references: Mapping[type[Any], Mapping[str, Any]],
) -> dict[str, Any]:
    stream = {"schema": {"type": "string", "description": "Server-sent events; only with `stream`"}}
    ok = {
        "description": "The answer, or with `stream` its chunks",
        "headers": {"x-request-id": {"schema": {"type": "string"}, "description": "The answer's `id`"}},
        "content": {"application/json": {"schema": references[answer]}, "text/event-stream": stream},
    }
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": _body(references[body], path),
        "responses": {"200": ok, **_errors("400", "401", "404", "408", "413", "429", "500", "503")},
    }


def _reading(references: Mapping[type[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """The routes that generate nothing."""
    entry = references[ModelEntry]
    listed = _object({"object": {"const": "list"}, "data": {"type": "array", "items": entry}})
    strings = {"type": ["array", "null"], "items": {"type": "string"}}
    counts = {"type": "integer", "minimum": 0}
    tokenized = _object(
        {
            "model": {"type": "string"},
            "count": counts,
            "tokens": {"type": "array", "items": counts},
            "token_strs": strings,
            "max_model_len": counts,
        }
    )
    health = _object(
        {
            "status": {"enum": ["ok", "dead"]},
            "model": {"type": "string"},
            "pid": counts,
            "running": counts,
            "waiting": counts,
            "forwards": counts,
            "rows": counts,
            "committed_tokens": counts,
            "weight_version": {"type": "string"},
            "models": {"type": "object"},
        }
    )
    ready = _object({"ready": {"type": "boolean"}, "models": {"type": "object"}})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/models": {"get": _get("List the models", listed, _errors("401"))},
        "/v1/models/{name}": {
            "get": {**_get("One model", entry, _errors("401", "404")), "parameters": [name]},
        },
        "/tokenize": {
            "post": {
                **_get(
                    "A prompt or a conversation as token ids",
                    tokenized,
                    _errors("400", "401", "404", "413", "429", "503"),
                ),
                "requestBody": _body(references[TokenizeBody], "/tokenize"),
            }
        },
        "/metrics": {"get": _text("Metrics of all replicas, in Prometheus' text format", _errors("401"))},
        "/health": {"get": _get("Is the process well", health, _same(health, "An engine is dead"))},
        "/ready": {"get": _get("Does it take requests", ready, _same(ready, "Not yet, or no longer"))},
    }


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _get(summary: str, schema: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    ok = {"description": "OK", "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "responses": {"200": ok, **(others or {})}}


def _text(summary: str, others: Mapping[str, Any]) -> dict[str, Any]:
    ok = {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"summary": summary, "responses": {"200": ok, **others}}


def _same(schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    """A 503 whose body is that of the 200."""
    return {"503": {"description": description, "content": {"application/json": {"schema": schema}}}}
