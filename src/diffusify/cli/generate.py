"""`diffusify generate`: continue a prompt."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from diffusify.cli.bulk_options import BatchTokens, Input, Output, generate_bulk, is_bulk
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
    Stop,
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

if TYPE_CHECKING:
    from diffusify.sampling.sampling_config import SamplingConfig


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue.", show_default="read from standard input")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Generate a text without a prompt.")] = False,
    n: Annotated[
        int, typer.Option("-n", "--n", help="Number of texts to sample, with the seeds --seed, --seed + 1, ...")
    ] = 1,
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
    stop: Stop = None,
    seed: Seed = None,
    steps: Steps = None,
    threshold: Threshold = None,
    policy: Policy = None,
    window: Window = None,
    cache: Cache = None,
    lossless: Lossless = False,
    tolerance: Tolerance = None,
    source: Input = None,
    output: Output = None,
    batch_tokens: BatchTokens = 16384,
) -> None:
    """Generate text that continues a prompt.

    With --input and --output, texts are generated for a whole file. A record has a prompt to continue, the messages of
    a chat to answer, or a text with masked spans to fill.
    """
    with report_errors():
        options = locals()
        chosen = sampling_config(model, options)
        single = {"PROMPT": prompt, "--unconditional": unconditional, "-n": n > 1, "--watch": watch, "--json": as_json}
        if is_bulk(source, output, **single):
            from diffusify.models.recipes import read_config
            from diffusify.serving.bulk.bulk_records import BulkSettings

            infilling = replace(sampling_config(model, options, infilling=True), stop=())
            infilling = infilling.for_infilling(read_config(model))
            bulk = BulkSettings(chosen, infilling, max_new_tokens)
            generate_bulk(model, source, output, bulk, batch_tokens=batch_tokens, device=device, dtype=dtype)
            return
        _check_n(n, chosen, watch=watch)
        if unconditional and prompt:
            raise ValueError("--unconditional generates without a prompt; leave out either the option or the prompt")
        if prompt is None and not unconditional and sys.stdin.isatty():
            raise ValueError("no prompt; give one, pipe one to standard input, or use --unconditional or --input")
        text = "" if unconditional else read_stdin() if prompt is None else prompt
        lm = load_model(model, dtype=dtype, device=device)
        print_generation(lm, lm.prepare_generation([text] * n, max_new_tokens, chosen), watch=watch, as_json=as_json)


def _check_n(n: int, settings: "SamplingConfig", *, watch: bool) -> None:
    if n < 1:
        raise ValueError(f"-n {n} must be at least 1 text")
    if n > 1 and watch:
        raise ValueError(f"--watch shows one text while it is denoised; leave out -n {n} or --watch")
    if n > 1 and settings.temperature == 0 and settings.policy is None:
        raise ValueError(f"-n {n} texts would all be the same, because temperature 0 is greedy; set --temperature 1")
