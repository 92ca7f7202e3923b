"""`diffusify import`: convert a released diffusion language model."""

from pathlib import Path
from typing import Annotated

import typer

from diffusify.cli.terminal import console, report_errors, suggest


def import_checkpoint(
    source: Annotated[
        str, typer.Argument(help="Hugging Face Hub id or local folder of a released diffusion language model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder where the model is saved. It must be empty or new.")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="Format of the checkpoint: diffugpt, diffullama, dream, llada, llada_moe, sdar, a2d or fast_dllm.",
            show_default="detected from its files",
        ),
    ] = None,
    mask_token_id: Annotated[
        int | None, typer.Option(help="Id of the mask token.", show_default="read from its files")
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens per block, for sdar, fast_dllm and block a2d models.",
            show_default="read from its files or its name",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of the saved weights: float32, bfloat16 or float16.",
            show_default="as stored; float16 becomes float32",
        ),
    ] = None,
) -> None:
    """Convert a released diffusion language model.

    DiffuGPT, DiffuLLaMA, Dream, DreamOn, LLaDA, LLaDA-MoE, SDAR, A2D and Fast-dLLM v2.
    """
    with report_errors():
        from diffusify.config import DiffusionConfig
        from diffusify.formats.importers import import_denoiser

        folder = import_denoiser(
            source, out, layout=layout, mask_token_id=mask_token_id, block_size=block_size, dtype=dtype
        )
        size = DiffusionConfig.load(folder).block_size
        console.print(f"saved {folder}" + (f"  (decodes in blocks of {size} tokens)" if size else ""), soft_wrap=True)
        suggest(f"diffusify generate {folder} 'Once upon a time' --watch", f"diffusify show {folder}")
