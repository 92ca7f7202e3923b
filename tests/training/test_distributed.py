"""Which row of a step is whose: together the processes have what one would have."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import PerBlock, PerText, Share, noised
from diffusify.diffusion.schedules import Linear
from diffusify.training.resilience.distributed import Shuffled, places

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 5))
def test_every_row_has_a_place_and_turns_are_taken(sizes: list[int], processes: int) -> None:
    place = places(sizes, processes)
    assert sorted(place.flatten().tolist()) == list(range(sum(sizes) * processes))
    dealt = iter(range(place.numel()))
    hands: list[list[int]] = [[] for _ in range(processes)]
    for size in sizes:
        for hand in hands:
            hand += [next(dealt) for _ in range(size)]
    assert place.tolist() == hands


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3), st.integers(0, 5))
def test_a_stream_is_the_same_from_wherever_it_is_read(rows: int, step: int, seed: int, epoch: int) -> None:
    stream = [row for i in range(epoch + 1) for row in Shuffled(rows, step, seed, lambda i=i: i * -(-rows // step))]
    assert len(stream) % step == 0
    for turn in range(len(stream) // rows):
        assert sorted(stream[turn * rows : (turn + 1) * rows]) == list(range(rows))
    order = Shuffled(rows, step, seed, lambda: epoch * -(-rows // step))
    assert list(order) == stream[epoch * len(order) :] and len(list(order)) == len(order)


@given(
    st.integers(0, 9),
    st.sampled_from([PerText(), PerText(draws=2), PerBlock(3), PerBlock(3, complement=True, tilt=0.1)]),
)
def test_noise_does_not_depend_on_who_draws_it(seed: int, time: PerText | PerBlock) -> None:
    torch.manual_seed(seed)
    document = torch.randint(0, 2, (6, 8)).cumsum(1) + 1
    text = Canvas.clean(torch.randint(0, 9, (6, 8)), document)
    whole = noised(text, time, Linear(), 9, ar_share=0.5, generator=torch.Generator().manual_seed(seed))
    for place in places([2, 1], 2):
        generator = torch.Generator().manual_seed(seed)
        mine = noised(text[place], time, Linear(), 9, ar_share=0.5, generator=generator, share=Share(document, place))
        rows = (place[:, None] * whole.views + torch.arange(whole.views)).flatten()
        for one, other in (
            (mine.t, whole.t),
            (mine.ar_positions, whole.ar_positions),
            (mine.canvas.tokens, whole.canvas.tokens),
        ):
            assert torch.equal(one, other[rows])
