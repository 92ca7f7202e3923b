"""The command line: adapt a model, tune it, write with it, look at it."""

import typer

from diffusify.cli import evaluating, making, measuring, planning, serving, writing

app = typer.Typer(
    help="Turn a pretrained language model into a diffusion language model, and write with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    making.adapt,
    making.tune,
    planning.plan,
    writing.generate,
    writing.infill,
    writing.chat,
    serving.serve,
    measuring.bench,
    evaluating.compare,
    writing.show,
    making.merge,
)
for command in COMMANDS:
    app.command()(command)
app.command("import")(making.import_)
app.command("eval")(evaluating.eval_)
