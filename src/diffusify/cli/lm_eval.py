"""`diffusify lm-eval`: the lm-evaluation-harness with the model type `diffusify`."""

import sys
from typing import Annotated

import typer

from diffusify.cli.terminal import report_errors

# The harness reads its own options, --help among them.
CONTEXT_SETTINGS = {"ignore_unknown_options": True, "help_option_names": []}


def lm_eval(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments of lm_eval, such as --tasks hellaswag.", metavar="ARGUMENTS")
    ] = None,
) -> None:
    """Run lm-evaluation-harness with diffusion models.

    It takes the arguments of lm_eval; --model diffusify --model_args pretrained=MODEL selects a diffusion model.
    """
    with report_errors():
        try:
            from lm_eval.__main__ import cli_evaluate

            import diffusify.evaluation.harness  # noqa: F401  (registers the model)
        except ImportError as error:
            raise ValueError(f"lm-eval needs `pip install 'diffusify[eval]'` ({error.name} is missing)") from error
        sys.argv = ["diffusify lm-eval", *(arguments or [])]
        cli_evaluate()
