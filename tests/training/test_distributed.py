"""Collectives, and the rows of each process: together the processes have the rows of a single one."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import PerBlock, PerText, RowShard, noised
from diffusify.diffusion.schedules import Linear
from diffusify.training.resilience.distributed import (
    ShuffledRows,
    all_gather_rows,
    all_reduce_max,
    is_single_process,
    row_order,
)
from tests.training.worlds import fork_ranks

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 5))
def test_processes_take_micro_batches_in_turns(sizes: list[int], processes: int) -> None:
    order = row_order(sizes, processes)
    assert sorted(order.flatten().tolist()) == list(range(sum(sizes) * processes))
    rows = iter(range(order.numel()))
    expected: list[list[int]] = [[] for _ in range(processes)]
    for size in sizes:
        for own in expected:
            own += [next(rows) for _ in range(size)]
    assert order.tolist() == expected


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3), st.integers(0, 5))
def test_shuffled_rows_do_not_depend_on_where_a_run_resumes(rows: int, step: int, seed: int, epoch: int) -> None:
    stream = [row for i in range(epoch + 1) for row in ShuffledRows(rows, step, seed, lambda i=i: i * -(-rows // step))]
    assert len(stream) % step == 0
    for shuffle in range(len(stream) // rows):
        assert sorted(stream[shuffle * rows : (shuffle + 1) * rows]) == list(range(rows))
    order = ShuffledRows(rows, step, seed, lambda: epoch * -(-rows // step))
    assert list(order) == stream[epoch * len(order) :] and len(list(order)) == len(order)


@given(
    st.integers(0, 9),
    st.sampled_from([PerText(), PerText(draws=2), PerBlock(3), PerBlock(3, complement=True, tilt=0.1)]),
)
def test_noise_does_not_depend_on_the_process(seed: int, time: PerText | PerBlock) -> None:
    torch.manual_seed(seed)
    document = torch.randint(0, 2, (6, 8)).cumsum(1) + 1
    text = Canvas.clean(torch.randint(0, 9, (6, 8)), document)
    step = noised(text, time, Linear(), 9, ar_share=0.5, generator=torch.Generator().manual_seed(seed))
    for own in row_order([2, 1], 2):
        generator = torch.Generator().manual_seed(seed)
        part = noised(text[own], time, Linear(), 9, ar_share=0.5, generator=generator, shard=RowShard(document, own))
        rows = (own[:, None] * step.views + torch.arange(step.views)).flatten()
        for actual, expected in (
            (part.t, step.t),
            (part.ar_positions, step.ar_positions),
            (part.canvas.tokens, step.canvas.tokens),
        ):
            assert torch.equal(actual, expected[rows])


def collectives(rank: int) -> None:
    assert not is_single_process()
    assert all_reduce_max(rank, 0.5 - rank, True) == [1.0, 0.5, 1.0]
    rows = torch.arange(6).view(2, 3) + 10 * rank
    assert torch.equal(all_gather_rows(rows), torch.tensor([[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]))


def test_collectives_of_two_processes(tmp_path: Path) -> None:
    assert fork_ranks(2, collectives, tmp_path) == [0, 0]


def test_a_single_process_needs_no_collectives() -> None:
    assert is_single_process() and all_reduce_max(3, False) == [3.0, 0.0]
    rows = torch.arange(6).view(2, 3)
    assert torch.equal(all_gather_rows(rows), rows)
