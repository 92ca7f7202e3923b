"""`diffusify data`: show what a data source will be in training."""

import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from diffusify.cli.options import AsJson
from diffusify.cli.terminal import report_errors

SHOWN = 2000  # characters of each piece of the first example


class DataForm(StrEnum):
    """The forms of training data."""

    chat = "chat"
    pairs = "pairs"
    text = "text"


def data(
    source: Annotated[str, typer.Argument(help="Data source as for `diffusify adapt` or `diffusify tune`.")],
    form: Annotated[
        DataForm | None,
        typer.Option("--as", help="What the records are read as.", show_default="what the first records are"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer and chat template are used.", show_default="tokens are not counted"),
    ] = None,
    length: Annotated[int, typer.Option(help="Longer examples are left out, as by `diffusify tune`.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Show what a data source will be in training.

    Shown are the number of records and tokens, the first example with the learned parts in green, and what is left out
    and why. Files are read whole, and of a dataset on the Hub the first 1,000 records.
    """
    with report_errors():
        from diffusify.config import sees_right_context, to_plain
        from diffusify.models.mask_token import ensure_mask_token
        from diffusify.models.recipes import saved_recipe
        from diffusify.models.saving import open_base
        from diffusify.text.data_preview import preview_data
        from diffusify.text.tokenizer import TextTokenizer

        tokenizer, each_turn = None, False
        if model is not None:
            base, recipe = open_base(model), saved_recipe(model)
            tokenizer = TextTokenizer(base.tokenizer, ensure_mask_token(base))
            each_turn = recipe is not None and not sees_right_context(recipe.attention)
        preview = preview_data(source, form.value if form else None, tokenizer, each_turn=each_turn, length=length)
        if as_json:
            print(json.dumps(to_plain(preview), ensure_ascii=False))
            return
        out = Console(highlight=False)
        out.print(f"{preview.records:,} records, read as {preview.form}", soft_wrap=True)
        if preview.tokens is not None:
            out.print(f"{preview.tokens:,} tokens, {preview.learned_tokens:,} of them learned", soft_wrap=True)
        for note in preview.notes:
            out.print(note, markup=False, soft_wrap=True)
        out.print("first example (what is learned is green):")
        pieces = (
            (text[:SHOWN] + "..." * (len(text) > SHOWN), "green" if learned else "") for text, learned in preview.first
        )
        out.print(Text.assemble(*pieces), soft_wrap=True)
