"""Collectives over training processes, and the assignment of an optimizer step's rows to them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler


def is_single_process() -> bool:
    """Whether the run has one process only."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def all_reduce_max(*values: float | int) -> list[float]:
    """The largest of each value over all processes, reduced between CPUs so that no accelerator has to synchronize."""
    if is_single_process():
        return [float(value) for value in values]
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_cpu_group())
    return largest.tolist()


def all_gather_rows(rows: Int[Tensor, "b n"]) -> Int[Tensor, "all n"]:
    """The rows of all processes, concatenated in rank order. Every process must have the same number of rows."""
    if is_single_process():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous(), group=_cpu_group())
    return torch.cat(gathered)


def row_order(sizes: list[int], processes: int) -> Int[Tensor, "processes rows"]:
    """The index within the step of each process's rows, in the order in which a single process would read them.

    `sizes` are the sizes of one process's micro-batches. Processes take micro-batches in turns.
    """
    size = torch.tensor(sizes)
    starts = (size.cumsum(0) - size).repeat_interleave(size)
    micro_batch_size = size.repeat_interleave(size)
    offset = torch.arange(len(micro_batch_size)) - starts
    return starts * processes + torch.arange(processes)[:, None] * micro_batch_size + offset


class ShuffledRows(Sampler[int]):
    """A sampler of row indices in random order, reshuffled after each pass over the data.

    The passes form one stream, which is cut into steps of `rows_per_step` rows. Every step is full, so its rows depend
    only on the seed and the step's number. One iteration is an epoch: as many steps as it takes to read all rows once.
    `steps_done` returns the number of steps before the iteration, for resumed runs.
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int, steps_done: Callable[[], int] = lambda: 0) -> None:
        self.rows, self.seed, self.steps_done = rows, seed, steps_done
        self.steps, self.length = -(-rows // rows_per_step), -(-rows // rows_per_step) * rows_per_step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // self.steps
        position, end = epoch * self.length, (epoch + 1) * self.length
        while position < end:
            shuffle, first = divmod(position, self.rows)
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + shuffle))
            indices = order[first : first + end - position].tolist()
            yield from indices
            position += len(indices)


@cache
def _cpu_group() -> Any:
    """A process group whose collectives run on CPU tensors."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
