"""Token selection: the token at each position, and its log-probability.

Axes: b texts, n positions, k selected positions (row by row), v vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.diffusion.rng import DrawnNumbers, RowGenerators


@dataclass(frozen=True)
class Greedy:
    """The most likely token."""

    def __call__(
        self, logits: Float[Tensor, "k v"], positions: Bool[Tensor, "b n"], rng: RowGenerators | DrawnNumbers
    ) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
        highest, tokens = logits.max(-1)
        return tokens, highest - logits.logsumexp(-1)


@dataclass(frozen=True)
class Draw:
    """A sampled token, with temperature, top-k and top-p (nucleus) truncation.

    The score is the token's log-probability before temperature and truncation. Raises ValueError for a setting out of
    range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0 to sample; use Greedy() for temperature 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1.0 keeps every token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it unset to keep every token")

    def __call__(
        self, logits: Float[Tensor, "k v"], positions: Bool[Tensor, "b n"], rng: RowGenerators | DrawnNumbers
    ) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
        probs = (logits / self.temperature).softmax(-1)
        if self.top_k is not None:
            kth = probs.topk(min(self.top_k, probs.shape[-1])).values[..., -1:]
            probs = probs.masked_fill(probs < kth, 0.0)
        if self.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p * ordered.sum(-1, keepdim=True)
            probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0.0))
        uniform = rng.uniform(positions)[positions][:, None]  # in float64, so the sums are, too
        cumulative = probs.cumsum(-1, dtype=uniform.dtype)
        total = cumulative[:, -1:]
        threshold = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, threshold, right=True)  # the inverse of the distribution function
        return tokens[:, 0], logits.gather(-1, tokens)[:, 0] - logits.logsumexp(-1)


Pick = Greedy | Draw
