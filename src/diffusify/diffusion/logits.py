"""Logits that are made when they are looked at, some positions at a time.

Axes: k positions (row by row), d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOGETHER = 128  # positions
LEARNT = 512  # positions whose logits exist at once while they are learnt from
EVEN = 64  # positions: one part has fewer, all others a multiple

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (logits, numbers) -> (a sum, something for each position)


class LazyLogits:
    """Logits about k positions, as hidden states and the head that projects them to the vocabulary.

    They are float32 at least. However many positions there are, logits of no more than `TOGETHER` exist at once, unless
    `logits` is asked for. Those of so few are kept.
    """

    def __init__(
        self, hidden: Float[Tensor, "k d"], head: Callable[[Tensor, Tensor], Tensor], weights: tuple[Tensor, ...] = ()
    ) -> None:
        """`head` is given some of the hidden states, and the numbers (of k) of their positions; `weights` it learns."""
        self._hidden, self._head, self._weights = hidden, head, weights
        self._made: Tensor | None = None

    @classmethod
    def of(cls, logits: Float[Tensor, "k v"]) -> "LazyLogits":
        """Logits that are there already."""
        return cls(logits, lambda part, index: part)

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, places: Tensor) -> "LazyLogits":
        """Those of some of the positions, by a mask or by number."""
        if self._made is not None:
            return LazyLogits.of(self._made[places])
        numbers, head = torch.arange(len(self), device=places.device)[places], self._head
        return LazyLogits(self._hidden[places], lambda part, index: head(part, numbers[index]), self._weights)

    def then(self, change: Callable[[Tensor, Tensor], Tensor]) -> "LazyLogits":
        """The same, changed: `change` is given some of the logits, and the numbers of their positions."""
        head = self._head
        return LazyLogits(self._hidden, lambda part, index: change(head(part, index), index))

    def parts(self) -> Iterator[Float[Tensor, "part v"]]:
        """All logits, in order, some at a time."""
        if self._made is not None:
            yield self._made
            return
        numbers = torch.arange(len(self), device=self._hidden.device)
        for hidden, index in zip(self._hidden.split(TOGETHER), numbers.split(TOGETHER), strict=True):
            part = self._head(hidden, index)
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            if len(part) == len(self):
                self._made = part
            yield part

    def map(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """What is measured of each position's logits: [part, v] -> [part, ...], joined."""
        return torch.cat([measure(part) for part in self.parts()])

    def log_prob(self, tokens: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
        """The log-probability of one token at each position."""
        parts = zip(self.parts(), tokens.split(TOGETHER), strict=True)
        return torch.cat([part.log_softmax(-1).gather(-1, these[:, None])[:, 0] for part, these in parts])

    @torch.no_grad()
    def raw(self, numbers: Int[Tensor, " part"]) -> Float[Tensor, "part v"]:
        """Some of them in the head's own precision, not to learn from."""
        return self._head(self._hidden[numbers], numbers)

    def total(self, measure: Measure) -> tuple[Float[Tensor, ""], Tensor]:
        """The sum of a measure over all positions, to be learnt from, and what the measure tells of each besides.

        Gradients are made on the way, so logits of no more than LEARNT positions exist, forwards or backwards, and none
        is made twice (as in Liger's and other fused losses).
        """
        found: Any = _Total.apply(self._hidden, self._head, measure, *self._weights)
        return found

    @property
    def logits(self) -> Float[Tensor, "k v"]:
        """All of them at once."""
        return torch.cat(list(self.parts()))


def _sizes(k: int) -> list[int]:
    """How many positions each part has, in few sizes: a kernel is kept for each that was ever met, between tensors."""
    rest = k % LEARNT
    return [LEARNT] * (k // LEARNT) + [size for size in (rest - rest % EVEN, rest % EVEN) if size] or [0]


class _Total(torch.autograd.Function):
    """See `LazyLogits.total`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Callable[[Tensor, Tensor], Tensor], measure: Measure, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums, told, of_hidden = [], [], []
        of_weights: list[Tensor | None] = [None] * len(weights)
        numbers = torch.arange(len(hidden), device=hidden.device)
        sizes = _sizes(len(hidden))
        for part, index in zip(hidden.split(sizes), numbers.split(sizes), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                worth, values = measure(head(part, index), index)
            if any(ctx.needs_input_grad):
                first, *others = torch.autograd.grad(worth, [part, *weights])
                of_hidden.append(first)
                of_weights = [b if a is None else a.add_(b) for a, b in zip(of_weights, others, strict=True)]
            sums.append(worth.detach())
            told.append(values)
        ctx.found = (torch.cat(of_hidden), *of_weights) if of_hidden else ()
        values = torch.cat(told)
        ctx.mark_non_differentiable(values)
        return torch.stack(sums).sum(), values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, *weights = (found.mul_(grad) for found in ctx.found)
        return (hidden, None, None, *weights)
