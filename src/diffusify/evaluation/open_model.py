"""Loading of models to evaluate: diffusion models, and unmodified base models."""

from dataclasses import replace

import torch

from diffusify.diffusion.attention import Causal
from diffusify.models.bundled import find_model
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.loading import load_base, local_path
from diffusify.models.recipes import as_is
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import make_denoiser


def open_lm(source: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DiffusionLM:
    """Load a diffusion model from its folder, or a base model from any source of `load_base`, without training.

    ValueError if neither can be loaded.
    """
    folder = find_model(source) or local_path(source)
    if folder is not None and any(
        (folder / name).is_file() for name in ("diffusion_config.json", "adapter_config.json")
    ):
        return DiffusionLM.from_pretrained(folder, dtype=dtype, device=device)
    base = load_base(source, dtype=dtype)
    denoiser, tokenizer = make_denoiser(base, as_is(masked=base.masked))
    optimize_for_inference(denoiser.to(device).eval().network)
    return DiffusionLM(denoiser, tokenizer)


def settings_for(lm: DiffusionLM, settings: SamplingConfig) -> SamplingConfig:
    """Settings of a diffusion model, changed for an AR base model: it decodes one token per forward pass."""
    if not isinstance(lm.config.attention, Causal):
        return settings
    return replace(settings, steps=None, threshold=None, policy=None, window=None, tolerance=0.0)
