"""Rows that are finished take no part in further forward passes, and the others do not notice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Draw, Greedy
from diffusify.diffusion.rng import RowGenerators
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.sampler import Frame, Sampler, denoise
from diffusify.sampling.speculative import Speculative
from diffusify.serving.engine.batching import PassBatcher
from tests.families import MASK, tiny_denoiser

LENGTHS = [2, 14, 1, 5, 9, 2]
ROWS = [[3 + i, 9, 7 + i, *[None] * length] for i, length in enumerate(LENGTHS)]
SAMPLERS = [Sampler(), Sampler(Draw(1.0)), Sampler(Draw(0.8, top_k=5)), Sampler(), Sampler(Draw(1.0)), Sampler()]

generators = RowGenerators.from_seeds


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each forward pass."""
    found: list[int] = []
    run = Denoiser.hidden_states

    def counted(self: Denoiser, inputs: Any, index: Any, **options: Any) -> Any:
        found.append(len(inputs.tokens))
        return run(self, inputs, index, **options)

    monkeypatch.setattr(Denoiser, "hidden_states", counted)
    return found


def alone(denoiser: Denoiser, row: int, tolerance: float = 0.0) -> list[int]:
    canvas = Canvas.from_tokens([ROWS[row]], noise=MASK, pad=0)
    *_, last = Speculative(denoiser, tolerance)(canvas, [SAMPLERS[row]], noise=MASK, rng=generators([row]))
    return last.canvas.tokens[0].tolist()


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_lossless_decoding_runs_unfinished_rows_only(rows_run: list[int], tolerance: float) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4))
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    frames = list(Speculative(denoiser, tolerance)(canvas, SAMPLERS, noise=MASK, rng=generators([*range(6)])))
    assert rows_run == sorted(rows_run, reverse=True) and rows_run[0] == 6 and rows_run[-1] < 3
    for frame in frames:
        assert frame.canvas.tokens.shape == canvas.tokens.shape and len(frame.settled) == len(frame.score) == 6
    for row, before in enumerate(ROWS):
        text = alone(denoiser, row, tolerance)
        assert frames[-1].canvas.tokens[row, : len(text)].tolist() == text
        assert frames[-1].settled[row] == len(before)


def test_a_row_that_the_caller_ends_is_not_run(rows_run: list[int]) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4))
    steps = Speculative(denoiser)(Canvas.from_tokens(ROWS, noise=MASK, pad=0), SAMPLERS, noise=MASK)
    frame, ended = next(steps), []
    while True:
        longest = int(frame.canvas.open.sum(1).argmax())
        ended.append((longest, frame.canvas.tokens[longest, : int(frame.settled[longest])].tolist()))
        try:
            frame = steps.send(frame.canvas.end_row(longest, ended[-1][1][3:]))
        except StopIteration:
            break
    assert len(rows_run) < max(LENGTHS) and rows_run[-1] < 6
    for row, text in ended[:2]:  # what was written stays
        assert frame.canvas.tokens[row, : len(text)].tolist() == text and not frame.canvas.open[row].any()


@pytest.mark.parametrize("lossless", [True, False])
def test_an_observer_sees_the_rows_of_the_batch(rows_run: list[int], lossless: bool) -> None:
    """Rows with other settings, which are decoded in a group of their own, are seen at their place, too."""
    denoiser, seen = tiny_denoiser("llama", BlockCausal(4)), []

    def observe(write: Tensor, logits: LazyLogits) -> None:
        assert int(write.sum()) == len(logits)
        seen.append(write)

    samplers = [Sampler(pick=Draw(1.0) if row % 2 else Greedy(), observer=observe) for row in range(len(ROWS))]
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    if lossless:
        list(Speculative(denoiser)(canvas, samplers, noise=MASK))
        assert set(rows_run) == {6}
    else:
        list(denoise(denoiser.predict, canvas, samplers, noise=MASK))
    assert torch.equal(torch.stack(seen).sum(0).bool(), canvas.open)


def test_candidates_of_a_served_text_keep_their_cache() -> None:
    """Several rows of one loop, which share a pass with another one, are left out one after the other."""
    denoiser = tiny_denoiser("llama", BlockCausal(4))
    batcher, found = PassBatcher(denoiser), {}

    def work(rows: list[int]) -> None:
        canvas = Canvas.from_tokens([ROWS[row] for row in rows], noise=MASK, pad=0)
        samplers = [SAMPLERS[row] for row in rows]
        frames: list[Frame] = list(Speculative(batcher.denoiser)(canvas, samplers, noise=MASK, rng=generators(rows)))
        for row, tokens in zip(rows, frames[-1].canvas.tokens.tolist(), strict=True):
            found[row] = tokens

    batcher.join(lambda: work([0, 1, 2, 3]))
    batcher.join(lambda: work([4, 5]))
    while batcher.loops:
        batcher.advance()
    for row in range(6):
        text = alone(denoiser, row)
        assert found[row][: len(text)] == text


def test_texts_that_are_finished_before_the_first_pass_are_not_run(rows_run: list[int]) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4))
    canvas = Canvas.from_tokens([[3, 9, 7], [4, 9, 8], ROWS[1], ROWS[3]], noise=MASK, pad=0)
    samplers = [Sampler(), Sampler(), SAMPLERS[1], SAMPLERS[3]]
    batcher, found = PassBatcher(denoiser), []

    def work() -> None:
        for model in (batcher.denoiser, denoiser):
            *_, last = Speculative(model)(canvas, samplers, noise=MASK, rng=generators([0, 0, 1, 3]))
            found.append(last.canvas.tokens.tolist())

    batcher.join(work)
    while batcher.loops:
        batcher.advance()
    assert found[0] == found[1] and max(rows_run) == 2
    for row, tokens in ((1, found[0][2]), (3, found[0][3])):
        text = alone(denoiser, row)
        assert tokens[: len(text)] == text


def test_rows_without_requested_positions_are_not_run(rows_run: list[int]) -> None:
    denoiser = tiny_denoiser("llama", Bidirectional())
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    positions = canvas.open & (torch.tensor(LENGTHS) > 4)[:, None]
    logits = denoiser.predict(canvas, positions=positions).logits
    assert rows_run == [3]
    torch.testing.assert_close(logits, denoiser(canvas, positions=positions).logits)
