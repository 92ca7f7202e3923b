"""`diffusify serve`: serve models over HTTP."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffusify.cli.options import Device, Dtype
from diffusify.cli.sampling_options import load_model
from diffusify.cli.terminal import report_errors

_LIMITS, _ACCESS = "Limits", "Access and logging"


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to load at the start: folders, names of bundled models, or base models. NAME=FOLDER sets the "
            "name of a model in the API.",
            show_default="none; requires --folder",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of model folders, LoRA adapters included. Each model is loaded on its first request."
        ),
    ] = None,
    keep: Annotated[int, typer.Option(help="Maximum number of models of --folder that stay loaded.")] = 4,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokens: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens (prompts and answers) of all running requests of a model. Limits the memory "
            "of the KV cache.",
            rich_help_panel=_LIMITS,
        ),
    ] = 16384,
    waiting: Annotated[
        int,
        typer.Option(
            help="Maximum number of waiting requests. Further requests are rejected with status 429.",
            rich_help_panel=_LIMITS,
        ),
    ] = 256,
    seconds: Annotated[
        float, typer.Option(help="Maximum time of a request in seconds.", rich_help_panel=_LIMITS)
    ] = 600.0,
    key: Annotated[
        list[str] | None,
        typer.Option(
            help="API key that requests must send. Can be given several times.",
            show_default="no key required",
            envvar="DIFFUSIFY_KEY",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of web pages that may call the API, such as https://example.org. Can be given several times.",
            show_default="none",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Also log the prompts of requests.", rich_help_panel=_ACCESS)
    ] = False,
) -> None:
    """Serve models with an OpenAI-compatible HTTP API, infilling endpoints and a web playground."""
    console = Console(stderr=True, highlight=False)
    # oneDNN caches a kernel for every input shape. Batches have many shapes, and its default of 1024 kernels takes much
    # memory.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    with report_errors():
        sources = model_names(models or [])
        if host not in ("127.0.0.1", "localhost", "::1") and not key:
            console.print(
                f"[yellow]warning: {host} is open to everyone who can reach it; --key SECRET requires a key[/]"
            )
        try:
            from diffusify.serving.api.app import Limits, create_app
            from diffusify.serving.api.server import Server
        except ImportError as error:
            raise ValueError(f"serving needs `pip install 'diffusify[serve]'` ({error.name} is missing)") from error
        limits = Limits(tokens=tokens, waiting=waiting, seconds=seconds)
        opener = partial(load_model, device=device, dtype=dtype)
        loaded = {name: opener(source) for name, source in sources.items()}
        app = create_app(
            loaded,
            limits,
            keys=tuple(key or ()),
            origins=tuple(cors or ()),
            log_prompts=log_prompts,
            folder=folder,
            keep=keep,
            opener=opener,
        )
        served = ", ".join([*loaded, *([f"the models in {folder}"] if folder else [])])
        first = next(iter(loaded), "NAME")

        def announce(url: str) -> None:
            console.print(f"[bold]serving[/] {served} at {url} [dim](playground: {url}/, API: {url}/openapi.json)[/]")
            body = json.dumps({"model": first, "prompt": "The with statement"})
            console.print("try next:")
            line = f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
            console.print(line, markup=False, soft_wrap=True)

        Server(app, host, port, receive_timeout=limits.receive_timeout, on_listening=announce).run()


def model_names(models: list[str]) -> dict[str, str]:
    """The source of each model by its name in the API: the name given as NAME=SOURCE, else that of its folder.

    A path that exists is no NAME=SOURCE. ValueError if two models have the same name.
    """
    sources: dict[str, str] = {}
    for model in models:
        name, given, source = model.partition("=")
        if Path(model).exists():
            name, source = os.path.basename(os.path.abspath(model)), model
        elif not given:
            name, source = model.removeprefix("pip:"), model
        if name in sources:
            raise ValueError(f'two models have the name "{name}"; write OTHER={source}')
        sources[name] = source
    return sources
