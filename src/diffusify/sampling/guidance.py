"""Classifier-free guidance: away from what would be written without the prompt.

Axes: b texts, n positions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.logits import LazyLogits
from diffusify.sampling.sampler import DenoiseFn


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser whose answers go `scale` times the way from those without the prompt to those with it, beyond these.

    Without the prompt means that all given tokens but the first are noise (LLaDA). Two models are asked, so that each
    may have a cache of its own; they may be one and the same.
    """

    with_prompt: DenoiseFn
    without: DenoiseFn
    scale: float
    noise: int

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        hidden = ~canvas.editable & canvas.real & (canvas.position_ids > 0)
        blind = replace(canvas, tokens=torch.where(hidden, self.noise, canvas.tokens))
        given, free = self.with_prompt(canvas, positions=positions), self.without(blind, positions=positions)

        def beyond(part: Tensor, index: Tensor) -> Tensor:
            guided = part + self.scale * (part - free[index].logits)
            return torch.where(part.isfinite(), guided, part)  # what cannot be stays so

        return given.then(beyond)
