"""`diffusify infill`: fill the masked spans of a text."""

from typing import Annotated

import typer

from diffusify.cli.bulk_options import BatchTokens, Input, Output, generate_bulk, is_bulk
from diffusify.cli.options import AsJson, Device, Dtype, Model
from diffusify.cli.sampling_options import (
    Cache,
    Guidance,
    Lossless,
    Policy,
    Preset,
    Regex,
    RepetitionPenalty,
    Rerank,
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
from diffusify.cli.terminal import print_generation, report_errors


def infill(
    model: Model,
    text: Annotated[
        str | None,
        typer.Argument(
            help=r"Text with masked spans: [[8]] is a span of 8 tokens, [[3-12]] a span of 3 to 12 tokens, [[...]] a "
            r"span of unknown length. Write \\[[ for two literal brackets.",
            show_default="required without --input",
        ),
    ] = None,
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
    rerank: Rerank = None,
    seed: Seed = None,
    steps: Steps = None,
    threshold: Threshold = None,
    lossless: Lossless = False,
    tolerance: Tolerance = None,
    policy: Policy = None,
    window: Window = None,
    cache: Cache = None,
    source: Input = None,
    output: Output = None,
    batch_tokens: BatchTokens = 16384,
) -> None:
    """Fill the masked spans of a text, using the context on both sides.

    With --input and --output, the texts of a whole file are filled.

    The model must attend to both sides: adapted with --recipe ar or mlm, or with --recipe block and -o infilling=0.5.
    """
    with report_errors():
        from diffusify.text.prompts import parse_masked_spans

        chosen = sampling_config(model, locals(), infilling=True)
        if is_bulk(source, output, TEXT=text, **{"--watch": watch, "--json": as_json}):
            from diffusify.serving.bulk.bulk_records import BulkSettings

            bulk = BulkSettings(infilling=chosen, allowed=("text",))
            generate_bulk(model, source, output, bulk, batch_tokens=batch_tokens, device=device, dtype=dtype)
            return
        if text is None:
            raise ValueError("no text; give one with masked spans, or a file of them with --input and --output")
        parse_masked_spans(text)  # reports a malformed span before the weights are read
        lm = load_model(model, dtype=dtype, device=device)
        print_generation(lm, lm.prepare_infilling([text], chosen), watch=watch, as_json=as_json)
