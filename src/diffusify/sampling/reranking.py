"""Exact likelihoods of texts under the AR half of a model, by which candidates for a text or a span are ranked.

Axes: b texts, n positions, c candidates for the end of a span, k tokens behind it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Causal
from diffusify.diffusion.attention_inputs import AttentionInputs
from diffusify.models.denoiser import Denoiser

_MAX_ENDS = 12
_MAX_BEHIND = 16  # tokens
_WEIGHT_BEHIND = 0.5


@torch.inference_mode()
def ar_log_likelihood(denoiser: Denoiser, canvas: Canvas) -> Float[Tensor, " b"]:
    """The log-probability of each text under the AR half (nats), given its first token; one forward pass."""
    inputs = Causal()(canvas, shift=denoiser.diffusion_config.shift)
    positions = canvas.real & (canvas.position_ids > 0)
    logits = denoiser.lazy_logits(denoiser.hidden_states(inputs, inputs.flat_index(inputs.output_index, positions)))
    total = torch.zeros(len(positions), device=positions.device)
    return total.index_add(0, positions.nonzero()[:, 0], logits.log_prob(canvas.tokens[positions]))


@torch.inference_mode()
def best_ends(
    denoiser: Denoiser, canvas: Canvas, log_prob: Float[Tensor, "b n"], end: Int[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """The position before which each span should end, if `log_prob` is that of an end there; one forward pass.

    The text up to there is continued by what stands at `end`, and the AR half, which reads the text in its order here,
    says how well it does. The likeliest ends are compared by the sum of `log_prob` and half of the log-probability of
    the first tokens behind the span.
    """
    b, n = canvas.tokens.shape
    log_prob, cut = log_prob.topk(min(_MAX_ENDS, n))
    cut = torch.where(log_prob > -torch.inf, cut, 1)
    place = torch.arange(min(_MAX_BEHIND, n), device=cut.device)
    column = end[:, None] + place
    known = (column < n) & (canvas.real & ~canvas.open).gather(1, column.clamp_max(n - 1))
    known, behind = known.cumprod(1).bool(), canvas.tokens.gather(1, column.clamp_max(n - 1))
    c, k, width = cut.shape[1], len(place), int(cut.amax())

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        """The text is causal; each copy of what stands behind attends to the text up to its end, and to itself."""
        copy, key_copy = (q - width) // k, (key - width) // k
        text = torch.where(q < width, q + 1, cut[b, copy.clamp(0, c - 1)])
        return torch.where(key < width, key < text, (copy == key_copy) & (key <= q))

    copies = (cut[..., None] + place).clamp_max(n - 1).flatten(1)
    tokens = torch.cat([canvas.tokens[:, :width], behind.repeat(1, c)], 1)
    positions = torch.cat([canvas.position_ids[:, :width], copies], 1)
    column = width + torch.arange(c * k, device=cut.device).view(c, k)
    source = torch.where(place == 0, cut[..., None] - 1, column - 1)
    row = torch.arange(b, device=cut.device)[:, None, None]
    inputs = AttentionInputs(tokens, positions, tokens, tokens, mask_mod, per_row=True)
    hidden = denoiser.hidden_states(inputs, (row * tokens.shape[1] + source).flatten())
    follows = denoiser.lazy_logits(hidden).log_prob(behind[:, None].expand(b, c, k).flatten()).view(b, c, k)
    score = log_prob + _WEIGHT_BEHIND * follows.masked_fill(~known[:, None], 0.0).sum(-1)
    return cut.gather(1, score.argmax(1, keepdim=True))[:, 0]
