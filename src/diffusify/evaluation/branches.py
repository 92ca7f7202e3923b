"""Texts that begin alike as one row: their common beginning once, then each continuation as a branch.

Axes: b rows, m positions, k tokens of continuations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusify.diffusion.attention_inputs import AttentionInputs


@dataclass(frozen=True)
class Branches:
    """A context and its continuations, as token ids. A continuation attends to the context and to itself."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> list[int]:
        """The tokens of the row."""
        return [*self.context, *(token for branch in self.continuations for token in branch)]

    @property
    def branch(self) -> list[int]:
        """The number of each token's continuation, counted from 1; 0 in the context."""
        numbers = (i for i, branch in enumerate(self.continuations, 1) for _ in branch)
        return [*(0 for _ in self.context), *numbers]

    @property
    def position_ids(self) -> list[int]:
        """The position of each token in its own text."""
        start = len(self.context)
        ids = (start + i for branch in self.continuations for i in range(len(branch)))
        return [*range(start), *ids]


def causal_inputs(
    rows: Sequence[Branches], device: torch.device | str
) -> tuple[AttentionInputs, Int[Tensor, " k"], Int[Tensor, " k"]]:
    """The inputs of an AR model; of each token of a continuation its column, and the output that predicts it.

    Columns are counted through all rows, as outputs are in `Denoiser.hidden_states`.
    """

    def padded(name: str, value: int) -> Int[Tensor, "b m"]:
        lists = [torch.tensor(getattr(row, name)) for row in rows]
        return pad_sequence(lists, batch_first=True, padding_value=value).to(device)

    tokens, branch, position_ids = padded("tokens", 0), padded("branch", -1), padded("position_ids", 0)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((branch[b, k] == 0) | (branch[b, k] == branch[b, q]))

    inputs = AttentionInputs(tokens, position_ids, tokens, tokens, mask_mod, per_row=True)
    row, column = (branch > 0).nonzero(as_tuple=True)
    is_first = branch[row, column] != branch[row, column - 1]
    last_of_context = torch.tensor([len(row.context) - 1 for row in rows], device=device)
    source = torch.where(is_first, last_of_context[row], column - 1)
    return inputs, row * tokens.shape[1] + column, row * tokens.shape[1] + source
