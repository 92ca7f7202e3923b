"""Representation alignment: the hidden states of the frozen base on clean text teach a denoiser (arXiv 2605.06885).

Axes: b canvases, n positions, d hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffusify.diffusion.attention import Causal
from diffusify.diffusion.corruption import Noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import has_lora
from diffusify.training.teacher import frozen_copy


class Alignment:
    """How far the layers' outputs on noised text are from those of the causal base on the clean text.

    The distance at a position is 1 - cos, averaged over the layers. The base is the network as it was when the run
    began, without its adapters if it has some; weights that are not trained are shared with it.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.base = frozen_copy(denoiser, device)
        if has_lora(self.base.network):
            self.base.network.disable_adapters()

    def positions(self, batch: Noised) -> Bool[Tensor, "b n"]:
        """The positions that are compared: those that stand for one token of the clean text."""
        return batch.canvas.real if batch.resized_from is None else batch.resized_from[1].index >= 0

    def __call__(self, batch: Noised, layers: Sequence[Float[Tensor, "b n d"]]) -> Float[Tensor, ""]:
        """The sum of the distances over `positions`; `layers` are the outputs on the canvases of the batch."""
        row, position = self.positions(batch).nonzero(as_tuple=True)
        if batch.resized_from is None:
            text, views, source = replace(batch.canvas, tokens=batch.clean)[:: batch.views], batch.views, position
        else:
            text, columns = batch.resized_from
            text, views, source = text[:: batch.views], batch.views, columns.index[row, position]
        with torch.no_grad():
            inputs = Causal()(replace(text, open=torch.zeros_like(text.open)), shift=self.base.diffusion_config.shift)
            base_layers, _ = self.base.layer_states(inputs, row[:0])
        distances = [
            1 - functional.cosine_similarity(own[row, position].float(), base[row // views, source].float(), dim=-1)
            for own, base in zip(layers, base_layers, strict=True)
        ]
        return torch.stack(distances).mean(0).sum()
