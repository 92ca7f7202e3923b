"""What OpenAI's clients ask of the probabilities: to change them, and to be told of them.

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
    """A policy under watch: the `top` likeliest tokens wherever it writes, as they were then."""

    policy: Callable[[StepState], Move]
    top: int
    found: dict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=dict)  # by row and position

    def __post_init__(self) -> None:
        for name in ("remasks", "rescores", "needs_shadow", "history_length"):
            setattr(self, name, getattr(self.policy, name, False))

    def __call__(self, state: StepState) -> Move:
        move = self.policy(state)
        if len(state.logits):
            places = move.write.nonzero().tolist()
            parts = [part.log_softmax(-1).topk(self.top) for part in state.logits[move.write[state.positions]].parts()]
            for (row, at), sure, ids in zip(
                places,
                [values for part in parts for values in part.values.tolist()],
                [values for part in parts for values in part.indices.tolist()],
                strict=True,
            ):
                likely = [(i, p) for i, p in zip(ids, sure, strict=True) if p > -math.inf]
                self.found[row, at] = likely
        return move


@dataclass(frozen=True)
class Penalties:
    """OpenAI's changes to the logits: a bias for some tokens, and less for those that the text has already."""

    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0

    def __call__(self, logits: Tensor, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> Tensor:
        if self.presence or self.frequency:
            times = logits.new_zeros(len(positions), logits.shape[-1])
            times.scatter_add_(1, canvas.tokens, canvas.written.to(times.dtype))
            less = self.frequency * times + self.presence * (times > 0)
            logits = logits - less[positions.nonzero()[:, 0]]
        if self.bias:
            tokens, more = zip(*self.bias, strict=True)
            added = logits.new_tensor(more).expand(len(logits), -1)
            logits = logits.index_add(1, torch.tensor(tokens, device=logits.device), added)
        return logits
