"""The left-to-right network that a run begins with, kept as it was to teach what the run makes of it."""

from copy import deepcopy
from dataclasses import replace

import torch

from diffusify.diffusion.attention import Causal
from diffusify.diffusion.corruption import Noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training


class Teacher:
    """What the network said of each token, having read the clean text before it, when the run began.

    Weights that are not trained are shared with it, so that beside adapters it costs no memory; beside a network that
    is trained whole it is a copy, on every process.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        shared = {id(weight): weight for weight in denoiser.parameters() if not weight.requires_grad}
        self.denoiser = deepcopy(denoiser, shared).eval().requires_grad_(False)
        optimize_for_training(self.denoiser.network)

    @torch.no_grad()
    def __call__(self, batch: Noised) -> LazyLogits:
        """Logits about the open positions, row by row."""
        canvas = replace(batch.canvas, tokens=batch.clean)
        inputs = Causal()(canvas[:: batch.views], shift=self.denoiser.diffusion_config.shift)
        answers = inputs.output_index.repeat_interleave(batch.views, 0)
        return self.denoiser.lazy_logits(
            self.denoiser.hidden_states(inputs, inputs.flat_index(answers, batch.canvas.open))
        )
