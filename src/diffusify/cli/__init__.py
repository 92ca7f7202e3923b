"""The command line: one file for each command of `diffusify`.

The files import torch and transformers inside the commands, so that `diffusify --help` is fast.
"""

import inspect
import re

import typer

from diffusify.cli import (
    adapt,
    bench,
    chat,
    compare,
    data,
    export,
    generate,
    import_checkpoint,
    infill,
    lm_eval,
    merge,
    plan,
    push,
    reinforce,
    serve,
    show,
    tune,
)
from diffusify.cli import eval as evaluate

app = typer.Typer(
    help="Turn a pretrained language model into a diffusion language model, and generate text with it.\n\n"
    "Run `diffusify COMMAND --help` for the arguments and options of a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "Make a model": {
        "adapt": adapt.adapt,
        "tune": tune.tune,
        "reinforce": reinforce.reinforce,
        "merge": merge.merge,
        "import": import_checkpoint.import_checkpoint,
        "export": export.export,
        "push": push.push,
        "plan": plan.plan,
        "data": data.data,
    },
    "Use a model": {
        "generate": generate.generate,
        "infill": infill.infill,
        "chat": chat.chat,
        "serve": serve.serve,
        "show": show.show,
    },
    "Evaluate a model": {
        "eval": evaluate.eval_,
        "lm-eval": lm_eval.lm_eval,
        "compare": compare.compare,
        "bench": bench.bench,
    },
}
for panel, commands in COMMANDS.items():
    for name, function in commands.items():
        # Typer keeps the line breaks of docstrings, so the lines of each paragraph are joined.
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
        settings = lm_eval.CONTEXT_SETTINGS if name == "lm-eval" else None
        app.command(name, help=text, rich_help_panel=panel, context_settings=settings)(function)
