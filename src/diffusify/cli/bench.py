"""`diffusify bench`: measure decoding speed and text quality."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffusify.cli.options import AsJson, Device, Dtype, Model
from diffusify.cli.sampling_options import load_model
from diffusify.cli.terminal import console, report_errors

TITLES = {
    "way": "decoding",
    "tokens_per_second": "tok/s",
    "speedup": "x AR",
    "tokens_per_forward": "tok/fwd",
    "agreement": "agree",
    "perplexity": "ppl",
    "distinct_2": "dist-2",
    "entropy": "entropy",
}


def bench(
    model: Model,
    base: Annotated[
        str | None,
        typer.Option(
            help="AR model that scores the perplexity of the generated texts.",
            show_default="the base model of the diffusion model",
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Texts whose first 32, 64, 128 or 256 tokens (in turn) are the prompts.")
    ] = "builtin:pydoc",
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate per prompt.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench.json and the plot bench.png.", show_default="not saved")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the speed and text quality of all decoding methods, next to AR decoding.

    Columns: tokens per second, speedup over AR decoding by transformers, tokens per forward pass, share of tokens equal
    to AR decoding (or to one token per forward pass, if the model keeps no AR half), perplexity under --base, distinct
    2-grams, and entropy of the texts.
    """
    with report_errors():
        from dataclasses import asdict

        from diffusify.evaluation.bench import bench as run
        from diffusify.evaluation.bench import cut_prompts, decoding_settings, plot
        from diffusify.models.loading import load_base
        from diffusify.models.saving import load_ar_half
        from diffusify.text.sources import load_texts

        lm = load_model(model, dtype=dtype, device=device)
        name = base or lm.config.base_model
        try:
            source = load_base(name, dtype=lm.denoiser.network.dtype, device=lm.denoiser.device)
        except ValueError as error:
            raise ValueError(f"{name} cannot score texts: {error}; give an AR model with --base") from error
        if source.masked or getattr(source.network.config, "is_causal", None) is False:
            raise ValueError(f"{name} cannot score texts, as it is bidirectional; give an AR model with --base")
        texts = (dict(row)["text"] for row in load_texts(data))
        chosen = cut_prompts(lm, texts, prompts)
        with console.status("generating") as status:
            settings, base_network = decoding_settings(lm), source.network.eval()
            ar_half = None
            if lm.config.reads_as_ar_model:
                ar_half = load_ar_half(model, dtype=base_network.dtype, device=base_network.device)
            rows = run(
                lm,
                base_network,
                chosen,
                settings,
                ar_half=ar_half,
                max_new_tokens=max_new_tokens,
                progress=status.update,
            )
        plain = [asdict(row) for row in rows]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "bench.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
            plot(rows, out / "bench.png")
            console.print(f"saved {out / 'bench.json'} and {out / 'bench.png'}", soft_wrap=True)
        if as_json:
            print(json.dumps(plain))
            return
        table = Table(box=None, pad_edge=False)
        for name, title in TITLES.items():
            table.add_column(title, justify="left" if name == "way" else "right", no_wrap=True)
        for row in plain:
            table.add_row(*("" if row[name] is None else str(row[name]) for name in TITLES))
        Console().print(table)
