"""A frozen copy of the autoregressive base, used as the teacher for distillation (`Objective.teacher='base'`)."""

from copy import deepcopy
from dataclasses import replace

import torch

from diffusify.diffusion.attention import Causal
from diffusify.diffusion.corruption import Noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training


def frozen_copy(denoiser: Denoiser, device: torch.device) -> Denoiser:
    """A copy of a denoiser that does not change with it, on a device; weights that are not trained are shared."""
    shared = {id(weight): weight for weight in denoiser.parameters() if not weight.requires_grad}
    copy = deepcopy(denoiser, shared).eval().requires_grad_(False).to(device)
    optimize_for_training(copy.network)
    return copy


class Teacher:
    """The next-token logits of the network as it was when the run began, computed on clean text.

    Weights that are not trained are shared with the network, so a LoRA run needs no memory for the teacher. When all
    weights are trained, every process holds a second copy of them.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.denoiser = frozen_copy(denoiser, device)

    @torch.no_grad()
    def __call__(self, batch: Noised) -> LazyLogits:
        """The logits for the targets, row by row."""
        canvas = replace(batch.canvas, tokens=batch.clean, open=torch.zeros_like(batch.canvas.open))
        inputs = Causal()(canvas[:: batch.views], shift=self.denoiser.diffusion_config.shift)
        output_index = inputs.output_index.repeat_interleave(batch.views, 0)
        return self.denoiser.lazy_logits(
            self.denoiser.hidden_states(inputs, inputs.flat_index(output_index, batch.targets))
        )
