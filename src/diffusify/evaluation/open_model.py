"""Models to be evaluated: adapted ones, and the bases they came from."""

from dataclasses import replace

import torch

from diffusify.diffusion.attention import Causal
from diffusify.models.loading import load_base, local_path
from diffusify.models.recipes import as_is
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import make_denoiser


def open_lm(source: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DiffusionLM:
    """A diffusion model's folder, or any base that `load_base` takes, as it is.

    ValueError where neither can be opened.
    """
    folder = local_path(source)
    if folder is not None and any(
        (folder / name).is_file() for name in ("diffusion_config.json", "adapter_config.json")
    ):
        return DiffusionLM.from_pretrained(folder, dtype=dtype, device=device)
    base = load_base(source, dtype=dtype)
    denoiser, tokenizer = make_denoiser(base, as_is(masked=base.masked))
    return DiffusionLM(denoiser.to(device).eval(), tokenizer)


def suited(settings: SamplingConfig, lm: DiffusionLM) -> SamplingConfig:
    """Settings that are meant for a diffusion model, for this one: a base writes token by token."""
    if not isinstance(lm.config.attention, Causal):
        return settings
    return replace(settings, steps=None, threshold=None, policy=None, window=None, tolerance=0.0)
