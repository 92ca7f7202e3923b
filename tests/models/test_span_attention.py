"""Masked spans that are filled in blocks from left to right: one training pass equals many sampling passes."""

from typing import Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal, Causal
from diffusify.diffusion.masked_spans import MaskedSpans
from tests.families import MASK, tiny_denoiser
from tests.text import makers

# One span in each document, of which the last has none.
SPANS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]]).bool()
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
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_span_is_the_ar_model_behind_the_text_after_it_and_the_text_before_it(family: str) -> None:
    denoiser = tiny_denoiser(family, BlockCausal(1, sides="both"))
    clean = texts(2, 12)
    canvas = Canvas(clean, torch.zeros_like(SPANS), SPANS, DOCUMENT)
    logits, places = denoiser(canvas).logits, canvas.reading_order()[0]
    for row, document in ((0, 1), (1, 1), (1, 2)):
        at = (DOCUMENT[row] == document).nonzero()[:, 0]
        order = at[places[row, at].argsort()]
        assert places[row, order].tolist() == list(range(len(order)))
        ar = denoiser(Canvas.clean(clean[row, order][None]), attention=Causal()).logits[0]
        span = SPANS[row, order]
        torch.testing.assert_close(logits[row, order][span], ar[span], atol=1e-5, rtol=1e-5)


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
def test_later_spans_are_not_seen() -> None:
    """The first span with open positions is filled; the text around later ones is seen, and they are not."""
    denoiser = tiny_denoiser("llama", BlockCausal(1, sides="both"))
    rows = [[5, 9, None, None, 4, 6, None, None, 7], [5, 9, 3, 8, 4, 6, None, None, 7]]
    changed = [[5, 9, None, None, 4, 6, None, None, 2], [5, 9, 3, 2, 4, 6, None, None, 7]]
    for row, other, first in zip(rows, changed, (2, 6), strict=True):
        canvas = Canvas.from_tokens([row], noise=MASK, pad=0)
        logits = denoiser(canvas).logits[0, first]
        noise = Canvas(torch.where(canvas.open, 1, canvas.tokens), canvas.open, canvas.editable, canvas.document)
        noise.tokens[0, first] = MASK
        assert torch.equal(denoiser(noise).logits[0, first], logits)
        assert not torch.equal(denoiser(Canvas.from_tokens([other], noise=MASK, pad=0)).logits[0, first], logits)


def test_masked_spans_are_random_and_end() -> None:
    tokens = texts(64, 96)
    document = torch.cat([torch.full((64, 40), 1), torch.full((64, 40), 2), torch.zeros(64, 16)], 1).long()
    clean, nowhere = Canvas.clean(tokens, document), torch.zeros(64, 96, dtype=torch.bool)
    made = MaskedSpans()(clean, END, nowhere, generator=torch.Generator().manual_seed(0))
    spans = made.run_starts & made.editable
    assert (spans.sum(1) == 2).all()
    sizes = made.editable.sum(1)
    assert sizes.min() <= 8 and sizes.max() > 40
    for row in range(64):
        ends = made.editable[row] & (made.tokens[row] == END)
        assert int(ends.sum()) == 2 and not (made.editable & ~made.run_starts)[row, 1:][ends[:-1]].any()
        for number in (1, 2):
            mine = (made.document[row] == number) & ~ends
            assert torch.equal(made.tokens[row, mine], tokens[row, document[row] == number])
    again = MaskedSpans()(clean, END, nowhere, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, made.tokens)
    answers = Canvas(tokens, clean.open, (torch.arange(96) % 40 > 30) & clean.real, document)
    within = MaskedSpans()(answers, END, nowhere, generator=torch.Generator().manual_seed(0))
    assert (within.editable & (within.tokens != END)).sum(1).max() <= 18
    with pytest.raises(ValueError, match=r"passages=1.5 is a share of the documents, in \[0, 1\]"):
        MaskedSpans(1.5)


def test_masked_spans_are_whole_passages() -> None:
    tokens, starts = texts(64, 60), (torch.arange(60) % 7 == 3).expand(64, 60)
    clean = Canvas.clean(tokens, (torch.arange(60) // 30 + 1).expand(64, 60))
    made = MaskedSpans(passages=1.0)(clean, END, starts, generator=torch.Generator().manual_seed(1))
    places = set()
    for row in range(64):
        ends = made.editable[row] & (made.tokens[row] == END)
        text = made.tokens[row][~ends][: len(tokens[row])]
        span = made.editable[row][~ends]
        edges = span & made.run_starts[row][~ends]
        edges[1:] |= ~span[1:] & span[:-1]
        assert torch.equal(text, tokens[row][: len(text)])
        places |= set(edges.nonzero()[:, 0].tolist())
    assert len(places) > 6 and all(place % 7 == 3 or place % 30 == 0 for place in places)


def test_passages_are_lines_and_sentences() -> None:
    tokenizer = makers.byte_level()
    text = 'He said: "No." It cost 3.5, why?\n\nx = a.b\n  y'
    ids = tokenizer.encode(text)
    parts = [tokenizer.decode([i], continues=True) for i in ids]
    starts = "".join("|" * is_start + part for is_start, part in zip(tokenizer.passage_starts(ids), parts, strict=True))
    assert starts.replace("|\n", "\n") == 'He said: "No."| It cost 3.5, why?\n\nx = a.b\n  y'
    assert starts.count("|") == (text.count(" It") + sum("\n" in part for part in parts))
