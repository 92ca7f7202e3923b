"""`diffusify generate`: continue a prompt."""

import sys
from typing import Annotated

import typer

from diffusify.cli.options import AsJson, Device, Dtype, Model
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
    Temperature,
    Threshold,
    Tolerance,
    TopK,
    TopP,
    Watch,
    Window,
    load_model,
    sampling_config,
)
from diffusify.cli.terminal import print_generation, read_stdin, report_errors


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue.", show_default="read from standard input")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Generate a text without a prompt.")] = False,
    watch: Watch = False,
    as_json: AsJson = False,
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
    seed: Seed = None,
    steps: Steps = None,
    threshold: Threshold = None,
    policy: Policy = None,
    window: Window = None,
    cache: Cache = None,
    lossless: Lossless = False,
    tolerance: Tolerance = None,
) -> None:
    """Generate text that continues a prompt."""
    with report_errors():
        chosen = sampling_config(model, locals())
        if unconditional and prompt:
            raise ValueError("--unconditional generates without a prompt; leave out either the option or the prompt")
        if prompt is None and not unconditional and sys.stdin.isatty():
            raise ValueError("no prompt; give one, pipe one to standard input, or use --unconditional")
        text = "" if unconditional else read_stdin() if prompt is None else prompt
        lm = load_model(model, dtype=dtype, device=device)
        print_generation(lm, lm.prepare_generation([text], max_new_tokens, chosen), watch=watch, as_json=as_json)
