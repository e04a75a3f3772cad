"""The endpoints about models: which there are, how they read a text, and how they are."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fewstep.actors.engine.request import context_length
from fewstep.actors.serving.canvas_events import piece_texts
from fewstep.actors.serving.catalogue import Catalogue
from fewstep.actors.serving.schema import TokenizeBody, parse_body
from fewstep.actors.serving.service import CompletionService
from fewstep.platform.errors import RequestError


def model_router(catalogue: Catalogue) -> APIRouter:
    """`/v1/models` and `/tokenize`."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        entries = [_entry(service) for service in catalogue.services]
        return JSONResponse({"object": "list", "data": entries})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_entry(catalogue[name]))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = parse_body(TokenizeBody, await request.body())
        service = catalogue[body.model]
        ids, limit = service.token_ids(body), context_length(service.model.config)
        texts = None
        if body.return_token_strs:
            if len(ids) > limit:
                raise RequestError(
                    "return_token_strs",
                    f"it for {len(ids)} tokens",
                    f"at most {limit} tokens",
                    "leave it out",
                )
            texts = await asyncio.to_thread(piece_texts, service.model.tokenizer, ids)
        return JSONResponse(
            {
                "model": service.model.name,
                "count": len(ids),
                "tokens": list(ids),
                "token_strs": texts,
                "max_model_len": limit,
            }
        )

    return router


def health_router(catalogue: Catalogue) -> APIRouter:
    """`/health`: is the process well; `/ready`: does it take requests."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        healthy = catalogue.healthy
        who = {
            "status": "ok" if healthy else "dead",
            "model": catalogue.services[0].model.name,
            "pid": os.getpid(),
        }
        return JSONResponse({**who, **catalogue.stats()}, 200 if healthy else 503)

    @router.get("/ready")
    async def ready() -> Response:
        models = {service.model.name: service.host.healthy for service in catalogue.services}
        return JSONResponse({"ready": catalogue.healthy, "models": models}, 200 if catalogue.healthy else 503)

    return router


def _entry(service: CompletionService) -> dict[str, Any]:
    return service.entry().model_dump(exclude_unset=True)
