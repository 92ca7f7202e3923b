"""The server as an ASGI application: its routes, middleware and error handlers."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from diffusify.config import DiffusionConfig
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api import chat_completions, completions, infill, openai_responses, score
from diffusify.serving.api.errors import ClientDisconnected, ErrorResponse, invalid_body, to_error_response
from diffusify.serving.api.middleware import RequestMiddleware
from diffusify.serving.api.service import Service
from diffusify.serving.engine.engine import Engine, QueueFull
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_pool import ModelPool, UnknownModel
from diffusify.serving.engine.model_queue import ModelQueue
from diffusify.serving.limits import Limits

PLAYGROUND = Path(__file__).parents[1] / "playground"


def create_app(
    models: Mapping[str, DiffusionLM],
    limits: Limits = Limits(),
    *,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    log_prompts: bool = False,
    folder: Path | None = None,
    keep: int = 4,
    opener: Callable[[str], DiffusionLM] = DiffusionLM.from_pretrained,
) -> FastAPI:
    """The server as an ASGI application. Raises ValueError if there is neither a model nor a folder, or a key is empty.

    Models in `folder` are opened by `opener` on request; at most `keep` of them stay open. If `keys` are given, every
    request needs one of them. `origins` are the web origins whose pages may send requests (CORS). With `log_prompts`
    the log has the request bodies too.
    """
    if not models and folder is None:
        raise ValueError("there is no model to serve; give at least one model, or a folder of models")
    if not all(keys):
        raise ValueError("a key is empty; give a secret (is a variable of the shell unset?), or no key at all")
    metrics = Metrics()
    engine = Engine(models, tokens=limits.tokens, waiting=limits.waiting, metrics=metrics)
    service = Service(engine, ModelPool(engine, folder, keep, opener), metrics, limits.seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="diffusify", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(RequestMiddleware, service=service, limits=limits, keys=keys, log_prompts=log_prompts)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    for endpoints in (completions, chat_completions, openai_responses, infill, score):
        app.include_router(endpoints.router)
    _add_status_routes(app, service)
    _add_error_handlers(app)
    app.mount("/playground", StaticFiles(directory=PLAYGROUND))
    return app


def _add_status_routes(app: FastAPI, service: Service) -> None:
    """Routes for the list of models, health checks, metrics and the playground."""

    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models", summary="The served models and their capabilities")
    async def models() -> dict[str, Any]:
        opened = [_opened_model(queue) for queue in service.engine.queues.values()]
        unopened = [_model(name, config) for name, config in service.models.unopened.items()]
        return {"object": "list", "data": opened + unopened}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        unopened = service.models.unopened
        if name in unopened:
            return _model(name, unopened[name])
        await service.models.get(name)
        return _opened_model(service.engine.queues[name])

    @app.get("/health", summary="Whether the engine is running")
    async def health() -> JSONResponse:
        return JSONResponse({"alive": service.engine.alive}, 200 if service.engine.alive else 503)

    @app.get("/ready", summary="Whether the server accepts requests")
    async def ready() -> JSONResponse:
        accepts = service.ready and service.engine.alive
        return JSONResponse({"ready": accepts}, 200 if accepts else 503)

    @app.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(PLAYGROUND / "index.html")


def _model(name: str, config: DiffusionConfig, **more: Any) -> dict[str, Any]:
    """OpenAI's model object, with the model's diffusion config."""
    diffusion = {
        "recipe": config.recipe,
        "attention": str(config.attention),
        "block_size": config.block_size,
        "shift": config.shift,
        "infills": config.sees_right_context,
        "lossless": config.reads_as_ar_model,
    }
    return {"id": name, "object": "model", "created": 0, "owned_by": "diffusify", "diffusion": diffusion | more}


def _opened_model(queue: ModelQueue) -> dict[str, Any]:
    context = queue.lm.denoiser.context_length
    return _model(queue.name, queue.lm.config, chats=queue.has_chat_template, context=context)


def _add_error_handlers(app: FastAPI) -> None:
    """Handlers that turn expected errors into OpenAI's error object; `RequestMiddleware` does so with all others."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        fields = request.scope["route"].body_field.field_info.annotation.model_fields
        return invalid_body(error, fields, request.headers.get("content-type", "")).response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ErrorResponse(error.status_code, str(error.detail), headers=dict(error.headers or {})).response

    async def failed(request: Request, error: Exception) -> Response:
        return to_error_response(error).response

    for kind in (ValueError, RecursionError, TimeoutError, QueueFull, ClientDisconnected, UnknownModel):
        app.add_exception_handler(kind, failed)
