"""Predictions for already decoded positions, made without attending to their own tokens (WINO's shadow tokens).

Axes: b texts, n canvas positions, g decoded positions to predict again, m = n + g or n + 2g positions of the pass.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.logits import LazyLogits
from diffusify.models.denoiser import Denoiser


class ShadowDenoiser:
    """A denoiser that predicts decoded positions as if they were masked, in one forward pass.

    The pass appends one mask token for each requested decoded position. The mask has the token's position id and
    attends to what the token attends to, except the token itself; no other token attends to the mask. If the model
    shifts its predictions, a copy of the left neighbour, which makes the prediction, is appended too. Predictions for
    open positions are unchanged.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        written = positions & ~canvas.open
        g, n, shift = int(written.sum(1).max()), positions.shape[1], self.denoiser.diffusion_config.shift
        if not g:
            return self.denoiser.predict(canvas, positions=positions)
        inputs = self.denoiser.diffusion_config.attention(canvas, shift=shift)
        position = (~written).long().argsort(dim=1, stable=True)[:, :g]  # rows with fewer than g get unused ones, too
        left = (position - shift).clamp_min(0)
        source = torch.cat([position, left], 1) if shift else position
        masks = torch.full_like(position, self.denoiser.diffusion_config.mask_token_id)
        left_is_mask = [canvas.open.gather(1, left)] if shift else []
        extra = torch.cat([masks, canvas.tokens.gather(1, left)], 1) if shift else masks

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            def origin(index: Tensor) -> Tensor:
                return torch.where(index < n, index, source[b, (index - n).clamp_min(0)])

            shadow_q, shadow_k = (q - n) % g, (k - n) % g
            itself = (k == position[b, shadow_q]) | (k == left[b, shadow_q])
            allowed = torch.where(k < n, (q < n) | ~itself, (q >= n) & (shadow_q == shadow_k))
            return allowed & inputs.mask_mod(b, h, origin(q), origin(k))

        extended = replace(
            inputs,
            tokens=torch.cat([inputs.tokens, extra], 1),
            position_ids=torch.cat([inputs.position_ids, inputs.position_ids.gather(1, source)], 1),
            mask_mod=mask_mod,
            per_row=True,
            is_mask=torch.cat([canvas.open, torch.ones_like(position, dtype=torch.bool), *left_is_mask], 1),
            unmasked=False,
        )
        shadow = written.long().cumsum(1) - 1
        output_index = torch.where(written, n + (g if shift else 0) + shadow, inputs.output_index)
        index = extended.flat_index(output_index, positions)
        return self.denoiser.lazy_logits(self.denoiser.hidden_states(extended, index))
