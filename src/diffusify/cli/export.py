"""`diffusify export`: write a model in the format of another program."""

from pathlib import Path
from typing import Annotated

import typer

from diffusify.cli.options import Model
from diffusify.cli.terminal import console, report_errors, suggest


def export(
    model: Model,
    to: Annotated[
        str,
        typer.Option(
            help="Format: gguf (llama.cpp and Ollama), hf (transformers), or the layout of a release: dream, llada, "
            "llada_moe, sdar, a2d, fast_dllm, diffugpt or diffullama."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder where the files are written. It must be empty or new.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of the weights: float32, bfloat16, float16, or q8_0 for gguf.",
            show_default="as stored; float16 becomes float32",
        ),
    ] = None,
) -> None:
    """Write a model in the format of another program.

    Bidirectional models of Llama and Qwen2 bases run in llama.cpp's diffusion program. Of a block model that keeps its
    AR half, gguf is this half, for llama.cpp and Ollama. Adapters are merged.
    """
    with report_errors():
        from diffusify.formats.exporting import export as run

        folder = run(model, out, to=to, dtype=dtype)
        size = sum(file.stat().st_size for file in folder.iterdir())
        console.print(f"saved {folder}  ({size / 2**20:,.0f} MiB)", soft_wrap=True)
        if to == "gguf":
            name = f"{folder}/{folder.absolute().name}.gguf"
            is_ar = (folder / "Modelfile").is_file()
            suggest(f"llama-cli -m {name}" if is_ar else f"llama-diffusion-cli -m {name} -p 'Once upon a time' -ub 512")
