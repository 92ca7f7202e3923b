"""Self-speculative decoding gives the text of AR decoding by `transformers` in no more forward passes."""

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Causal
from diffusify.diffusion.picking import Draw
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.sampler import Sampler
from diffusify.sampling.speculative import Speculative
from tests.families import CAUSAL, MASK, tiny_denoiser, tiny_network

ROWS = [[5, 9, 7, *[None] * 10], [8, *[None] * 5], [4, 11, 3, 6, 2, 9, 10, 12, *[None] * 7]]


@lru_cache
def network(family: str) -> PreTrainedModel:
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    return tiny_network(family, kernel="eager" if family == "gemma2" else "sdpa", **windows)


@lru_cache
def greedy_texts(family: str) -> list[list[int]]:
    """The greedy continuations of `ROWS`."""
    return [greedy(network(family), row) for row in ROWS]


def block_denoiser(size: int = 4, family: str = "llama") -> Denoiser:
    config = DiffusionConfig(MASK, 1, BlockCausal(size), type(network(family)).__name__)
    return Denoiser(network(family), config).eval()


def greedy(network: PreTrainedModel, row: list[int | None]) -> list[int]:
    """Greedy decoding by `transformers` with the same weights."""
    prompt = torch.tensor([[token for token in row if token is not None]])
    settings = GenerationConfig(
        max_new_tokens=row.count(None), do_sample=False, eos_token_id=-1, pad_token_id=0, suppress_tokens=[MASK]
    )
    generate: Any = network.generate
    return generate(prompt, generation_config=settings, attention_mask=torch.ones_like(prompt))[0].tolist()


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_the_text_equals_greedy_decoding(family: str, size: int) -> None:
    denoiser = block_denoiser(size, family)
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    frames = list(Speculative(denoiser)(canvas, noise=MASK))
    tokens = frames[-1].canvas.tokens
    assert not frames[-1].canvas.open.any()
    for actual, expected in zip(tokens.tolist(), greedy_texts(family), strict=True):
        assert actual[: len(expected)] == expected
    assert len(frames) <= max(row.count(None) for row in ROWS)
    if size == 1:
        assert len(frames) == 10


def test_correct_drafts_save_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose drafts are always correct generates a whole block per pass."""
    denoiser = block_denoiser()

    def next_integer(inputs, index, *, past=None):
        """Hidden states that are the logits of a model that predicts token i + 1 at position i."""
        position_ids = inputs.position_ids.flatten()[index]
        return torch.nn.functional.one_hot(position_ids + 2, MASK + 1).float() * 9

    monkeypatch.setattr(denoiser, "hidden_states", next_integer)
    monkeypatch.setattr(denoiser, "project", lambda hidden: hidden)
    canvas = Canvas.from_tokens([[1, 2, *[None] * 16], [1, *[None] * 8]], noise=MASK, pad=0)
    *_, last = Speculative(denoiser)(canvas, noise=MASK)
    assert last.canvas.tokens[0].tolist() == list(range(1, 19))
    assert last.forwards <= 8  # of 16; the first pass has no drafts, and later ones have as many as seem worthwhile


@torch.no_grad()
def test_sampled_texts_follow_the_ar_distribution() -> None:
    """Chi-square test of three tokens with top_k = 3 against the probabilities of the AR model."""
    denoiser = block_denoiser()
    prompt, samples = [5, 9, 7], 3000

    def top_three(tokens: list[int]) -> dict[int, float]:
        canvas = Canvas.clean(torch.tensor([[*tokens, 0]]))
        logits = denoiser(canvas, attention=Causal()).logits[0, -1]
        top = (logits / 3.0).softmax(-1).topk(3)
        return dict(zip(top.indices.tolist(), (top.values / top.values.sum()).tolist(), strict=True))

    expected = {
        (a, b, c): p * q * r
        for a, p in top_three(prompt).items()
        for b, q in top_three([*prompt, a]).items()
        for c, r in top_three([*prompt, a, b]).items()
    }
    canvas = Canvas.from_tokens([[*prompt, None, None, None]] * samples, noise=MASK, pad=0)
    *_, last = Speculative(denoiser)(canvas, [Sampler(Draw(3.0, top_k=3))], noise=MASK)
    counts = Counter(map(tuple, last.canvas.tokens[:, 3:].tolist()))
    assert set(counts) <= set(expected)
    chi2 = sum((counts[text] - samples * p) ** 2 / (samples * p) for text, p in expected.items())
    assert chi2 < 54.1  # 26 degrees of freedom, p = 0.001


def test_a_row_stops_at_its_end_token() -> None:
    denoiser = block_denoiser()
    row = ROWS[0]
    text = greedy_texts("llama")[0]
    end = text[8]
    canvas = Canvas.from_tokens([row], noise=MASK, pad=0)
    *_, last = Speculative(denoiser)(canvas, [Sampler(end_token_id=end)], noise=MASK)
    first = text.index(end, 3)
    assert last.canvas.tokens[0, : first + 1].tolist() == text[: first + 1]
    assert last.canvas.open[0, first + 5 :].all()


def test_models_without_an_ar_half_are_refused() -> None:
    for denoiser in (
        tiny_denoiser("llama", Bidirectional()),
        tiny_denoiser("llama", BlockCausal(4, clean="block"), 0),
        tiny_denoiser("bert", BlockCausal(4, clean="block")),
    ):
        with pytest.raises(ValueError, match="keeps its AR half"):
            Speculative(denoiser)
    denoiser = block_denoiser()
    with pytest.raises(ValueError, match="cannot infill"):
        next(Speculative(denoiser)(Canvas.from_tokens([[1, None, 2, None]], noise=MASK, pad=0), noise=MASK))


@pytest.mark.parametrize("tolerance", [0.5, 2.0, 99.0])
@torch.no_grad()
def test_every_token_is_within_the_tolerance(tolerance: float) -> None:
    """Given the tokens before it, no token is less likely than the most likely one by more than the tolerance."""
    denoiser = block_denoiser()
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    *_, last = Speculative(denoiser, tolerance=tolerance)(canvas, noise=MASK)
    *_, exact = Speculative(denoiser)(canvas, noise=MASK)
    canvas = last.canvas
    logits = denoiser(Canvas.clean(canvas.tokens), attention=Causal()).logits.log_softmax(-1)
    for row, given in enumerate(ROWS):
        for i in range(given.index(None), len(given)):
            gap = logits[row, i].max() - logits[row, i, canvas.tokens[row, i]]
            assert gap <= tolerance + 1e-4
            torch.testing.assert_close(last.score[row, i], logits[row, i, canvas.tokens[row, i]], atol=1e-4, rtol=0)
    assert last.forwards <= exact.forwards
    if tolerance == 99.0:
        assert last.forwards < exact.forwards  # every draft is accepted
        assert not torch.equal(canvas.tokens, exact.canvas.tokens)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance=-1.0 must be at least 0"):
        Speculative(block_denoiser(), tolerance=-1.0)
