"""A diffusion model on disk: a standard `transformers` folder plus the card."""

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from diffusify.config import DiffusionConfig
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import load_base
from diffusify.models.quiet import quiet


def save_denoiser(folder: Path | str, denoiser: Denoiser, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write network, tokenizer and card into a folder.

    Everything is written aside first and then moved, the card last: a folder with a card is a whole model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(mkdtemp(dir=folder, prefix=".saving-"))
    try:
        with quiet():
            denoiser.network.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        denoiser.diffusion.save(aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "diffusion_config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_denoiser(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Denoiser, PreTrainedTokenizerBase]:
    """A denoiser and its tokenizer from a folder that `save_denoiser` wrote, weights loaded strictly.

    ValueError when there is no card, the card tells of another architecture, or tensors are missing or left over.
    """
    card = DiffusionConfig.load(folder)
    found = AutoConfig.from_pretrained(folder).architectures or []
    if card.architecture not in found:
        raise ValueError(
            f"the card in {folder} is for {card.architecture}, but config.json names {', '.join(found) or 'nothing'}; "
            "the two files do not belong together"
        )
    base = load_base(str(folder), dtype=dtype)
    rows = base.network.get_input_embeddings().get_parameter("weight").shape[0]
    if not 0 <= card.mask_token_id < rows:
        raise ValueError(f"the card in {folder} has mask_token_id={card.mask_token_id}, beyond the {rows} embeddings")
    return Denoiser(base.network, card).to(device).eval(), base.tokenizer
