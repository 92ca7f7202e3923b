"""OpenAI's options about token probabilities: biases and penalties, and reports of the most likely tokens.

Axes: b rows, n positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas, Move
from diffusify.diffusion.step import StepState


@dataclass(eq=False)
class TopLogprobs:
    """Wraps a policy and records the `top` most likely tokens of each position in the step that writes it.

    `found` holds them as (token id, log-probability), by row and position.
    """

    policy: Callable[[StepState], Move]
    top: int
    found: dict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("remasks", "rescores", "needs_shadow", "history_length"):
            setattr(self, name, getattr(self.policy, name, False))

    def __call__(self, state: StepState) -> Move:
        move = self.policy(state)
        if len(state.logits):
            cells = move.write.nonzero().tolist()
            chunks = [
                chunk.log_softmax(-1).topk(self.top) for chunk in state.logits[move.write[state.positions]].chunks()
            ]
            for (row, position), log_probs, ids in zip(
                cells,
                [values for chunk in chunks for values in chunk.values.tolist()],
                [values for chunk in chunks for values in chunk.indices.tolist()],
                strict=True,
            ):
                likely = [(i, p) for i, p in zip(ids, log_probs, strict=True) if p > -math.inf]
                self.found[row, position] = likely
        return move


@dataclass(frozen=True)
class Penalties:
    """A logits processor for OpenAI's `logit_bias`, `presence_penalty` and `frequency_penalty`.

    `bias` is added to the logits of its tokens. The penalties are subtracted for tokens that the text already has.
    """

    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0

    def __call__(self, logits: Tensor, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> Tensor:
        if self.presence or self.frequency:
            counts = logits.new_zeros(len(positions), logits.shape[-1])
            counts.scatter_add_(1, canvas.tokens, canvas.written.to(counts.dtype))
            penalty = self.frequency * counts + self.presence * (counts > 0)
            logits = logits - penalty[positions.nonzero()[:, 0]]
        if self.bias:
            tokens, values = zip(*self.bias, strict=True)
            added = logits.new_tensor(values).expand(len(logits), -1)
            logits = logits.index_add(1, torch.tensor(tokens, device=logits.device), added)
        return logits
