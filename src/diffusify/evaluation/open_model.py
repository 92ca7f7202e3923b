"""Loading of models to evaluate: diffusion models, and unmodified base models."""

import torch

from diffusify.models.accelerator import choose_device, choose_dtype
from diffusify.models.bundled import find_model
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.loading import load_base, local_path
from diffusify.models.recipes import as_is
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.training.adapt import make_denoiser


def open_lm(source: str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto") -> DiffusionLM:
    """Load a diffusion model from its folder, or a base model from any source of `load_base`, without training.

    The device and the data type are chosen as by `DiffusionLM.from_pretrained`. ValueError if neither can be loaded.
    """
    folder = find_model(source) or local_path(source)
    if folder is not None and any(
        (folder / name).is_file() for name in ("diffusion_config.json", "adapter_config.json")
    ):
        return DiffusionLM.from_pretrained(folder, dtype=dtype, device=device)
    device = choose_device(device)
    base = load_base(source, dtype=choose_dtype(dtype, device), device=device)
    denoiser, tokenizer = make_denoiser(base, as_is(masked=base.masked))
    optimize_for_inference(denoiser.eval().network)
    return DiffusionLM(denoiser, tokenizer)
