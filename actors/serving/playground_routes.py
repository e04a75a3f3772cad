"""`/`: the playground, a page of files shipped with the package that loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

_FOLDER = Path(__file__).parent / "playground"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What models write is shown on this page, so a mistake in it must not become a script that holds the API key.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def playground_router() -> APIRouter:
    """The page at `/` and its files under `/playground/`, all of them read once."""
    files = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _TYPES}
    answers = {name: (path.read_bytes(), _TYPES[path.suffix]) for name, path in files.items()}
    router = APIRouter()

    @router.get("/")
    async def page() -> Response:
        return file("index.html")

    @router.get("/playground/{name}")
    async def part(name: str) -> Response:
        return file(name)

    def file(name: str) -> Response:
        if name not in answers:
            raise HTTPException(404, "the playground has no such file")
        content, media_type = answers[name]
        return Response(content, media_type=media_type, headers=_HEADERS)

    return router
