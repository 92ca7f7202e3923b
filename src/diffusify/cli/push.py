"""`diffusify push`: upload a model to the Hugging Face Hub."""

from typing import Annotated

import typer

from diffusify.cli.options import Model
from diffusify.cli.terminal import console, report_errors, suggest


def push(
    model: Model,
    repository: Annotated[str, typer.Argument(help="Repository to upload to, as OWNER/NAME. It is made if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub. Log in with `hf auth login` first, or set HF_TOKEN."""
    with report_errors():
        from diffusify.models.uploading import push_to_hub

        console.print(f"uploaded {push_to_hub(model, repository, private=private or None)}", soft_wrap=True)
        suggest(f"diffusify generate {repository} 'Once upon a time' --watch")
