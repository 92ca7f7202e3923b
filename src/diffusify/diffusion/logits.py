"""Lazy logits: hidden states that are projected to the vocabulary in chunks of positions, on demand.

Axes: k positions (row by row), d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_SIZE = 128  # positions whose logits exist at once in inference
TRAINING_CHUNK_SIZE = 512  # positions whose logits exist at once in training
CHUNK_MULTIPLE = 64  # every training chunk but the last has a multiple of this many positions

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (logits, index) -> (summed loss, values per position)


class LazyLogits:
    """The logits at k positions, as hidden states and the head that projects them to the vocabulary.

    Logits are float32, or float64 if the head returns float64. At most `CHUNK_SIZE` positions' logits exist at once,
    except in the property `logits`. If k is at most `CHUNK_SIZE`, the logits are computed once and kept.

    `after_previous(candidates)`, [k, c] -> [k, 1, c], gives the logits of some tokens at each position if the token
    before it is known, for models with a draft head in training.
    """

    after_previous: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self, hidden: Float[Tensor, "k d"], head: Callable[[Tensor, Tensor], Tensor], weights: tuple[Tensor, ...] = ()
    ) -> None:
        """`head(hidden, index)` projects the positions `index` (into k); `weights` are its trainable parameters."""
        self._hidden, self._head, self._weights = hidden, head, weights
        self._computed: Tensor | None = None

    @classmethod
    def from_tensor(cls, logits: Float[Tensor, "k v"]) -> "LazyLogits":
        """Logits that are already computed."""
        return cls(logits, lambda chunk, index: chunk)

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, selection: Tensor) -> "LazyLogits":
        """The logits at some of the positions, given by a boolean mask or by indices."""
        if self._computed is not None:
            return LazyLogits.from_tensor(self._computed[selection])
        selected, head = torch.arange(len(self), device=selection.device)[selection], self._head
        return LazyLogits(self._hidden[selection], lambda chunk, index: head(chunk, selected[index]), self._weights)

    def transform(self, change: Callable[[Tensor, Tensor], Tensor]) -> "LazyLogits":
        """The logits after `change(logits, index)`, which gets some positions' logits and their indices into k."""
        head = self._head
        return LazyLogits(self._hidden, lambda chunk, index: change(head(chunk, index), index))

    def chunks(self) -> Iterator[Float[Tensor, "chunk v"]]:
        """All logits, in order, in chunks of at most `CHUNK_SIZE` positions."""
        if self._computed is not None:
            yield self._computed
            return
        positions = torch.arange(len(self), device=self._hidden.device)
        for hidden, index in zip(self._hidden.split(CHUNK_SIZE), positions.split(CHUNK_SIZE), strict=True):
            chunk = self._head(hidden, index)
            chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
            if len(chunk) == len(self):
                self._computed = chunk
            yield chunk

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of each position's logits, [chunk, v] -> [chunk, ...], applied in chunks and concatenated."""
        return torch.cat([function(chunk) for chunk in self.chunks()])

    def log_prob(self, tokens: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
        """The log-probability of one token at each position."""
        pairs = zip(self.chunks(), tokens.split(CHUNK_SIZE), strict=True)
        return torch.cat([chunk.log_softmax(-1).gather(-1, token[:, None])[:, 0] for chunk, token in pairs])

    @torch.no_grad()
    def raw(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk v"]:
        """The logits at some of the positions, in the head's own precision and without gradient."""
        return self._head(self._hidden[index], index)

    def chunked_loss(self, loss: ChunkLoss) -> tuple[Float[Tensor, ""], Tensor]:
        """The sum of a loss over all positions, with gradient, and the loss function's values per position, without.

        Gradients are computed in the forward pass, chunk by chunk, so at most `TRAINING_CHUNK_SIZE` positions' logits
        exist at once and none is computed twice (as in Liger's fused linear cross-entropy).
        """
        result: Any = _ChunkedLoss.apply(self._hidden, self._head, loss, *self._weights)
        return result

    def checkpointed_map(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`function(logits, index)` of all positions, concatenated, with gradient.

        For losses that need the values of all positions at once. The logits are computed again in the backward pass, so
        at most `TRAINING_CHUNK_SIZE` positions' logits exist at once.
        """

        def values(hidden: Tensor, index: Tensor) -> Tensor:
            return function(self._head(hidden, index), index)

        positions, sizes = torch.arange(len(self), device=self._hidden.device), _chunk_sizes(len(self))
        chunks = zip(self._hidden.split(sizes), positions.split(sizes), strict=True)
        return torch.cat([checkpoint(values, *chunk, use_reentrant=False) for chunk in chunks])

    @property
    def logits(self) -> Float[Tensor, "k v"]:
        """All logits at once."""
        return torch.cat(list(self.chunks()))


def _chunk_sizes(k: int) -> list[int]:
    """The sizes of the training chunks. They take few values, because a kernel is cached for each size ever seen."""
    rest = k % TRAINING_CHUNK_SIZE
    last_two = (rest - rest % CHUNK_MULTIPLE, rest % CHUNK_MULTIPLE)
    return [TRAINING_CHUNK_SIZE] * (k // TRAINING_CHUNK_SIZE) + [size for size in last_two if size] or [0]


class _ChunkedLoss(torch.autograd.Function):
    """The autograd function of `LazyLogits.chunked_loss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Callable[[Tensor, Tensor], Tensor], loss: ChunkLoss, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums, values, hidden_grads = [], [], []
        weight_grads: list[Tensor | None] = [None] * len(weights)
        positions = torch.arange(len(hidden), device=hidden.device)
        sizes = _chunk_sizes(len(hidden))
        for chunk, index in zip(hidden.split(sizes), positions.split(sizes), strict=True):
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_()
                chunk_sum, chunk_values = loss(head(chunk, index), index)
            if any(ctx.needs_input_grad):
                first, *others = torch.autograd.grad(chunk_sum, [chunk, *weights])
                hidden_grads.append(first)
                weight_grads = [b if a is None else a.add_(b) for a, b in zip(weight_grads, others, strict=True)]
            sums.append(chunk_sum.detach())
            values.append(chunk_values)
        ctx.grads = (torch.cat(hidden_grads), *weight_grads) if hidden_grads else ()
        all_values = torch.cat(values)
        ctx.mark_non_differentiable(all_values)
        return torch.stack(sums).sum(), all_values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, *weights = (each.mul_(grad) for each in ctx.grads)
        return (hidden, None, None, *weights)
