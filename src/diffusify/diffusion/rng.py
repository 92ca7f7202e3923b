"""Random number generators for a batch, one per row.

Axes: b texts, n positions, k selected positions (row by row), v vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor


@dataclass(frozen=True)
class RowGenerators:
    """One generator per row, so that a row's random numbers depend on its own seed and steps, not on other rows.

    A single generator may serve all rows; then a row's numbers do depend on the other rows.
    """

    generators: tuple[Generator, ...]

    @classmethod
    def from_seeds(cls, seeds: list[int], device: torch.device | str = "cpu") -> "RowGenerators":
        """New generators on a device, one per seed."""
        return cls(tuple(Generator(device).manual_seed(seed) for seed in seeds))

    def for_rows(self, rows: list[int]) -> "RowGenerators":
        """The generators of some of the rows."""
        return self if len(self.generators) == 1 else RowGenerators(tuple(self.generators[row] for row in rows))

    def uniform(self, positions: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Uniform numbers in [0, 1) at the selected positions, 0 elsewhere."""
        numbers = [torch.rand(count, generator=g, device=positions.device) for count, g in self._counts(positions)]
        return torch.zeros(positions.shape, device=positions.device).masked_scatter(positions, torch.cat(numbers))

    def exponential(self, positions: Bool[Tensor, "b n"], v: int) -> Float[Tensor, "k v"]:
        """Exponential(1) numbers in float64, v for each selected position."""
        out = torch.empty(int(positions.sum()), v, dtype=torch.float64, device=positions.device)
        generators = (generator for count, generator in self._counts(positions) for _ in range(count))
        # one call per position: a call for several would give numbers that depend on how many there are
        for row, generator in zip(out, generators, strict=True):
            row.exponential_(generator=generator)
        return out

    def _counts(self, positions: Bool[Tensor, "b n"]) -> list[tuple[int, Generator]]:
        """Each generator, with the number of selected positions in its rows."""
        if len(self.generators) == 1:
            return [(int(positions.sum()), self.generators[0])]
        return list(zip(positions.sum(1).tolist(), self.generators, strict=True))
