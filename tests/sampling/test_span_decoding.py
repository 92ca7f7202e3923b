"""Lossless decoding of masked spans: the text of the AR half with both sides in sight, in fewer forward passes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal, Causal
from diffusify.diffusion.span_ends import SpanEnds
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.reranking import ar_log_likelihood
from diffusify.sampling.sampler import Frame
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.sampling.speculative import Speculative
from tests.families import CAUSAL, MASK, tiny_denoiser
from tests.text import makers

Row = list[int | None]
OPEN: Row = [None]
ROWS: list[Row] = [
    [5, 9, *OPEN * 7, 4, 6, 7, *OPEN * 3, 11, 3, 9],
    [8, *OPEN * 4, 2, *OPEN * 5, 12],
    [4, 11, 3, 6, *OPEN * 6],
]
END = 13


def span_denoiser(size: int = 4, family: str = "llama") -> Denoiser:
    kernel = "eager" if family == "gemma2" else "sdpa"
    return tiny_denoiser(family, BlockCausal(size, sides="both"), kernel=kernel)


def log_prob(denoiser: Denoiser, text: Row, more: Row) -> float:
    """The log-probability of more tokens after a text that is read in its order."""
    canvas = Canvas.from_tokens([text + more], noise=MASK, pad=0)
    logits = denoiser(canvas, attention=Causal()).logits[0].log_softmax(-1)
    return sum(float(logits[i, token]) for i, token in enumerate(more, len(text)) if token is not None)


@torch.no_grad()
def fill(denoiser: Denoiser, row: Row, surplus: Sequence[int] = (), end: int | None = None) -> list[int]:
    """The greedy text of a row, token by token, each from a forward pass over the whole row.

    A span whose `surplus` allows it ends where the end token is likely, and the text behind it after its own; then what
    is left of it goes.
    """
    row, left = list(row), [*surplus] or [0] * len(row)
    editable = [token is None for token in row]
    is_open, ends = 1.0, dict[int, float]()  # the probability that the span is longer, and those of its ends
    while None in row:
        at = row.index(None)
        canvas = Canvas.from_tokens([row], noise=MASK, pad=0)
        canvas = replace(canvas, editable=torch.tensor([editable]))
        logits = denoiser(canvas, attention=BlockCausal(1, sides="both")).logits[0, at]
        stop = next((i for i in range(at, len(row)) if row[i] is not None), len(row))
        if end is not None and stop - at <= left[at]:
            probability = float(logits.softmax(-1)[end])
            ends[at] = is_open * probability
            is_open *= 1 - probability
            if max(ends.values()) >= 0.3 * is_open or stop - at == 1:
                known = row[stop : [*row, None].index(None, stop)][:16]
                likeliest = sorted(ends, key=lambda cut: -ends[cut])[:12]
                cut = max(likeliest, key=lambda cut: math.log(ends[cut]) + log_prob(denoiser, row[:cut], known) / 2)
                del row[cut:stop], editable[cut:stop], left[cut:stop]
                is_open, ends = 1.0, {}
                continue
        if end is not None:
            logits[end] = -torch.inf
        row[at] = int(logits.argmax())
    return [token for token in row if token is not None]


def texts(frames: list[Frame]) -> list[list[int]]:
    canvas = frames[-1].canvas
    assert not canvas.open.any()
    return [tokens[real].tolist() for tokens, real in zip(canvas.tokens, canvas.real, strict=True)]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_spans_are_those_of_decoding_token_by_token(family: str, size: int) -> None:
    denoiser = span_denoiser(size, family)
    frames = list(Speculative(denoiser)(Canvas.from_tokens(ROWS, noise=MASK, pad=0), noise=MASK))
    assert texts(frames) == [fill(denoiser, row) for row in ROWS]
    assert len(frames) <= 10  # the largest number of open positions


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_spans_end_where_that_is_likeliest(data: st.DataObject) -> None:
    denoiser = span_denoiser()
    rows, surplus = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        row: Row = [data.draw(st.integers(2, 12))]
        may_lose = [0]
        for _ in range(data.draw(st.integers(1, 3))):
            length = data.draw(st.integers(1, 8))
            given = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=5))
            row += [*OPEN * length, *given]
            may_lose += [data.draw(st.integers(0, length))] * length + [0] * len(given)
        rows.append(row)
        surplus.append(may_lose)
    head = denoiser.network.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    before = head.weight[END].clone()
    head.weight.data[END] = 1.2 * head.weight.data[data.draw(st.integers(2, 12))]  # so that spans do end
    width = max(map(len, surplus))
    padded = torch.tensor([each + [0] * (width - len(each)) for each in surplus])
    ends = SpanEnds.of_spans(padded, END, torch.zeros(len(rows), dtype=torch.bool))
    canvas = Canvas.from_tokens(rows, noise=MASK, pad=0)
    frames = list(Speculative(denoiser)(canvas, noise=MASK, span_ends=ends))
    expected = [fill(denoiser, row, each, END) for row, each in zip(rows, surplus, strict=True)]
    head.weight.data[END] = before
    assert texts(frames) == expected
    for old, frame in zip([Frame(canvas, frames[0].score, 0, frames[0].settled), *frames], frames, strict=False):
        if frame.columns is not None:  # what was given stays, at the place where the frame says
            was = frame.columns.take(old.canvas.tokens)
            kept = frame.canvas.real & ~frame.canvas.editable
            assert torch.equal(frame.canvas.tokens[kept], was[kept])
        for tokens, settled, text in zip(frame.canvas.tokens, frame.settled.tolist(), expected, strict=True):
            assert tokens[:settled].tolist() == text[:settled]  # what is called final is so


def span_lm() -> DiffusionLM:
    lm = DiffusionLM(
        tiny_denoiser("llama", BlockCausal(4), vocab_size=320, max_position_embeddings=256), makers.byte_level()
    )
    lm.denoiser.diffusion_config = replace(lm.config, infilling=BlockCausal(4, sides="both"))
    return lm


def test_spans_of_a_text_have_an_allowed_length() -> None:
    lm = span_lm()
    run = lm.prepare_infilling(["The [[4]] on the[[2-9]] mat", "so [[...]]it is"] * 8, SamplingConfig(temperature=50.0))
    results = run.results()
    assert run.resizes and len({result.tokens for result in results[1::2]}) > 1
    for row, result in enumerate(results):
        given = run.canvas.real[row] & ~run.canvas.editable[row]
        assert int(given.sum()) + result.tokens == int(run.canvas.real[row].sum())
        assert 6 <= result.tokens <= 13 if row % 2 == 0 else result.tokens <= 64
        assert result.text.endswith(" mat" if row % 2 == 0 else "it is")
    assert lm.infill("The [[4]] mat").tokens == 4


def test_what_follows_a_shorter_span_is_sampled_with_its_own_random_numbers() -> None:
    lm = span_lm()
    results = lm.infill(["so [[2-9]]it is [[2]] or not"] * 12, temperature=50.0)
    assert len({result.spans[1] for result in results if result.spans}) > 10


def test_spans_are_also_denoised_block_by_block() -> None:
    """Settings of denoising steps select diffusion decoding, which tries several lengths where they are not told."""
    lm = span_lm()
    told = lm.infill("The [[6]] mat", steps=6)
    assert told.tokens == 6 and told.forwards <= 6
    assert lm.prepare_infilling(["The [[3-12]] mat"], SamplingConfig(threshold=0.5)).num_candidates == 8


@pytest.mark.parametrize("text", ["The [[6]] mat", "The [[3-12]] mat"])
def test_the_likeliest_of_several_fillings_is_kept(text: str) -> None:
    """The first filling is the text without reranking, and the others are sampled."""
    lm = span_lm()
    run = lm.prepare_infilling([text], SamplingConfig(rerank=6, seed=5))
    (result,) = run.results()
    fillings = [lm.read(run.canvas[row : row + 1]) for row in range(6)]
    assert run.num_candidates == 6 and run.resizes == ("-" in text)
    assert 3 <= result.tokens <= 12 if run.resizes else result.tokens == 6
    assert fillings[0] == lm.infill(text).text and len(set(fillings)) > 1
    assert result.text == fillings[int(ar_log_likelihood(lm.denoiser, run.canvas).argmax())] and result.seed == 5
    assert lm.infill(text, rerank=6, seed=5).text == result.text
    sampled = lm.prepare_infilling([text], SamplingConfig(rerank=2, seed=5, temperature=0.5))
    sampled.results()
    assert lm.read(sampled.canvas[1:]) == fillings[1]  # the same seed and temperature


def test_settings_that_do_not_fit_spans_or_continuations_are_refused() -> None:
    lm = span_lm()
    with pytest.raises(ValueError, match="rerank=4 is for masked spans"):
        lm.generate("The cat", 4, rerank=4)
    with pytest.raises(ValueError, match="which ends masked spans of unknown length"):
        lm.infill("The [[...]] mat", suppress_tokens=(lm.tokenizer.end_token_id,))


def test_a_model_of_one_side_refuses_spans() -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4))
    with pytest.raises(ValueError, match="cannot infill"):
        next(Speculative(denoiser)(Canvas.from_tokens([ROWS[0]], noise=MASK, pad=0), noise=MASK))
