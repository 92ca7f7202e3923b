"""The server's address book: what answers where, and what is turned away at the door."""

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
from diffusify.serving.api import completions, infill, score
from diffusify.serving.api.errors import ClientDisconnected, Problem, problem
from diffusify.serving.api.middleware import RequestMiddleware
from diffusify.serving.api.openai_schemas import unknown
from diffusify.serving.api.service import Service
from diffusify.serving.engine.engine import Busy, Engine
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_pool import ModelPool, UnknownModel
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
    """The server as an ASGI application. ValueError when there is no model.

    Models in `folder` are opened by `opener` when somebody asks for them, `keep` of them at once at most. With `keys`,
    who comes without one is turned away; `origins` are the web pages elsewhere that may ask (CORS).
    """
    if not models and folder is None:
        raise ValueError("there is no model to serve; give one at least, or a folder of them")
    metrics = Metrics()
    engine = Engine(models, tokens=limits.tokens, waiting=limits.waiting, metrics=metrics)
    serving = Service(engine, ModelPool(engine, folder, keep, opener), metrics, limits.seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="diffusify", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = serving
    app.add_middleware(RequestMiddleware, serving=serving, limits=limits, keys=keys, log_prompts=log_prompts)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    for router in (completions.router, infill.router, score.router):
        app.include_router(router)
    _about(app, serving)
    _errors(app)
    app.mount("/playground", StaticFiles(directory=PLAYGROUND))
    return app


def _about(app: FastAPI, serving: Service) -> None:
    """What is served, and how it is doing."""

    @app.get("/v1/models", summary="The models that are served, and what each can do")
    async def models() -> dict[str, Any]:
        here = [_open_card(name, queue.lm) for name, queue in serving.engine.queues.items()]
        return {"object": "list", "data": here + [_card(name, card) for name, card in serving.models.closed.items()]}

    @app.get("/v1/models/{name}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        closed = serving.models.closed
        return _card(name, closed[name]) if name in closed else _open_card(name, await serving.models.get(name))

    @app.get("/health", summary="Whether the server lives")
    async def health() -> JSONResponse:
        return JSONResponse({"alive": serving.engine.alive}, 200 if serving.engine.alive else 503)

    @app.get("/ready", summary="Whether the server takes requests")
    async def ready() -> JSONResponse:
        able = serving.ready and serving.engine.alive
        return JSONResponse({"ready": able}, 200 if able else 503)

    @app.get("/metrics", summary="For Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(serving.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(PLAYGROUND / "index.html")


def _card(name: str, card: DiffusionConfig, **more: Any) -> dict[str, Any]:
    told = {
        "recipe": card.recipe,
        "attention": str(card.attention),
        "block_size": card.block_size,
        "shift": card.shift,
        "infills": card.sees_right_context,
        "lossless": card.reads_as_ar_model,
    }
    return {"id": name, "object": "model", "created": 0, "owned_by": "diffusify", "diffusion": told | more}


def _open_card(name: str, lm: DiffusionLM) -> dict[str, Any]:
    return _card(name, lm.config, chats=bool(lm.tokenizer.tokenizer.chat_template), context=lm.denoiser.context)


def _errors(app: FastAPI) -> None:
    """Errors in OpenAI's form."""

    def answer(told: Problem) -> Response:
        return JSONResponse(told.body, told.status, told.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        what = unknown(where) if first["type"] == "extra_forbidden" else f"{where or 'body'}: {first['msg']}"
        return answer(Problem(400, what, param=where or None))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return answer(Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return answer(problem(error))

    for kind in (ValueError, TimeoutError, Busy, ClientDisconnected, UnknownModel):
        app.add_exception_handler(kind, failed)
