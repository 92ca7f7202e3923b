"""Corruption opens the expected share of the editable positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText, corrupt, noised, stratified
from diffusify.diffusion.schedules import Cosine, Linear


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 60), st.integers(0, 1000))
def test_stratified_has_one_sample_in_every_cell(count: int, seed: int) -> None:
    u = stratified(count, generator(seed)).sort().values
    edges = torch.arange(count + 1) / count
    assert (u >= edges[:-1] - 1e-6).all() and (u <= edges[1:] + 1e-6).all()


@given(st.integers(0, 1000))
def test_only_editable_positions_open_and_the_others_keep_their_tokens(seed: int) -> None:
    tokens = torch.randint(0, 9, (3, 10), generator=generator(seed))
    document = torch.tensor([[1] * 10, [1] * 4 + [2] * 6, [1] * 7 + [0] * 3])
    batch = noised(Canvas.clean(tokens, document), PerText(), Linear(), 9, ar_share=0.5, generator=generator(seed))
    canvas = batch.canvas
    assert not (canvas.open & (document == 0)).any() and not (batch.ar_positions & (document == 0)).any()
    assert torch.equal(canvas.tokens, torch.where(canvas.open, 9, tokens))
    assert torch.equal(batch.clean, tokens)


def test_the_open_share_is_one_minus_alpha() -> None:
    clean = Canvas.clean(torch.zeros(1, 200_000, dtype=torch.long))
    for schedule in (Linear(), Cosine()):
        t = torch.full((1, 200_000), 0.3)
        share = corrupt(clean, t, torch.rand(1, 200_000, generator=generator(0)), schedule, 1).open.float().mean()
        assert abs(float(share) - float(1 - schedule.alpha(t[0, 0]))) < 0.005


def test_coupled_pair_has_the_same_random_numbers_at_two_times() -> None:
    clean = Canvas.clean(torch.zeros(64, 50, dtype=torch.long))
    batch = noised(clean, PerText(grid=50, draws=2), Linear(), 1, generator=generator(3))
    first, second = batch.canvas.open[::2], batch.canvas.open[1::2]
    t1, t2 = batch.t[::2], batch.t[1::2]
    earlier = torch.where(t1 <= t2, first, second)
    later = torch.where(t1 <= t2, second, first)
    assert not (earlier & ~later).any() and (later & ~earlier).any()
    assert torch.equal((batch.t * 50).round() / 50, batch.t) and batch.t.min() > 0 and batch.t.max() <= 1


def test_every_block_has_its_own_time_and_blocks_restart_with_documents() -> None:
    document = torch.tensor([[1] * 6 + [2] * 4, [1] * 10])
    t = PerBlock(4)(Canvas.clean(torch.zeros_like(document), document), generator(0))[0]
    groups = [t[0, :4], t[0, 4:6], t[0, 6:], t[1, :4], t[1, 4:8], t[1, 8:]]
    assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len({float(group[0]) for group in groups}) == 6
    cells = sorted(float(group[0]) for group in groups)
    assert all(abs(b - a - 1 / 6) < 1e-2 for a, b in zip(cells, cells[1:], strict=False))


def test_every_packed_text_has_its_own_time() -> None:
    document = torch.tensor([[1] * 6 + [2] * 4, [1] * 10])
    t = PerText(draws=2)(Canvas.clean(torch.zeros_like(document), document), generator(0))
    for times in t:
        groups = [times[0, :6], times[0, 6:], times[1]]
        assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len(set(t.flatten().tolist())) == 6


def test_spans_open_together_in_half_of_the_texts_and_as_often_as_single_tokens() -> None:
    clean = Canvas.clean(torch.zeros(200, 500, dtype=torch.long))
    batch = noised(clean, PerText(spans=8.0), Linear(), 1, generator=generator(0))
    open = batch.canvas.open
    assert abs(float(open.float().mean()) - 0.5) < 0.02
    middle = (batch.t[:, 0] > 0.4) & (batch.t[:, 0] < 0.6)
    switches = (open[:, 1:] != open[:, :-1]).float().mean(1)[middle]  # half of the pairs of neighbours if independent
    in_spans = switches < 0.25
    assert 0.25 < float(in_spans.float().mean()) < 0.75
    assert abs(float(switches[in_spans].mean()) - 0.5 / 8) < 0.02 and float(switches[~in_spans].min()) > 0.4


def test_later_times_open_a_superset_of_spans_and_spans_end_with_texts() -> None:
    document = torch.arange(100).repeat_interleave(5).expand(4, -1) + 1
    clean = Canvas.clean(torch.zeros(4, 500, dtype=torch.long), document)
    batch = noised(clean, PerText(draws=2, spans=1000.0), Linear(), 1, generator=generator(1))
    first, second = batch.canvas.open[::2], batch.canvas.open[1::2]
    earlier = batch.t[::2] < batch.t[1::2]
    assert torch.equal(first & second, torch.where(earlier, first, second))
    by_text = first.unflatten(1, (100, 5)).float().mean(2)
    assert ((by_text == 0) | (by_text == 1)).float().mean() > 0.5 and len(by_text.unique()) > 2


def test_fixed_time_opens_a_fixed_share() -> None:
    batch = noised(Canvas.clean(torch.zeros(40, 500, dtype=torch.long)), Fixed(), Linear(), 1, generator=generator(0))
    assert set(batch.t.flatten().tolist()) == {torch.tensor(0.15).item()}
    assert abs(float(batch.canvas.open.float().mean()) - 0.15) < 0.01


@given(st.integers(0, 500), st.integers(1, 5))
def test_complement_opens_what_the_first_canvas_does_not(seed: int, size: int) -> None:
    document = torch.tensor([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3])
    clean = Canvas.clean(torch.randint(0, 9, (2, 10), generator=generator(seed)), document)
    batch = noised(clean, PerBlock(size, complement=True), Linear(), 9, ar_share=0.5, generator=generator(seed))
    first, second = batch.canvas.open[::2], batch.canvas.open[1::2]
    assert batch.views == 2 and torch.equal(first ^ second, clean.editable)
    torch.testing.assert_close(batch.t[::2] + batch.t[1::2], torch.ones(2, 10))
    assert torch.equal(batch.text, clean.tokens) and not batch.ar_positions[1::2].any()


def test_tilt_opens_the_ends_of_blocks_and_keeps_the_open_share() -> None:
    clean = Canvas.clean(torch.zeros(200, 64, dtype=torch.long))
    shares = []
    for tilt in (None, 0.1):
        batch = noised(clean, PerBlock(8, tilt=tilt), Linear(), 1, generator=generator(0))
        shares.append(batch.canvas.open.float().view(-1, 8).mean(0))
    even, tilted = shares
    assert (even - 0.5).abs().max() < 0.03 and abs(float(tilted.mean()) - 0.5) < 0.01
    assert (tilted.diff() > 0).all() and tilted[-1] - tilted[0] > 0.3


@given(st.integers(0, 100), st.integers(1, 6))
def test_tilted_block_opens_its_share_of_tokens(seed: int, size: int) -> None:
    clean = Canvas.clean(torch.zeros(3, 12, dtype=torch.long), torch.tensor([[1] * 5 + [2] * 7] * 3))
    batch = noised(clean, PerBlock(size, tilt=0.2), Linear(), 1, generator=generator(seed))
    block = (clean.position_ids % size == 0).flatten().cumsum(0) - 1
    open, t = batch.canvas.open.flatten().float(), batch.t.flatten()
    for n in range(int(block.max()) + 1):
        inside = block == n
        assert abs(float(open[inside].sum() - t[inside].sum())) < 1
