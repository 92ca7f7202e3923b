"""A denoiser from a base and a recipe, before any training."""

from dataclasses import replace

from torch import nn

from diffusify.config import DiffusionConfig, DocumentFrame, sees_right_context
from diffusify.models.denoiser import Denoiser
from diffusify.models.document_frame import choose_frame
from diffusify.models.loading import Base
from diffusify.models.lora import Lora, add_lora, default_lora, has_lora
from diffusify.models.mask_token import ensure_length_tokens, ensure_mask_token
from diffusify.models.recipe import Recipe
from diffusify.models.saving import load_heads
from diffusify.text.tokenizer import TextTokenizer


def make_denoiser(
    base: Base,
    recipe: Recipe,
    *,
    lora: Lora | None = None,
    frame: DocumentFrame | None = None,
    mask_token_id: int | None = None,
) -> tuple[Denoiser, TextTokenizer]:
    """A denoiser with a recipe's diffusion config, and with new adapters if `lora` is given; and its tokenizer.

    A base with heads keeps them; a length head is frozen, and dropped if the recipe has no use for it. Without a
    `frame` of documents, the base's is measured (see `choose_frame`). Changes the base's network in place. Raises
    ValueError when base and recipe do not fit.
    """
    check_fit(base.source, base.masked, recipe)
    frame = choose_frame(base)[0] if frame is None else frame
    mask = ensure_mask_token(base, mask_token_id)
    length_tokens = None if recipe.length_noise is None else ensure_length_tokens(base)
    config = recipe.diffusion_config(type(base.network).__name__, mask, base.source)
    config = replace(config, frame=frame, length_tokens=length_tokens)
    own = DiffusionConfig.load(base.folder) if base.folder else config
    if sees_right_context(recipe.attention) and length_tokens is None:
        config = replace(config, longest_answer=own.longest_answer)
    disable_dropout(base.network)
    if not has_lora(base.network) and (lora := default_lora(lora, recipe.adapters)):
        add_lora(base.network, lora, mask, base.source, recipe.adapters, length_tokens)
    denoiser, tokenizer = Denoiser(base.network, config), TextTokenizer(base.tokenizer, mask, frame)
    denoiser.limit_vocabulary(tokenizer.token_ids)
    if base.folder is not None and (own.draft_head or config.longest_answer):
        load_heads(denoiser, base.folder)
    if denoiser.length_head is not None:
        denoiser.length_head.requires_grad_(False)
    return denoiser, tokenizer


def check_fit(source: str, masked: bool, recipe: Recipe) -> None:
    """Raise ValueError when a base and a recipe do not fit."""
    if masked and recipe.shift:
        raise ValueError(f"{source} is a masked model, which needs no shift: use mlm(), or block(size, masked=True)")
    if not masked and recipe.name == "mlm":
        raise ValueError(f"{source} is an autoregressive model: use ar() or block(size); mlm() is for masked models")


def disable_dropout(network: nn.Module) -> None:
    """Set all dropout rates of a network to 0, since the masks already are noise."""
    for module in network.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
