"""The command that serves models over HTTP."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from diffusify.cli.terminal import clear_errors


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models' folders, or bases; NAME=FOLDER gives one another name than its folder's."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="A folder of models, LoRA ones too: each is opened when it is asked for.")
    ] = None,
    keep: Annotated[int, typer.Option(help="So many models of --folder stay open.")] = 4,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.")] = 8000,
    device: Annotated[str | None, typer.Option(help="As cuda:0; unset: a GPU if there is one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights; unset: bfloat16 on a GPU.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Positions of all texts at work, of each model: memory.")] = 16384,
    waiting: Annotated[int, typer.Option(help="So many requests may wait; more are told to come again.")] = 256,
    seconds: Annotated[float, typer.Option(help="So long may a request take.")] = 600.0,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Turn away whoever comes without it; may be given several times.", envvar="DIFFUSIFY_KEY"),
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="A web page elsewhere that may ask, as https://x.org.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked, too.")] = False,
) -> None:
    """Serve models: an OpenAI-compatible API with infilling, and a playground."""
    say = Console(stderr=True, highlight=False)
    # Every new shape of a pass gets kernels of its own, kept up to a number that suits nobody who meets so many shapes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    with clear_errors():
        named = names(models or [])
        if host not in ("127.0.0.1", "localhost", "::1") and not key:
            say.print(f"[yellow]anybody who reaches {host} can use this server; --key SECRET asks for a key[/]")
        try:
            from diffusify.serving.api.app import Limits, create_app
            from diffusify.serving.api.server import Server
        except ImportError as error:
            raise ValueError(f"serving needs `pip install 'diffusify[serve]'` ({error.name} is missing)") from error
        limits = Limits(tokens=tokens, waiting=waiting, seconds=seconds)
        opener = partial(_open, device=device, dtype=dtype)
        loaded = {name: opener(source) for name, source in named.items()}
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
        served = [*loaded, *([f"those in {folder}"] if folder else [])]
        first = next(iter(loaded), "NAME")

        def announce(at: str) -> None:
            say.print(
                f"[bold]serving[/] {', '.join(served)} at {at} [dim](playground: {at}/, API: {at}/openapi.json)[/]"
            )
            body = json.dumps({"model": first, "prompt": "The with statement"})
            say.print("[bold]next[/]")
            line = f"  curl {at}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
            say.print(line, markup=False, soft_wrap=True)

        Server(app, host, port, patience=limits.patience, announce=announce).run()


def names(models: list[str]) -> dict[str, str]:
    """Each model's name, its folder's own unless another is given. ValueError for two of the same name."""
    found: dict[str, str] = {}
    for one in models:
        name, given, source = one.partition("=")
        if not given:
            name, source = (Path(one).name if Path(one).exists() else one.removeprefix("pip:")), one
        if name in found:
            raise ValueError(f'two models have the name "{name}"; write OTHER={source}')
        found[name] = source
    return found


def _open(source: str, device: str | None, dtype: str | None):
    import torch

    from diffusify.evaluation.open_model import open_lm

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = dtype or ("float32" if where == "cpu" else "bfloat16")
    return open_lm(source, dtype=getattr(torch, precision), device=where)
