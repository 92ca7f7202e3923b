"""Lazy logits equal the full logits and are computed only where they are used."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional
from diffusify.diffusion.logits import CHUNK_SIZE, LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Ancestral, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Entropy, Margin, Random
from diffusify.sampling.sampler import Sampler
from tests.families import MASK, tiny_denoiser


@given(st.integers(1, 3 * CHUNK_SIZE), st.integers(0, 999))
def test_chunks_selections_and_transforms_agree_with_the_full_logits(k: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(k, 4, generator=rng), torch.randn(4, 6, generator=rng)
    scale = torch.randn(k, generator=rng)
    full = hidden @ weight
    sizes = []

    def head(chunk: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        sizes.append(len(chunk))
        assert torch.equal(chunk, hidden[index])
        return chunk @ weight

    lazy = LazyLogits(hidden, head)
    chosen = torch.rand(k, generator=rng) < 0.5
    scaled = lazy.transform(lambda chunk, index: chunk * scale[index][:, None])
    torch.testing.assert_close(scaled[chosen].logits, (full * scale[:, None])[chosen])
    numbered = lazy[chosen].transform(lambda chunk, index: chunk + index[:, None])
    torch.testing.assert_close(numbered.logits, full[chosen] + torch.arange(int(chosen.sum()))[:, None])
    torch.testing.assert_close(lazy.map(lambda chunk: chunk.max(-1).values), full.max(-1).values)
    torch.testing.assert_close(
        lazy.log_prob(torch.arange(k) % 6), full.log_softmax(-1)[torch.arange(k), torch.arange(k) % 6]
    )
    torch.testing.assert_close(lazy[chosen].logits, full[chosen])
    assert max(sizes) <= CHUNK_SIZE


def test_only_written_positions_are_projected() -> None:
    """A policy that does not rank by guesses projects each position once; one that does projects all open ones."""
    denoiser = tiny_denoiser("llama", Bidirectional())
    canvas = Canvas.from_tokens([[1, *[None] * 140], [1, *[None] * 9]], noise=MASK, pad=0)
    projected: list[int] = []

    def predict(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        lazy = denoiser.predict(canvas, positions=positions)

        def count(chunk: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            projected.append(len(chunk))
            return chunk

        return lazy.transform(count)

    for policy in (Unmask(Random()), Ancestral()):
        projected.clear()
        *_, last = Sampler(Draw(), policy, steps=8)(predict, canvas, noise=MASK)
        assert not last.canvas.open.any() and sum(projected) == 149
    for policy in (Unmask(), Unmask(Margin()), Unmask(Entropy(), Threshold(0.5))):
        projected.clear()
        list(Sampler(Draw(), policy, steps=3)(predict, canvas, noise=MASK))
        assert sum(projected) > 149 and max(projected) <= CHUNK_SIZE
