"""Random numbers for a batch, so that a row's luck is its own.

Axes: b texts, n positions, k chosen positions (row by row), v vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor


@dataclass(frozen=True)
class RowGenerators:
    """One generator for each row: what a row draws depends on its own seed and its own steps, not on its neighbours.

    A single generator may stand for all rows; then a row's numbers do depend on the others.
    """

    generators: tuple[Generator, ...]

    @classmethod
    def seeded(cls, seeds: list[int], device: torch.device | str = "cpu") -> "RowGenerators":
        return cls(tuple(Generator(device).manual_seed(seed) for seed in seeds))

    def of(self, rows: list[int]) -> "RowGenerators":
        """The luck of some of the rows."""
        return self if len(self.generators) == 1 else RowGenerators(tuple(self.generators[row] for row in rows))

    def uniform(self, where: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Uniform in [0, 1) at the chosen positions, 0 elsewhere."""
        drawn = [torch.rand(count, generator=g, device=where.device) for count, g in self._shares(where)]
        return torch.zeros(where.shape, device=where.device).masked_scatter(where, torch.cat(drawn))

    def exponential(self, where: Bool[Tensor, "b n"], v: int) -> Float[Tensor, "k v"]:
        """Exponential, in float64, v of them for each chosen position."""
        out = torch.empty(int(where.sum()), v, dtype=torch.float64, device=where.device)
        turns = (generator for count, generator in self._shares(where) for _ in range(count))
        for one, generator in zip(out, turns, strict=True):  # apart: what is drawn together makes no difference
            one.exponential_(generator=generator)
        return out

    def _shares(self, where: Bool[Tensor, "b n"]) -> list[tuple[int, Generator]]:
        """How many numbers each generator is to give."""
        if len(self.generators) == 1:
            return [(int(where.sum()), self.generators[0])]
        return list(zip(where.sum(1).tolist(), self.generators, strict=True))
