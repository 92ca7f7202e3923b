"""Law 5: the cache changes how much work is done, and nothing else."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Rdm, Unmask
from diffusify.diffusion.ranking import Leftmost, Random
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.kv_cache import BlockCache, WindowCache
from diffusify.sampling.sampler import Sampler
from tests.families import CAUSAL, MASK, tiny_denoiser

ROWS = [[5, 9, 7, *[None] * 13], [8, *[None] * 5], [4, 11, 3, 6, 2, 9, 10, 12, *[None] * 9], [3, 4, 5, 6, *[None] * 4]]
PATTERNS = [(BlockCausal(4), 1), (BlockCausal(4, clean="block"), 0), (BlockCausal(3), 0), (BlockCausal(1), 1)]


@pytest.mark.parametrize("family", sorted(CAUSAL))
@pytest.mark.parametrize(("pattern", "shift"), PATTERNS, ids=str)
def test_cached_answers_are_the_answers(family: str, pattern: BlockCausal, shift: int) -> None:
    """At every step of a batch whose rows go at their own paces, logits agree to rounding."""
    kernel = "eager" if family == "gemma2" else "sdpa"
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    denoiser = tiny_denoiser(family, pattern, shift, kernel=kernel, **windows)
    cached = BlockCache(denoiser)
    worst: list[float] = []

    class Both:
        def __call__(self, canvas: Canvas, *, positions: torch.Tensor):
            ours, plain = cached(canvas, positions=positions), denoiser.predict(canvas, positions=positions)
            finite = plain.logits.isfinite()
            assert torch.equal(finite, ours.logits.isfinite())
            worst.append(float((ours.logits - plain.logits)[finite].abs().max().detach()))
            return plain

    room = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    window = room.position_ids // pattern.size
    policy = Unmask(rank=Random())
    *_, last = Sampler(policy=policy)(Both(), room, window, noise=MASK)
    assert not last.canvas.open.any() and len(worst) > 4
    assert max(worst) < 1e-5


@pytest.mark.parametrize("policy", [Unmask(), Unmask(rank=Leftmost()), Rdm()])
@pytest.mark.parametrize("pick", [None, Draw(1.0)])
def test_cached_texts_are_the_texts(policy, pick) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    room = Canvas.from_tokens(ROWS, noise=MASK, pad=0)

    def text(model) -> torch.Tensor:
        sampler = Sampler(policy=policy, **({"pick": pick} if pick else {}))
        *_, last = sampler(model, room, room.position_ids // 4, noise=MASK)
        return last.canvas.tokens

    assert torch.equal(text(BlockCache(denoiser)), text(denoiser.predict))


def watched(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each pass runs, as they come."""
    widths: list[int] = []
    real = denoiser.hidden_states

    def spy(inputs, index, *, past=None):
        widths.append(inputs.tokens.shape[1])
        return real(inputs, index, past=past)

    monkeypatch.setattr(denoiser, "hidden_states", spy)
    return widths


def test_each_finished_block_is_run_once_and_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt, a pass runs the block in work, and the one before it only when that was just finished."""
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    widths = watched(denoiser, monkeypatch)
    room = Canvas.from_tokens([[5, 9, 7, 8, 2, 3, *[None] * 10]], noise=MASK, pad=0)
    for _ in Sampler()(BlockCache(denoiser), room, room.position_ids // 4, noise=MASK):
        pass
    assert widths == [8, 4, 8, 4, 4, 4, 8, 4, 4, 4]


def test_a_canvas_changed_behind_its_back_is_run_again() -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    cached = BlockCache(denoiser)
    room = Canvas.from_tokens([[5, 9, 7, 8, 2, 3, 4, 6, *[None] * 4]], noise=MASK, pad=0)
    cached(room, positions=room.open)
    for place in (1, 6):
        tokens = room.tokens.clone()
        tokens[0, place] += 10
        room = replace(room, tokens=tokens)
        ours, plain = cached(room, positions=room.open).logits, denoiser(room, positions=room.open).logits
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_cached_exactly_is_refused() -> None:
    with pytest.raises(ValueError, match="needs block-causal attention"):
        BlockCache(tiny_denoiser("llama", Bidirectional()))
    with pytest.raises(ValueError, match="block models have an exact one"):
        WindowCache(tiny_denoiser("llama", BlockCausal(4)), "dual")
    with pytest.raises(ValueError, match="keeps no keys and values"):
        BlockCache(tiny_denoiser("bert", BlockCausal(4, clean="block")))


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_a_window_cache_is_exact_when_fresh_and_close_when_not(family: str, kind: Literal["prefix", "dual"]) -> None:
    """Refreshed at every pass it is the denoiser; else it runs only the window, from what it remembers of the rest."""
    denoiser = tiny_denoiser(family, Bidirectional(), 1)
    room = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    window = room.position_ids // 4

    def texts(model) -> list[torch.Tensor]:
        return [frame.canvas.tokens for frame in Sampler()(model, room, window, noise=MASK)]

    plain, fresh = texts(denoiser.predict), texts(WindowCache(denoiser, kind, refresh=1))
    assert all(torch.equal(a, b) for a, b in zip(plain, fresh, strict=True))
    stale = texts(WindowCache(denoiser, kind))
    assert len(stale) == len(plain) and torch.equal(stale[0], plain[0])


def test_a_dual_cache_runs_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = tiny_denoiser("llama", Bidirectional(), 1)
    widths = watched(denoiser, monkeypatch)
    room = Canvas.from_tokens([[5, 9, 7, 8, *[None] * 8]], noise=MASK, pad=0)
    for _ in Sampler()(WindowCache(denoiser, "dual"), room, room.position_ids // 4, noise=MASK):
        pass
    assert widths == [12, 5, 5, 5, 12, 5, 5, 5]  # a window and its left neighbour, which answers its first position
    widths.clear()
    for _ in Sampler()(WindowCache(denoiser, "prefix"), room, room.position_ids // 4, noise=MASK):
        pass
    assert widths == [12, 9, 9, 9, 12, 5, 5, 5]


def test_a_remembered_window_is_what_the_whole_would_say_of_old_surroundings() -> None:
    """With nothing changed since, a partial pass gives the whole pass's answers."""
    denoiser = tiny_denoiser("llama", Bidirectional(), 1)
    room = Canvas.from_tokens(ROWS, noise=MASK, pad=0)
    positions = room.open & (room.position_ids < 9)
    for kind in ("prefix", "dual"):
        cached = WindowCache(denoiser, kind)
        whole, part = cached(room, positions=positions).logits, cached(room, positions=positions).logits
        torch.testing.assert_close(whole, denoiser(room, positions=positions).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
