"""Known mistakes of other samplers, with one test each.

Others are tested elsewhere: counts averaged over a batch (`test_diffusion_lm`), the last rank of the factor rule
(`test_policies`), the first token of a cached block with shifted predictions (`test_kv_cache`), and a generated mask
token (`test_denoiser`).
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal
from diffusify.diffusion.logits import CHUNK_SIZE, LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Unmask
from diffusify.diffusion.ranking import Confidence, Entropy, Margin, Random, Ranking
from diffusify.diffusion.rng import RowGenerators
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampler import Sampler, denoise
from diffusify.sampling.sampling_config import SamplingConfig
from tests.families import MASK, tiny_denoiser
from tests.text import makers

END = 2


def model(attention: AttentionPattern = Bidirectional()) -> DiffusionLM:
    tokenizer = makers.byte_level()
    return DiffusionLM(tiny_denoiser("llama", attention, vocab_size=320, max_position_embeddings=256), tokenizer)


@pytest.mark.parametrize("rank", [Confidence(), Margin(), Entropy()], ids=str)
def test_banned_tokens_do_not_count_for_confidence(rank: Ranking) -> None:
    """A banned end token must not make its position confident (LLaDA's sampler with a temperature)."""

    def toy(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        logits = torch.zeros(*canvas.tokens.shape, 6)
        logits[:, 1, END] = 20.0  # confident in the end token, and uniform without it
        logits[:, 2, 4] = 3.0
        return LazyLogits.from_tensor(logits[positions])

    canvas = Canvas.from_tokens([[1, None, None]], noise=5, pad=0)
    frames = denoise(toy, canvas, [Sampler(Draw(0.5), Unmask(rank), banned=(END,))], noise=5)
    first = next(frames)
    assert first.canvas.open.tolist() == [[False, True, False]]
    *_, last = frames
    assert last.canvas.tokens[0, 1] != END
    torch.testing.assert_close(last.score[0, 1].exp().item(), 0.2)


@pytest.mark.parametrize("rank", [Confidence(), Margin(), Entropy(), Random()], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 7, 10, 25])
def test_every_step_writes_an_even_share(rank: Ranking, steps: int) -> None:
    """Rounding down would leave the first steps empty and the last one full (Dream's sampler)."""
    denoiser = tiny_denoiser("llama")
    canvas = Canvas.from_tokens([[1, *[None] * 10], [1, *[None] * 4]], noise=MASK, pad=0)
    frames = denoise(denoiser.predict, canvas, [Sampler(Draw(), Unmask(rank), steps)] * 2, noise=MASK)
    counts = [canvas.open.sum(1)] + [frame.canvas.open.sum(1) for frame in frames]
    written = torch.stack(counts).diff(dim=0).neg()
    assert len(written) == min(10, steps)
    for row, size in enumerate((10, 4)):
        shares = [count for count in written[:, row].tolist() if count]
        assert sum(shares) == size and max(shares) - min(shares) <= 1


def test_candidates_of_a_text_have_its_settings() -> None:
    """Settings are repeated for the candidates of a text, not tiled over the batch."""
    lm = model()
    texts = ["The [[2-4]] on the mat", "so [[2-4]] it", "[[3]] end"]
    each = [
        SamplingConfig(temperature=1.5, seed=5),
        SamplingConfig(temperature=0.3, top_k=2, seed=5),
        SamplingConfig(suppress_tokens=tuple(range(60, 300))),
    ]
    together = lm.prepare_infilling(texts, each).results()
    # All texts of a batch have the same number of candidates, so each text is compared in a batch with as many.
    for text, settings, result in zip(texts, each, together, strict=True):
        alone = lm.prepare_infilling([text, "a [[2-4]]"], [settings, SamplingConfig()]).results()[0]
        assert (alone.text, alone.seed) == (result.text, result.seed)


def test_sampling_noise_is_float64() -> None:
    """Uniform numbers with 24 bits cut the tail of the distribution, which acts as a lower temperature."""
    noise = RowGenerators.from_seeds([0]).uniform(torch.ones(1, 50_000).bool())
    assert noise.dtype == torch.float64 and (noise.float().double() != noise).float().mean() > 0.9


def test_positions_written_in_one_step_are_independent() -> None:
    """One random number for a whole block would make its tokens dependent."""

    def uniform(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        return LazyLogits.from_tensor(torch.zeros(int(positions.sum()), 2))

    canvas = Canvas.from_tokens([[None] * 4] * 2000, noise=9, pad=0)
    *_, last = Sampler(Draw(), steps=1)(uniform, canvas, noise=9)
    shares = torch.bincount((last.canvas.tokens * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / 2000
    assert float(((shares - 1 / 16) ** 2 * 16 * 2000).sum()) < 37.7  # 15 degrees of freedom, p = 0.001


def test_each_text_has_its_own_seed_and_temperature() -> None:
    """A batch must not share the settings of its first text, nor ignore the seed."""
    lm = model()
    hot, cold = SamplingConfig(temperature=3.0, seed=1), SamplingConfig()
    texts = [
        r.text
        for r in lm.prepare_generation(["The"] * 4, 12, [cold, hot, cold, SamplingConfig(temperature=3.0)]).results()
    ]
    assert texts[0] == texts[2] and len(set(texts)) == 3
    assert lm.prepare_generation(["The"], 12, hot).results()[0].text == texts[1]


def test_tokens_are_counted_up_to_the_end_token() -> None:
    lm = model(BlockCausal(4))
    end = lm.tokenizer.end_token_id
    result = lm.generate("The cat", 16, cache="none", suppress_tokens=tuple(i for i in range(320) if i != end))
    assert result.tokens == 0 and result.tokens_per_second == 0 and result.forwards <= 4


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor, and the rows of the largest tensor of the vocabulary's width."""

    def __init__(self, v: int) -> None:
        super().__init__()
        self.v, self.numel, self.rows = v, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
                if tensor.dim() and tensor.shape[-1] == self.v and "embedding" not in str(func):
                    self.rows = max(self.rows, math.prod(tensor.shape[:-1]))
        return out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("attention", [Bidirectional(), BlockCausal(4)], ids=str)
def test_memory_does_not_grow_with_length_times_vocabulary(attention: AttentionPattern, temperature: float) -> None:
    """Logits of all positions of a long canvas would take tens of gigabytes."""
    v, largest = 611, {}
    lm = DiffusionLM(tiny_denoiser("llama", attention, vocab_size=v, max_position_embeddings=2048), makers.byte_level())
    for n in (256, 1024):
        run = lm.prepare_generation(["The"], n, SamplingConfig(steps=n // 4, temperature=temperature, top_p=0.9))
        with LargestTensor(v) as recorded:
            for _ in zip(range(3), run, strict=False):
                pass
        assert recorded.rows <= CHUNK_SIZE
        largest[n] = recorded.numel
    assert largest[1024] <= 4.5 * largest[256]
