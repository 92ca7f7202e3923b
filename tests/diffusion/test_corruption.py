"""Corruption opens the right share of the right positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText, corrupt, noised, stratified
from diffusify.diffusion.schedules import Cosine, Linear


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 60), st.integers(0, 1000))
def test_stratified_has_one_draw_in_every_cell(count: int, seed: int) -> None:
    u = stratified(count, generator(seed)).sort().values
    edges = torch.arange(count + 1) / count
    assert (u >= edges[:-1] - 1e-6).all() and (u <= edges[1:] + 1e-6).all()


@given(st.integers(0, 1000))
def test_only_editable_positions_open_and_the_rest_is_untouched(seed: int) -> None:
    tokens = torch.randint(0, 9, (3, 10), generator=generator(seed))
    document = torch.tensor([[1] * 10, [1] * 4 + [2] * 6, [1] * 7 + [0] * 3])
    batch = noised(Canvas.clean(tokens, document), PerText(), Linear(), 9, ar_share=0.5, generator=generator(seed))
    canvas = batch.canvas
    assert not (canvas.open & (document == 0)).any() and not (batch.ar & (document == 0)).any()
    assert torch.equal(canvas.tokens, torch.where(canvas.open, 9, tokens))
    assert torch.equal(batch.clean, tokens)


def test_the_open_share_is_one_minus_alpha() -> None:
    clean = Canvas.clean(torch.zeros(1, 200_000, dtype=torch.long))
    for schedule in (Linear(), Cosine()):
        t = torch.full((1, 200_000), 0.3)
        share = corrupt(clean, t, torch.rand(1, 200_000, generator=generator(0)), schedule, 1).open.float().mean()
        assert abs(float(share) - float(1 - schedule.alpha(t[0, 0]))) < 0.005


def test_a_coupled_pair_is_one_luck_at_two_times() -> None:
    clean = Canvas.clean(torch.zeros(64, 50, dtype=torch.long))
    batch = noised(clean, PerText(grid=50, draws=2), Linear(), 1, generator=generator(3))
    first, second = batch.canvas.open.chunk(2)
    t1, t2 = batch.t.chunk(2)
    earlier = torch.where(t1 <= t2, first, second)
    later = torch.where(t1 <= t2, second, first)
    assert not (earlier & ~later).any() and (later & ~earlier).any()
    assert torch.equal((batch.t * 50).round() / 50, batch.t) and batch.t.min() > 0 and batch.t.max() <= 1


def test_blocks_have_a_time_each_and_restart_with_every_document() -> None:
    document = torch.tensor([[1] * 6 + [2] * 4, [1] * 10])
    t = PerBlock(4)(Canvas.clean(torch.zeros_like(document), document), generator(0))[0]
    groups = [t[0, :4], t[0, 4:6], t[0, 6:], t[1, :4], t[1, 4:8], t[1, 8:]]
    assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len({float(group[0]) for group in groups}) == 6
    cells = sorted(float(group[0]) for group in groups)
    assert all(abs(b - a - 1 / 6) < 1e-2 for a, b in zip(cells, cells[1:], strict=False))


def test_packed_texts_have_a_time_each() -> None:
    document = torch.tensor([[1] * 6 + [2] * 4, [1] * 10])
    t = PerText(draws=2)(Canvas.clean(torch.zeros_like(document), document), generator(0))
    for draw in t:
        groups = [draw[0, :6], draw[0, 6:], draw[1]]
        assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len(set(t.flatten().tolist())) == 6


def test_a_fixed_time_opens_a_fixed_share() -> None:
    batch = noised(Canvas.clean(torch.zeros(40, 500, dtype=torch.long)), Fixed(), Linear(), 1, generator=generator(0))
    assert set(batch.t.flatten().tolist()) == {torch.tensor(0.15).item()}
    assert abs(float(batch.canvas.open.float().mean()) - 0.15) < 0.01
