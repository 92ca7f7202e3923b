"""The command line: adapt a model, tune it, write with it, look at it."""

import typer

from diffusify.cli import making, writing

app = typer.Typer(
    help="Turn a pretrained language model into a diffusion language model, and write with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (making.adapt, making.tune, writing.generate, writing.infill, writing.chat, writing.show, making.merge):
    app.command()(command)
app.command("import")(making.import_)
