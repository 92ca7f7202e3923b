"""Penalties, processors, constraints and observers give the text of AR decoding with them, one token at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from diffusify.canvas import Canvas, Guess, Move
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.constraints import Constraint
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.rng import RowGenerators
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.sampler import Sampler
from diffusify.sampling.speculative import Speculative
from diffusify.text.grammar import compile_regex
from tests.families import MASK, tiny_network
from tests.text import makers

TOKENIZER = makers.byte_level()
NETWORK: Any = tiny_network("llama", vocab_size=320)
DENOISER = Denoiser(NETWORK, DiffusionConfig(MASK, 1, BlockCausal(4), "LlamaForCausalLM")).eval()
END = TOKENIZER.end_token_id
PROMPTS = [[5, 9, 7, 11], [8, 60], [40, 11, 30, 6, 20, 9]]


def no_repeats(logits: Tensor, canvas: Canvas, positions: Tensor) -> Tensor:
    """Tokens that were generated are not generated again."""
    rows = positions.nonzero()[:, 0]
    used = torch.zeros(len(positions), logits.shape[1]).scatter_add(1, canvas.tokens, canvas.written.float())
    return logits.masked_fill(used[rows] > 0, -torch.inf)


SAMPLERS = {
    "penalty": Sampler(repetition_penalty=1.7, banned=(7, 8)),
    "processor": Sampler(logits_processor=no_repeats),
    "short text": Sampler(constraint=Constraint(compile_regex(TOKENIZER, "(yes|no|maybe)"), END), end_token_id=END),
    "long text": Sampler(constraint=Constraint(compile_regex(TOKENIZER, '[a-c]{3,9}( "[0-9]+")?'), END)),
    "end": Sampler(end_token_id=tuple(range(100, 200))),
}


def canvas_of(*prompts: list[int]) -> Canvas:
    return Canvas.from_tokens([[*prompt, *[None] * 14] for prompt in prompts], noise=MASK, pad=0)


@torch.no_grad()
def one_by_one(prompt: list[int], sampler: Sampler) -> tuple[list[int], list[float]]:
    """The tokens of AR decoding and their log-probabilities."""
    canvas, tokens, scores = canvas_of(prompt), list(prompt), []
    ends = sampler.end_token_id if isinstance(sampler.end_token_id, tuple) else (sampler.end_token_id,)
    while canvas.open.any() and (not scores or tokens[-1] not in ends):
        position = canvas.open & (canvas.open.long().cumsum(1) == 1)
        logits = NETWORK(input_ids=torch.tensor([tokens])).logits[0, -1:]
        logits[:, MASK] = -torch.inf
        log_probs = sampler.process_logits(LazyLogits.from_tensor(logits), canvas, position).logits[0].log_softmax(-1)
        tokens.append(int(log_probs.argmax()))
        scores.append(float(log_probs.max()))
        guess = Guess(torch.full_like(canvas.tokens, tokens[-1]), torch.zeros(canvas.tokens.shape))
        canvas = canvas.apply(Move(position, torch.zeros_like(position)), guess, MASK)
    return tokens, scores


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_text_is_that_of_ar_decoding(name: str) -> None:
    sampler = SAMPLERS[name]
    *_, last = Speculative(DENOISER)(canvas_of(*PROMPTS), [sampler] * 3, noise=MASK)
    for row, prompt in enumerate(PROMPTS):
        tokens, scores = one_by_one(prompt, sampler)
        assert last.canvas.tokens[row, : len(tokens)].tolist() == tokens
        torch.testing.assert_close(last.score[row, len(prompt) : len(tokens)], torch.tensor(scores), atol=1e-4, rtol=0)


def test_the_penalty_is_that_of_transformers() -> None:
    *_, last = Speculative(DENOISER)(canvas_of(PROMPTS[0]), [Sampler(repetition_penalty=1.7)], noise=MASK)
    settings = GenerationConfig(max_new_tokens=14, do_sample=False, repetition_penalty=1.7, suppress_tokens=[MASK])
    expected = NETWORK.generate(torch.tensor([PROMPTS[0]]), generation_config=settings)
    assert last.canvas.tokens[0, :18].tolist() == expected[0].tolist()


def test_every_row_has_its_own_sampler() -> None:
    """Greedy and sampled, constrained and free, in one batch: each row as alone."""
    samplers = [*SAMPLERS.values(), Sampler(), Sampler(Draw(1.5)), Sampler(Draw(0.9, top_k=9), repetition_penalty=2.0)]
    prompts = [PROMPTS[i % 3] for i in range(len(samplers))]
    rng = RowGenerators.from_seeds(list(range(len(samplers))))
    *_, together = Speculative(DENOISER)(canvas_of(*prompts), samplers, noise=MASK, rng=rng)
    for row, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True)):
        alone_rng = RowGenerators.from_seeds([row])
        *_, alone = Speculative(DENOISER)(canvas_of(prompt), [sampler], noise=MASK, rng=alone_rng)
        written = alone.canvas.tokens[0][alone.canvas.written[0]]
        length = len(prompt) + len(written)
        assert together.canvas.tokens[row, len(prompt) : length].tolist() == written.tolist()


@pytest.mark.parametrize(
    "sampler", [Sampler(), SAMPLERS["long text"], SAMPLERS["penalty"]], ids=["free", "constrained", "penalized"]
)
def test_an_observer_receives_the_logits_of_every_written_token(sampler: Sampler) -> None:
    seen: dict[tuple[int, int], tuple[int, float]] = {}

    def observer(written: Tensor, logits: LazyLogits) -> None:
        for cell, (log_prob, token) in zip(
            written.nonzero().tolist(), zip(*logits.logits.detach().log_softmax(-1).max(-1), strict=True), strict=True
        ):
            assert tuple(cell) not in seen
            seen[tuple(cell)] = int(token), log_prob.item()

    watched = Sampler(**{**vars(sampler), "observer": observer})
    *_, last = Speculative(DENOISER)(canvas_of(*PROMPTS), [watched] * 3, noise=MASK)
    written = {tuple(cell) for cell in last.canvas.written.nonzero().tolist()}
    assert seen.keys() == written
    assert all(last.canvas.tokens[cell] == token for cell, (token, _) in seen.items())
    assert all(last.score[cell].item() == pytest.approx(log_prob, abs=1e-4) for cell, (_, log_prob) in seen.items())
