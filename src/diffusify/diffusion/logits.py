"""Logits that are made when they are looked at, some positions at a time.

Axes: k positions (row by row), d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOGETHER = 128  # positions


class LazyLogits:
    """Logits about k positions, as hidden states and the head that projects them to the vocabulary.

    They are float32 at least. However many positions there are, logits of no more than `TOGETHER` exist at once, unless
    `logits` is asked for. Those of so few are kept.
    """

    def __init__(self, hidden: Float[Tensor, "k d"], head: Callable[[Tensor, Tensor], Tensor]) -> None:
        """`head` is given some of the hidden states, and the numbers (of k) of their positions."""
        self._hidden, self._head = hidden, head
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
        return LazyLogits(self._hidden[places], lambda part, index: head(part, numbers[index]))

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

    @property
    def logits(self) -> Float[Tensor, "k v"]:
        """All of them at once."""
        return torch.cat(list(self.parts()))
