"""Lazy logits are the logits, and are made only where and when they are looked at."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional
from diffusify.diffusion.logits import TOGETHER, LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Ancestral, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Entropy, Margin, Random
from diffusify.sampling.sampler import Sampler
from tests.families import MASK, tiny_denoiser


@given(st.integers(1, 3 * TOGETHER), st.integers(0, 999))
def test_parts_choices_and_changes_are_those_of_the_whole(k: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, by = (
        torch.randn(k, 4, generator=rng),
        torch.randn(4, 6, generator=rng),
        torch.randn(k, generator=rng),
    )
    whole = hidden @ weight
    sizes = []

    def head(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        assert torch.equal(part, hidden[index])
        return part @ weight

    lazy = LazyLogits(hidden, head)
    chosen = torch.rand(k, generator=rng) < 0.5
    scaled = lazy.then(lambda part, index: part * by[index][:, None])
    torch.testing.assert_close(scaled[chosen].logits, (whole * by[:, None])[chosen])
    numbered = lazy[chosen].then(lambda part, index: part + index[:, None])
    torch.testing.assert_close(numbered.logits, whole[chosen] + torch.arange(int(chosen.sum()))[:, None])
    torch.testing.assert_close(lazy.map(lambda part: part.max(-1).values), whole.max(-1).values)
    torch.testing.assert_close(
        lazy.log_prob(torch.arange(k) % 6), whole.log_softmax(-1)[torch.arange(k), torch.arange(k) % 6]
    )
    torch.testing.assert_close(lazy[chosen].logits, whole[chosen])
    assert max(sizes) <= TOGETHER


def test_only_what_is_written_is_projected() -> None:
    """An order that does not look at the guesses costs one projection a token; one that does, all that is open."""
    denoiser = tiny_denoiser("llama", Bidirectional())
    canvas = Canvas.from_tokens([[1, *[None] * 200], [1, *[None] * 9]], noise=MASK, pad=0)
    projected: list[int] = []

    def answers(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        lazy = denoiser.predict(canvas, positions=positions)

        def counted(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            projected.append(len(part))
            return part

        return lazy.then(counted)

    for policy in (Unmask(Random()), Ancestral()):
        projected.clear()
        *_, last = Sampler(Draw(), policy, steps=20)(answers, canvas, noise=MASK)
        assert not last.canvas.open.any() and sum(projected) == 209
    for policy in (Unmask(), Unmask(Margin()), Unmask(Entropy(), Threshold(0.5))):
        projected.clear()
        list(Sampler(Draw(), policy, steps=3)(answers, canvas, noise=MASK))
        assert sum(projected) > 209 and max(projected) <= TOGETHER
