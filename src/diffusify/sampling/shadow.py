"""Second thoughts: what the model would write in a place if it did not see what is written there.

Axes: b texts, n canvas positions, g written positions that are asked about, m = n + g or n + 2g positions that are run.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.logits import LazyLogits
from diffusify.models.denoiser import Denoiser


class ShadowDenoiser:
    """A denoiser whose answer about a written position is read from all the rest of the text (WINO's shadow tokens).

    In the same pass as the text runs a mask for each written position that is asked about. It stands where the token
    stands and sees what the token sees, but for the token; nothing else sees the mask. Under shift a copy of the left
    neighbour, which gives the answer, stands beside the mask. Open positions are answered as ever.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        written = positions & ~canvas.open
        g, n, shift = int(written.sum(1).max()), positions.shape[1], self.denoiser.diffusion_config.shift
        if not g:
            return self.denoiser.predict(canvas, positions=positions)
        inputs = self.denoiser.diffusion_config.attention(canvas, shift=shift)
        place = (~written).long().argsort(dim=1, stable=True)[:, :g]  # rows with fewer look at other places for nothing
        left = (place - shift).clamp_min(0)
        source = torch.cat([place, left], 1) if shift else place
        masks = torch.full_like(place, self.denoiser.diffusion_config.mask_token_id)
        extra = torch.cat([masks, canvas.tokens.gather(1, left)], 1) if shift else masks

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            def origin(at: Tensor) -> Tensor:
                return torch.where(at < n, at, source[b, (at - n).clamp_min(0)])

            lane_q, lane_k = (q - n) % g, (k - n) % g
            itself = (k == place[b, lane_q]) | (k == left[b, lane_q])
            own = torch.where(k < n, (q < n) | ~itself, (q >= n) & (lane_q == lane_k))
            return own & inputs.mask_mod(b, h, origin(q), origin(k))

        wider = replace(
            inputs,
            tokens=torch.cat([inputs.tokens, extra], 1),
            positions=torch.cat([inputs.position_ids, inputs.position_ids.gather(1, source)], 1),
            mask_mod=mask_mod,
            per_row=True,
            unmasked=False,
        )
        lane = written.long().cumsum(1) - 1
        answers = torch.where(written, n + (g if shift else 0) + lane, inputs.output_index)
        return self.denoiser.lazy_logits(self.denoiser.hidden_states(wider, wider.flat_index(answers, positions)))
