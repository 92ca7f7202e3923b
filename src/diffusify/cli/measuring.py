"""Commands that measure a model: bench."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffusify.cli.terminal import clear_errors, say
from diffusify.cli.writing import AsJson, Model, open_model

TITLES = {
    "way": "way to write",
    "tokens_per_second": "tok/s",
    "speedup": "x AR",
    "tokens_per_forward": "tok/fwd",
    "agreement": "agree",
    "perplexity": "ppl",
    "distinct_2": "dist-2",
    "entropy": "entr",
}


def bench(
    model: Model,
    base: Annotated[
        str | None, typer.Option(help="A left-to-right model to compare with; unset: the one the model came from.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Texts whose beginnings are prompts of 32 to 256 tokens.")
    ] = "builtin:pydoc",
    prompts: Annotated[int, typer.Option(help="So many prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Room for so many tokens behind each.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for all.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="A folder for bench.json and bench.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """How fast the model writes, and how well, in every way it can, with left-to-right decoding beside it."""
    with clear_errors():
        from dataclasses import asdict

        import torch

        from diffusify.evaluation.bench import bench as run
        from diffusify.evaluation.bench import cut_prompts, plot, ways
        from diffusify.models.loading import load_base
        from diffusify.text.sources import load_texts

        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {dtype} must be float32 or bfloat16")
        lm = open_model(model, dtype=getattr(torch, dtype))
        source = load_base(base or lm.config.base_model, dtype=lm.denoiser.network.dtype)
        if source.masked:
            raise ValueError(f"{source.source} is a masked model; give a left-to-right one with --base to judge texts")
        texts = (dict(row)["text"] for row in load_texts(data))
        chosen = cut_prompts(lm, texts, prompts)
        with say.status("writing") as status:
            rows = run(lm, source.network.eval(), chosen, ways(lm), max_new_tokens=max_new_tokens, told=status.update)
        plain = [asdict(row) for row in rows]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "bench.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
            plot(rows, out / "bench.png")
            say.print(f"saved {out / 'bench.json'} and {out / 'bench.png'}", soft_wrap=True)
        if as_json:
            print(json.dumps(plain))
            return
        table = Table(box=None, pad_edge=False)
        for name, title in TITLES.items():
            table.add_column(title, justify="left" if name == "way" else "right", no_wrap=True)
        for row in plain:
            table.add_row(*("" if row[name] is None else str(row[name]) for name in TITLES))
        Console().print(table)
