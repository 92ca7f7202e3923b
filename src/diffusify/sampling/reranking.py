"""Exact likelihoods of finished texts under the AR half of a model, by which candidates are ranked.

Axes: b texts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Causal
from diffusify.models.denoiser import Denoiser


@torch.inference_mode()
def ar_log_likelihood(denoiser: Denoiser, canvas: Canvas) -> Float[Tensor, " b"]:
    """The log-probability of each text under the AR half (nats), given its first token; one forward pass."""
    inputs = Causal()(canvas, shift=denoiser.diffusion_config.shift)
    positions = canvas.real & (canvas.position_ids > 0)
    logits = denoiser.lazy_logits(denoiser.hidden_states(inputs, inputs.flat_index(inputs.output_index, positions)))
    total = torch.zeros(len(positions), device=positions.device)
    return total.index_add(0, positions.nonzero()[:, 0], logits.log_prob(canvas.tokens[positions]))
