"""Self-speculation writes what greedy decoding by `transformers` writes, in no more forwards."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Causal
from diffusify.diffusion.picking import Draw
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.speculative import Speculative
from tests.families import CAUSAL, MASK, tiny_denoiser

ROWS = [[5, 9, 7, *[None] * 14], [8, *[None] * 5], [4, 11, 3, 6, 2, 9, 10, 12, *[None] * 9]]


def greedy(denoiser: Denoiser, row: list[int | None]) -> list[int]:
    """By `transformers` itself, from the same weights."""
    prompt = torch.tensor([[token for token in row if token is not None]])
    settings = GenerationConfig(
        max_new_tokens=row.count(None), do_sample=False, eos_token_id=-1, pad_token_id=0, suppress_tokens=[MASK]
    )
    generate: Any = denoiser.network.generate
    return generate(prompt, generation_config=settings, attention_mask=torch.ones_like(prompt))[0].tolist()


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_the_text_is_that_of_greedy_decoding(family: str, size: int) -> None:
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, BlockCausal(size), 1, kernel=kernel, **windows)
    room = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    frames = list(Speculative(denoiser)(room, noise=MASK))
    tokens = frames[-1].canvas.tokens
    assert not frames[-1].canvas.open.any()
    for row, made in zip(ROWS, tokens.tolist(), strict=True):
        assert made[: len(row)] == greedy(denoiser, row)
    assert len(frames) <= max(row.count(None) for row in ROWS)
    if size == 1:
        assert len(frames) == 14


def test_good_drafts_save_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose masks say what its text will say writes a whole block a pass."""
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)

    def counting(inputs, wanted, *, past=None):
        """The next token is always one more than the position."""
        positions = inputs.position_ids.flatten()[wanted]
        return torch.nn.functional.one_hot(positions + 2, MASK + 1).float() * 9

    monkeypatch.setattr(denoiser, "project", counting)
    room = Canvas.from_tokens([[1, 2, *[None] * 16], [1, *[None] * 8]], noise=MASK, pad=0)
    *_, last = Speculative(denoiser)(room, noise=MASK)
    assert last.canvas.tokens[0].tolist() == list(range(1, 19))
    assert last.forwards == 5  # 1 + 4 + 4 + 4 + 3


@torch.no_grad()
def test_drawn_texts_follow_the_left_to_right_distribution() -> None:
    """Chi-square of three drawn tokens, each of the three likeliest, against the model's own chain of probabilities."""
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    prompt, draws = [5, 9, 7], 3000

    def next_three(tokens: list[int]) -> dict[int, float]:
        canvas = Canvas.clean(torch.tensor([[*tokens, 0]]))
        logits = denoiser(canvas, attention=Causal()).logits[0, -1]
        kept = (logits / 3.0).softmax(-1).topk(3)
        return dict(zip(kept.indices.tolist(), (kept.values / kept.values.sum()).tolist(), strict=True))

    expected = {
        (a, b, c): p * q * r
        for a, p in next_three(prompt).items()
        for b, q in next_three([*prompt, a]).items()
        for c, r in next_three([*prompt, a, b]).items()
    }
    room = Canvas.from_tokens([[*prompt, None, None, None]] * draws, noise=MASK, pad=0)
    *_, last = Speculative(denoiser, Draw(3.0, top_k=3))(room, noise=MASK)
    seen = Counter(map(tuple, last.canvas.tokens[:, 3:].tolist()))
    assert set(seen) <= set(expected)
    chi2 = sum((seen[text] - draws * share) ** 2 / (draws * share) for text, share in expected.items())
    assert chi2 < 54.1  # 26 degrees of freedom, p = 0.001


def test_a_row_stops_at_its_end_token() -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    row = ROWS[0]
    text = greedy(denoiser, row)
    end = text[8]
    room = Canvas.from_tokens([row], noise=MASK, pad=0)
    *_, last = Speculative(denoiser, end_token_id=end)(room, noise=MASK)
    first = text.index(end, 3)
    assert last.canvas.tokens[0, : first + 1].tolist() == text[: first + 1]
    assert last.canvas.open[0, first + 5 :].all()


def test_what_has_no_left_to_right_half_is_refused() -> None:
    for denoiser in (
        tiny_denoiser("llama", Bidirectional()),
        tiny_denoiser("llama", BlockCausal(4, clean="block"), 0),
        tiny_denoiser("bert", BlockCausal(4, clean="block")),
    ):
        with pytest.raises(ValueError, match="keeps its left-to-right half"):
            Speculative(denoiser)
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    with pytest.raises(ValueError, match="cannot fill holes"):
        next(Speculative(denoiser)(Canvas.from_tokens([[1, None, 2, None]], noise=MASK, pad=0), noise=MASK))


@pytest.mark.parametrize("tolerance", [0.5, 2.0, 99.0])
@torch.no_grad()
def test_a_tolerance_bounds_how_unlikely_each_token_is(tolerance: float) -> None:
    """Every token is as likely, behind what stands before it, as the likeliest there, within the tolerance."""
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    room = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    *_, last = Speculative(denoiser, tolerance=tolerance)(room, noise=MASK)
    *_, exact = Speculative(denoiser)(room, noise=MASK)
    canvas = last.canvas
    logits = denoiser(Canvas.clean(canvas.tokens), attention=Causal()).logits.log_softmax(-1)
    for row, given in enumerate(ROWS):
        for i in range(given.index(None), len(given)):
            told = logits[row, i].max() - logits[row, i, canvas.tokens[row, i]]
            assert told <= tolerance + 1e-4
            torch.testing.assert_close(last.score[row, i], logits[row, i, canvas.tokens[row, i]], atol=1e-4, rtol=0)
    assert last.forwards <= exact.forwards
    if tolerance == 99.0:
        assert last.forwards < exact.forwards  # whatever is drafted is kept
        assert not torch.equal(canvas.tokens, exact.canvas.tokens)


def test_a_tolerance_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance=-1.0 must be at least 0"):
        Speculative(tiny_denoiser("llama", BlockCausal(4), 1), tolerance=-1.0)
