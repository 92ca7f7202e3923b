"""Classifier-free guidance, which pushes predictions away from those without the prompt.

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
    """A denoiser with logits `conditional + scale * (conditional - unconditional)`, as in LLaDA.

    The unconditional pass replaces all given tokens but the first by `noise`. There are two models so that each can
    have a KV cache of its own; they may be the same object.
    """

    conditional: DenoiseFn
    unconditional: DenoiseFn
    scale: float
    noise: int
    passes = 2  # forward passes per call

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        prompt = ~canvas.editable & canvas.real & (canvas.position_ids > 0)
        masked = replace(canvas, tokens=torch.where(prompt, self.noise, canvas.tokens))
        conditional = self.conditional(canvas, positions=positions)
        unconditional = self.unconditional(masked, positions=positions)

        def guide(logits: Tensor, index: Tensor) -> Tensor:
            guided = logits + self.scale * (logits - unconditional[index].logits)
            return torch.where(logits.isfinite(), guided, logits)  # -inf minus -inf would be nan

        return conditional.transform(guide)
