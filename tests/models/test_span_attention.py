"""Masked spans that are filled in blocks from left to right: one training pass equals many sampling passes."""

from typing import Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal, Causal
from diffusify.diffusion.masked_spans import MaskedSpans
from tests.families import MASK, tiny_denoiser

SPANS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0]]).bool()
DOCUMENT = torch.tensor([[1] * 12, [1] * 5 + [2] * 6 + [0]])
END = 1


def texts(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, MASK, (b, n), generator=torch.Generator().manual_seed(seed))


def noisy(clean: torch.Tensor, open: torch.Tensor) -> Canvas:
    return Canvas(torch.where(open, MASK, clean), open=open, editable=SPANS, document=DOCUMENT)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "modernbert"])
@pytest.mark.parametrize("half", ["token", "block"])
@pytest.mark.parametrize("noise", ["full", "causal"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_training_pass_equals_filling_spans_block_by_block(
    family: str, half: Literal["token", "block"], noise: Literal["full", "causal"], size: int
) -> None:
    denoiser = tiny_denoiser(family, BlockCausal(size, half, noise, sides="both"))
    clean = texts(2, 12, seed=size)
    positions = SPANS & (torch.rand(2, 12, generator=torch.Generator().manual_seed(size)) < 0.6)
    together = torch.full((2, 12, 48), torch.nan)
    together[positions] = denoiser(noisy(clean, positions), clean, positions=positions).logits
    block = noisy(clean, positions).block_starts(size, of_spans=True).cumsum(1)
    for number in block[positions].unique():
        current = positions & (block == number)
        alone = denoiser(noisy(clean, current | (SPANS & (block > number))), positions=current).logits
        torch.testing.assert_close(alone, together[current], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_spans_see_all_given_text_and_earlier_spans_only() -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(1, sides="both"))
    clean = texts(1, 12)
    canvas = Canvas(clean, torch.zeros_like(SPANS[:1]), SPANS[:1], DOCUMENT[:1])
    before = denoiser(canvas).logits
    for position in range(12):
        changed = clean.clone()
        changed[0, position] = clean[0, position] % (MASK - 1) + 1
        other = denoiser(Canvas(changed, canvas.open, canvas.editable, canvas.document)).logits
        differs = (other != before).any(-1) & SPANS[:1]
        later = (torch.arange(12) > position) & ~canvas.block_starts(12, of_spans=True)
        # A given token predicts the first token of a span, and attends to no other span.
        assert torch.equal(differs, SPANS[:1] & (later | ~SPANS[:1, position, None])), position


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_without_text_behind_the_span_it_is_the_ar_model(size: int) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(size, sides="both"))
    clean, document = texts(2, 12), torch.ones(2, 12, dtype=torch.long)
    answer = torch.arange(12).expand(2, 12) >= torch.tensor([[3], [6]])
    canvas = Canvas(clean, torch.zeros_like(answer), answer, document)
    ar = denoiser(canvas, attention=Causal()).logits
    torch.testing.assert_close(denoiser(canvas).logits[answer], ar[answer], atol=1e-5, rtol=1e-5)
    halves = denoiser(canvas, clean, positions=canvas.open, ar_positions=answer)
    torch.testing.assert_close(halves.ar_logits, ar[answer], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_gap_behind_a_span_equals_positions_that_are_still_open() -> None:
    """In training nothing stands where a span of unknown length is longer than its text."""
    denoiser = tiny_denoiser("llama", BlockCausal(4, sides="both"))
    clean = texts(1, 12)
    span = (torch.arange(12) >= 3) & (torch.arange(12) < 9)
    gap = (torch.arange(12) >= 6) & (torch.arange(12) < 9)
    document = torch.ones(1, 12, dtype=torch.long)
    trained = Canvas(clean, torch.zeros_like(span[None]), (span & ~gap)[None], torch.where(gap, 0, document))
    sampled = Canvas(torch.where(gap, MASK, clean), gap[None], span[None], document)
    assert torch.equal(trained.position_ids[:, ~gap], sampled.position_ids[:, ~gap])
    known = (span & ~gap)[None]
    one_by_one = BlockCausal(1, sides="both")
    together = denoiser(trained, clean, positions=torch.zeros_like(known), ar_positions=known, attention=one_by_one)
    torch.testing.assert_close(
        together.ar_logits, denoiser(sampled, attention=one_by_one).logits[known], atol=1e-5, rtol=1e-5
    )


def test_masked_spans_end_where_the_text_after_them_has_moved() -> None:
    tokens = texts(64, 96)
    clean = Canvas.clean(tokens, torch.cat([torch.full((64, 48), 1), torch.full((64, 48), 2)], 1))
    spans = MaskedSpans(share=0.5, longest=16)(clean, END, generator=torch.Generator().manual_seed(0))
    ends = spans.editable & (spans.tokens == END)
    assert ends.any() and (spans.real & ~ends).any(1).all()
    assert 0.4 < spans.editable.sum() / spans.real.sum() < 0.6
    for row in range(64):
        text = spans.tokens[row][spans.real[row] & ~ends[row]]
        assert torch.equal(text, tokens[row, : len(text)])  # nothing is lost or moved but by gaps
    again = MaskedSpans(share=0.5, longest=16)(clean, END, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, spans.tokens)
    for share, longest in ((0.0, 8), (1.0, 8), (0.5, 0)):
        with pytest.raises(ValueError, match="must be"):
            MaskedSpans(share, longest)
