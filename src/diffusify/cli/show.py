"""`diffusify show`: print the properties of a model."""

import json

from rich.console import Console
from rich.table import Table

from diffusify.cli.options import AsJson, Model
from diffusify.cli.terminal import report_errors


def show(model: Model, as_json: AsJson = False) -> None:
    """Show the size and the configuration of a model, and whether it can infill."""
    with report_errors():
        from diffusify.config import to_plain
        from diffusify.models.saving import load_denoiser
        from diffusify.text.tokenizer import TextTokenizer

        denoiser, words = load_denoiser(model)
        config = denoiser.diffusion_config
        tokenizer = TextTokenizer(words, config.mask_token_id, config.frame)

        def token(token_id: int) -> str:
            return f"{words.convert_ids_to_tokens(token_id)} ({token_id})"

        facts = {
            "architecture": config.architecture,
            "base": config.base_model,
            "recipe": config.recipe,
            "parameters": sum(weight.numel() for weight in denoiser.network.parameters()),
            "vocabulary": denoiser.config.get_text_config().vocab_size,
            "context": denoiser.context_length,
            "mask_token": token(config.mask_token_id),
            "start_token": token(tokenizer.start_token_id)
            + ("" if config.frame.start_prompts else ", not before prompts"),
            "end_token": token(tokenizer.end_token_id),
            "attention": str(config.attention),
            "shift": config.shift,
            "default_policy": str(config.policy),
            "can_generate": True,
            "can_infill": config.sees_right_context,
        }
        if as_json:
            print(json.dumps(facts | {"card": to_plain(config)}))
            return
        table = Table(show_header=False, box=None)
        for name, value in facts.items():
            text = str(value)
            if isinstance(value, bool):
                text = "yes" if value else "no"
            elif isinstance(value, int):
                text = f"{value:,}"
            table.add_row(f"[bold]{name.replace('_', ' ')}", text)
        Console().print(table)
