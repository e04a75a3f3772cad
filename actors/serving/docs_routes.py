"""`/openapi.json`, and `/docs`: a page of our own that shows it and loads nothing from elsewhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, JSONResponse

from fewstep.actors.serving.catalogue import Catalogue
from fewstep.actors.serving.openapi import openapi_document
from fewstep.actors.serving.openapi_examples import MODEL

_PAGE = Path(__file__).parent / "docs.html"


def docs_router(catalogue: Catalogue) -> APIRouter:
    """The document, its examples asking for the first model served here, and the page."""
    router = APIRouter()

    @cache
    def document() -> dict[str, Any]:
        name = json.dumps(catalogue.services[0].model.name)
        found: dict[str, Any] = json.loads(json.dumps(openapi_document()).replace(f'"{MODEL}"', name))
        return found

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document())

    @router.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    return router
