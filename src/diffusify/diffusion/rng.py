"""Random number generators for a batch, one per row.

Axes: b texts, n positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from diffusify.diffusion.precision import widest_float


@dataclass(frozen=True)
class RowGenerators:
    """One generator per row, so that a row's random numbers depend on its own seed and steps, not on other rows.

    They are on the CPU, so that a seed gives the same numbers for every device, and a number does not depend on how
    many are drawn with it. A single generator may serve all rows; then a row's numbers do depend on the other rows.
    """

    generators: tuple[Generator, ...]

    @classmethod
    def from_seeds(cls, seeds: list[int]) -> "RowGenerators":
        """New generators, one per seed."""
        return cls(tuple(Generator().manual_seed(seed) for seed in seeds))

    def for_rows(self, rows: list[int]) -> "RowGenerators":
        """The generators of some of the rows."""
        return self if len(self.generators) == 1 else RowGenerators(tuple(self.generators[row] for row in rows))

    def uniform(self, positions: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Uniform numbers in [0, 1) at the selected positions, 0 elsewhere; in float64, except for MPS.

        The 24 bits of float32 would cut the tail of a distribution, which acts as a lower temperature.
        """
        counts, dtype = self._counts(positions), widest_float(positions.device)
        numbers = torch.cat([torch.rand(count, generator=each, dtype=torch.float64) for count, each in counts])
        out = torch.zeros(positions.shape, dtype=dtype, device=positions.device)
        return out.masked_scatter(positions, numbers.to(positions.device, dtype))

    def _counts(self, positions: Bool[Tensor, "b n"]) -> list[tuple[int, Generator]]:
        """Each generator, with the number of selected positions in its rows."""
        if len(self.generators) == 1:
            return [(int(positions.sum()), self.generators[0])]
        return list(zip(positions.sum(1).tolist(), self.generators, strict=True))


@dataclass(frozen=True)
class DrawnNumbers:
    """Uniform numbers that were drawn before, in the place of generators."""

    numbers: Float[Tensor, "b n"]

    def uniform(self, positions: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The numbers at the selected positions, 0 elsewhere."""
        return torch.where(positions, self.numbers, 0.0)
