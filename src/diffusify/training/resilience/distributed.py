"""Several processes as one run: what they agree on, and which rows of a step are whose."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler


def alone() -> bool:
    """Whether this process is the whole run."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def agreed(*values: float | int) -> list[float]:
    """The largest of each value over all processes. It travels from CPU to CPU, so no accelerator waits for it."""
    if alone():
        return [float(value) for value in values]
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_between_cpus())
    return largest.tolist()


def gathered(rows: Int[Tensor, "b n"]) -> Int[Tensor, "all n"]:
    """The rows of all processes (as many of each), one process after the other."""
    if alone():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous(), group=_between_cpus())
    return torch.cat(parts)


def places(sizes: list[int], processes: int) -> Int[Tensor, "processes rows"]:
    """Where the rows of each process stand in the step, counted as a single process would meet them.

    `sizes` are those of a process's micro-batches, which all processes take in turns.
    """
    size = torch.tensor(sizes)
    starts = (size.cumsum(0) - size).repeat_interleave(size)
    own = size.repeat_interleave(size)
    inside = torch.arange(len(own)) - starts
    return starts * processes + torch.arange(processes)[:, None] * own + inside


class Shuffled(Sampler[int]):
    """Rows in random order, reshuffled whenever all were seen, as one stream that is cut into steps of `step` rows.

    Every step is full, so what it holds depends on nothing but the seed and its number. An iteration is an epoch, as
    many steps as it takes to see all rows; `made` tells how many steps there were before.
    """

    def __init__(self, rows: int, step: int, seed: int, made: Callable[[], int] = lambda: 0) -> None:
        self.rows, self.seed, self.made = rows, seed, made
        self.steps, self.length = -(-rows // step), -(-rows // step) * step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.made() // self.steps
        at, end = epoch * self.length, (epoch + 1) * self.length
        while at < end:
            turn, first = divmod(at, self.rows)
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + turn))
            part = order[first : first + end - at].tolist()
            yield from part
            at += len(part)


@cache
def _between_cpus() -> Any:
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
