"""The HTTP application: one router per concern over the models served here."""

from __future__ import annotations

from fastapi import FastAPI

from fewstep.actors.serving.catalogue import Catalogue
from fewstep.actors.serving.desk import Desk, DeskOptions
from fewstep.actors.serving.docs_routes import docs_router
from fewstep.actors.serving.gate import add_desk
from fewstep.actors.serving.generation_routes import generation_router
from fewstep.actors.serving.http_errors import add_error_handlers, error_response
from fewstep.actors.serving.model_routes import health_router, model_router
from fewstep.actors.serving.playground_routes import playground_router
from fewstep.actors.serving.service import CompletionService


def create_app(*services: CompletionService, desk: Desk | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        services: one per model, shared by all requests; at least one.
        desk: stands in front of them; None = one that asks for no key.
    """
    if desk is None:
        desk = Desk(DeskOptions(), lambda: {service.model.name: service.host for service in services})
    catalogue = Catalogue(services)
    # FastAPI's own pages would load scripts from elsewhere, and it cannot see our bodies: we read them ourselves.
    app = FastAPI(title="fewstep", openapi_url=None, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    add_desk(app, desk, error_response)
    app.include_router(health_router(catalogue))
    app.include_router(model_router(catalogue))
    app.include_router(generation_router(catalogue))
    app.include_router(docs_router(catalogue))
    app.include_router(playground_router())
    return app
