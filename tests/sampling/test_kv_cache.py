"""KV caches: an exact cache saves work and changes no prediction."""

from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Rdm, Unmask
from diffusify.diffusion.ranking import Leftmost, Random
from diffusify.diffusion.rng import RowGenerators
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.kv_cache import BlockCache, WindowCache
from diffusify.sampling.sampler import Sampler, denoise
from diffusify.sampling.speculative import Speculative
from tests.families import CAUSAL, MASK, tiny_denoiser

ROWS = [[5, 9, 7, *[None] * 9], [8, *[None] * 5], [4, 11, 3, 6, 2, 9, 10, 12, *[None] * 6], [3, 4, 5, 6, *[None] * 4]]
PATTERNS = [(BlockCausal(4), 1), (BlockCausal(4, clean="block"), 0), (BlockCausal(3), 0), (BlockCausal(1), 1)]


@pytest.mark.parametrize("family", sorted(CAUSAL))
@pytest.mark.parametrize(("pattern", "shift"), PATTERNS, ids=str)
def test_block_cache_gives_the_same_logits(family: str, pattern: BlockCausal, shift: int) -> None:
    """Logits agree up to rounding at every step of a batch whose rows advance at different rates."""
    kernel = "eager" if family == "gemma2" else "sdpa"
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    denoiser = tiny_denoiser(family, pattern, shift, kernel=kernel, **windows)
    cached = BlockCache(denoiser)
    differences: list[float] = []

    class BothDenoisers:
        def __call__(self, canvas: Canvas, *, positions: torch.Tensor):
            actual, expected = cached(canvas, positions=positions), denoiser.predict(canvas, positions=positions)
            finite = expected.logits.isfinite()
            assert torch.equal(finite, actual.logits.isfinite())
            differences.append(float((actual.logits - expected.logits)[finite].abs().max().detach()))
            return expected

    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    window = canvas.position_ids // pattern.size
    policy = Unmask(rank=Random())
    *_, last = Sampler(policy=policy)(BothDenoisers(), canvas, window, noise=MASK)
    assert not last.canvas.open.any() and len(differences) > 4
    assert max(differences) < 1e-5


@pytest.mark.parametrize("policy", [Unmask(), Unmask(rank=Leftmost()), Rdm()])
@pytest.mark.parametrize("pick", [None, Draw(1.0)])
def test_block_cache_gives_the_same_texts(policy, pick) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)

    def text(model) -> torch.Tensor:
        sampler = Sampler(policy=policy, **({"pick": pick} if pick else {}))
        *_, last = sampler(model, canvas, canvas.position_ids // 4, noise=MASK)
        return last.canvas.tokens

    assert torch.equal(text(BlockCache(denoiser)), text(denoiser.predict))


def record_widths(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of positions of each forward pass."""
    widths: list[int] = []
    hidden_states = denoiser.hidden_states

    def spy(inputs, index, *, past=None):
        widths.append(inputs.tokens.shape[1])
        return hidden_states(inputs, index, past=past)

    monkeypatch.setattr(denoiser, "hidden_states", spy)
    return widths


def test_a_finished_block_is_cached_by_the_first_pass_over_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt, a pass runs the current block, and the block before it only if that was just finished."""
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    widths = record_widths(denoiser, monkeypatch)
    canvas = Canvas.from_tokens([[5, 9, 7, 8, 2, 3, *[None] * 10]], noise=MASK, pad=0)
    for _ in Sampler()(BlockCache(denoiser), canvas, canvas.position_ids // 4, noise=MASK):
        pass
    assert widths == [8, 4, 8, 4, 4, 4, 8, 4, 4, 4]


def test_changed_tokens_are_computed_again() -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    cached = BlockCache(denoiser)
    canvas = Canvas.from_tokens([[5, 9, 7, 8, 2, 3, 4, 6, *[None] * 4]], noise=MASK, pad=0)
    cached(canvas, positions=canvas.open)
    for position in (1, 6):
        tokens = canvas.tokens.clone()
        tokens[0, position] += 10
        canvas = replace(canvas, tokens=tokens)
        actual, expected = cached(canvas, positions=canvas.open), denoiser(canvas, positions=canvas.open)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_models_without_a_matching_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="needs block-causal attention"):
        BlockCache(tiny_denoiser("llama", Bidirectional()))
    with pytest.raises(ValueError, match="block models have an exact cache"):
        WindowCache(tiny_denoiser("llama", BlockCausal(4)), "dual")
    with pytest.raises(ValueError, match="has no KV cache"):
        BlockCache(tiny_denoiser("bert", BlockCausal(4, clean="block")))


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_window_cache_refreshed_at_every_pass_is_exact(family: str, kind: Literal["prefix", "dual"]) -> None:
    """Refreshed at every pass it gives the denoiser's texts; a stale cache agrees at the first step of a window."""
    denoiser = tiny_denoiser(family, Bidirectional(), 1)
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    window = canvas.position_ids // 4

    def texts(model) -> list[torch.Tensor]:
        return [frame.canvas.tokens for frame in Sampler()(model, canvas, window, noise=MASK)]

    expected, fresh = texts(denoiser.predict), texts(WindowCache(denoiser, kind, refresh=1))
    assert all(torch.equal(a, b) for a, b in zip(expected, fresh, strict=True))
    stale = texts(WindowCache(denoiser, kind))
    assert len(stale) == len(expected) and torch.equal(stale[0], expected[0])


def test_window_cache_runs_only_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = tiny_denoiser("llama", Bidirectional(), 1)
    widths = record_widths(denoiser, monkeypatch)
    canvas = Canvas.from_tokens([[5, 9, 7, 8, *[None] * 8]], noise=MASK, pad=0)
    for _ in Sampler()(WindowCache(denoiser, "dual"), canvas, canvas.position_ids // 4, noise=MASK):
        pass
    assert widths == [12, 5, 5, 5, 12, 5, 5, 5]  # a window and its left neighbour, which predicts its first position
    widths.clear()
    for _ in Sampler()(WindowCache(denoiser, "prefix"), canvas, canvas.position_ids // 4, noise=MASK):
        pass
    assert widths == [12, 9, 9, 9, 12, 5, 5, 5]


def test_window_cache_is_exact_if_nothing_has_changed() -> None:
    """A pass over the window gives the logits of the full pass before it."""
    denoiser = tiny_denoiser("llama", Bidirectional(), 1)
    canvas = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    positions = canvas.open & (canvas.position_ids < 9)
    for kind in ("prefix", "dual"):
        cached = WindowCache(denoiser, kind)
        full, partial = cached(canvas, positions=positions).logits, cached(canvas, positions=positions).logits
        torch.testing.assert_close(full, denoiser(canvas, positions=positions).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(partial, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_window_cache_of_a_row_is_its_own(kind: Literal["prefix", "dual"]) -> None:
    """Rows leave their windows at different steps; none is refreshed because another is."""
    denoiser = tiny_denoiser("llama", Bidirectional(), 1)
    rows = [[5, 9, 7, *[None] * 20], [8, 4, 11, 6, 2, 9, 3, 7, 12, 4, *[None] * 20]]

    def texts(rows: list) -> list[list[int]]:
        canvas = Canvas.from_tokens(rows, noise=MASK, pad=0)
        *_, last = Sampler()(WindowCache(denoiser, kind, refresh=5), canvas, canvas.position_ids // 8, noise=MASK)
        return [tokens[real].tolist() for tokens, real in zip(last.canvas.tokens, last.canvas.real, strict=True)]

    assert texts(rows) == [texts([row])[0] for row in rows]


@pytest.mark.parametrize("kind", ["block", "window", "lossless"])
def test_equal_rows_share_the_first_pass(kind: str) -> None:
    """Samples of one prompt run it once, and each is the text that it is alone."""
    denoiser, rows = tiny_denoiser("llama", Bidirectional() if kind == "window" else BlockCausal(4), 1), []
    prompt = Canvas.from_tokens(ROWS[2:3], noise=MASK, pad=0)
    denoiser.network.base_model.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))

    def texts(seeds: list[int]) -> list[list[int]]:
        canvas, rng = prompt[torch.zeros(len(seeds), dtype=torch.long)], RowGenerators.from_seeds(seeds)
        if kind == "lossless":
            loop = Speculative(denoiser)
        else:
            model = BlockCache(denoiser) if kind == "block" else WindowCache(denoiser, "dual")
            loop = partial(denoise, model, window_index=canvas.position_ids // 4)
        *_, last = loop(canvas, samplers=[Sampler(pick=Draw(1.0))] * len(seeds), noise=MASK, rng=rng)
        return last.canvas.tokens.tolist()

    together = texts([3, 4, 5])
    assert rows[0] == 1 and max(rows) == 3 and len({tuple(text) for text in together}) > 1
    assert together == [text for seed in (3, 4, 5) for text in texts([seed])]
