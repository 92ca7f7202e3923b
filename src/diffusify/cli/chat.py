"""`diffusify chat`: chat with a local model or with one on a server."""

from typing import Annotated, Any

import typer

from diffusify.cli.chat_client import SERVER_OPTIONS, ChatClient
from diffusify.cli.options import Device, Dtype, read_value, unescape
from diffusify.cli.sampling_options import (
    Cache,
    Guidance,
    Lossless,
    MaxNewTokens,
    Policy,
    Preset,
    Regex,
    RepetitionPenalty,
    Seed,
    Settings,
    Steps,
    Stop,
    Temperature,
    Threshold,
    Tolerance,
    TopK,
    TopP,
    Window,
    load_model,
    lossless_tolerance,
    sampling_config,
)
from diffusify.cli.terminal import chat_loop, print_answer, report_errors


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder, bundled name or Hugging Face Hub id of a diffusion model. With --url, the name of a model on "
            "the server.",
            show_default="with --url, the first model of the server",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: MaxNewTokens = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Address of a `diffusify serve` server, such as http://127.0.0.1:8000, which also decides how long "
            "answers are without --max-new-tokens."
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="API key of the server.", envvar="DIFFUSIFY_KEY")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    preset: Preset = None,
    settings: Settings = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    guidance: Guidance = None,
    regex: Regex = None,
    stop: Stop = None,
    seed: Seed = None,
    steps: Steps = None,
    threshold: Threshold = None,
    policy: Policy = None,
    window: Window = None,
    cache: Cache = None,
    lossless: Lossless = False,
    tolerance: Tolerance = None,
) -> None:
    """Chat with a model in the terminal.

    The model runs in this process, or on a server with --url. Answers are shown while they are generated.
    """
    with report_errors():
        options = locals()
        if url is not None:
            client, fields = ChatClient(url, key), _request_fields(options)
            name = model or client.first_model()
            chat_loop(lambda messages: client.answer(messages, model=name, **fields), system)
            return
        if model is None:
            raise ValueError("no model; give a folder, a bundled name or a hub id, or the --url of a server")
        chosen, lm = sampling_config(model, options), load_model(model, dtype=dtype, device=device)
        chat_loop(lambda messages: print_answer(lm, messages, max_new_tokens, chosen), system)


def _request_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a chat request that the options select, with the defaults of the options."""
    if options["settings"] is not None:
        raise ValueError(f"--settings {options['settings']} is not sent to a server; give the settings as options")
    fields = {name: options[name] for name in SERVER_OPTIONS if options[name] is not None}
    if "stop" in fields:
        fields["stop"] = [unescape(text) for text in fields["stop"]]
    if "policy" in fields:
        fields["policy"] = read_value(fields["policy"])
    if options["lossless"]:
        fields["tolerance"] = lossless_tolerance(options)
    if options["max_new_tokens"] is not None:
        fields["max_tokens"] = options["max_new_tokens"]
    return {"temperature": 0.0, "seed": 0} | fields
