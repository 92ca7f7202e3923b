"""Masked spans that are filled in blocks from left to right: one training pass equals many sampling passes."""

from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas, offsets
from diffusify.diffusion.attention import BlockCausal, Causal
from diffusify.diffusion.masked_spans import MaskedSpans, passage
from tests.families import MASK, tiny_denoiser
from tests.text import makers

# One span in each document, of which the last has none.
SPANS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]]).bool()
DOCUMENT = torch.tensor([[1] * 12, [1] * 5 + [2] * 6 + [0]])
TOKENIZER = makers.byte_level()


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


def documents(*texts: str) -> Canvas:
    """A packed row for each text, twice in it, between start and end tokens."""
    ids = [TOKENIZER.document(text) for text in texts]
    n = 2 * max(map(len, ids)) + 20
    pad = [n - 2 * len(row) for row in ids]
    tokens = torch.tensor([2 * row + [TOKENIZER.pad_token_id] * rest for row, rest in zip(ids, pad, strict=True)])
    numbers = [[1] * len(row) + [2] * len(row) + [0] * rest for row, rest in zip(ids, pad, strict=True)]
    return Canvas.clean(tokens, torch.tensor(numbers))


def spans_of(made: Canvas, row: int, number: int) -> tuple[str, str, str]:
    """The text before a document's span, in it, and after it."""
    ids = made.tokens[row, made.document[row] == number].tolist()
    span = made.editable[row, made.document[row] == number].tolist()
    start, end = span.index(True), len(span) - span[::-1].index(True)
    assert span[start:end] == [True] * (end - start) and ids[end - 1] == TOKENIZER.end_token_id
    before, within, after = (
        TOKENIZER.decode(part, continues=True) for part in (ids[:start], ids[start : end - 1], ids[end:])
    )
    assert ids[1:start] == TOKENIZER.encode(before) and ids[start : end - 1] == TOKENIZER.encode(within)
    return before, within, after


@given(
    st.text(st.sampled_from("ab .\n\u00e9"), min_size=1, max_size=40), st.integers(0, 99), st.sampled_from([0.0, 1.0])
)
def test_masked_spans_keep_the_text_and_are_encoded_in_parts(text: str, seed: int, passages: float) -> None:
    clean = documents(text, text + " x")
    make = partial(MaskedSpans(passages), clean, TOKENIZER)
    made = make(generator=torch.Generator().manual_seed(seed))
    for row, whole in enumerate([text, text + " x"]):
        for number in (1, 2):
            assert "".join(spans_of(made, row, number)) == whole
    again = make(generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again.tokens, made.tokens) and torch.equal(again.editable, made.editable)


def test_masked_spans_are_random() -> None:
    text = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)
    clean = documents(*[text] * 64)
    made = MaskedSpans(0.0)(clean, TOKENIZER, generator=torch.Generator().manual_seed(0))
    found = [spans_of(made, row, number) for row in range(64) for number in (1, 2)]
    sizes = sorted(len(span) for _, span, _ in found)
    assert sizes[0] <= 3 and sizes[-1] > 60 and sizes[64] < 30
    assert len({before for before, _, _ in found}) > 30
    answers = replace(clean, editable=clean.real & (offsets(clean.run_starts) > 30) & (clean.document == 1))
    within = MaskedSpans()(answers, TOKENIZER, generator=torch.Generator().manual_seed(0))
    assert not (within.editable & (within.document == 2)).any()
    assert all(len(spans_of(within, row, 1)[0]) >= 29 for row in range(64))
    with pytest.raises(ValueError, match=r"passages=1.5 is a share of the documents, in \[0, 1\]"):
        MaskedSpans(1.5)


def test_a_document_that_starts_inside_a_character_keeps_its_tokens() -> None:
    ids = TOKENIZER.encode("\u3042 b c")[1:]
    clean = Canvas.clean(torch.tensor([[*ids, 0]]), torch.tensor([[1] * len(ids) + [0]]))
    for seed in range(9):
        made = MaskedSpans()(clean, TOKENIZER, generator=torch.Generator().manual_seed(seed))
        assert [i for i in made.tokens[0].tolist() if i != TOKENIZER.end_token_id] == ids
        assert made.editable[0].any()


@pytest.mark.parametrize(
    ("inside", "spans"),
    [
        ("cost", {" It cost 3.5, why?", "It cost 3.5, why?", " It cost 3.5, why?\n", "It cost 3.5, why?\n\n"}),
        ("a.b", {"x = a.b", "\n\nx = a.b\n", "\nx = a.b\n    ", "x = a.b\n    "}),
        ("y", {"\n    y", "    y", "y"}),
    ],
)
def test_passages_are_lines_and_sentences(inside: str, spans: set[str]) -> None:
    text = 'He said: "No." It cost 3.5, why?\n\nx = a.b\n    y'
    start = text.rindex(inside)
    thirds = [0.0, 0.34, 0.67, 0.99]
    found = {text[slice(*passage(text, start, start + 1, [u, v]))] for u in thirds for v in thirds}
    assert spans <= found and {span.strip() for span in found} == {next(iter(spans)).strip()}
