"""Law 1: exactly the tokens that the attention pattern allows change a position's logits, for every family."""

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.models.attention_check import allowed_influence, attention_influence, check_attention
from diffusify.models.denoiser import Denoiser
from tests.families import CAUSAL, FAMILIES, tiny_denoiser

PATTERNS = [Causal(), Bidirectional(), Annealed(0.4, seed=3), BlockCausal(2, "block"), BlockCausal(3, "token")]
KERNELS = [
    (family, kernel) for family in FAMILIES for kernel in ("sdpa", "eager") if (family, kernel) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(("family", "kernel"), KERNELS)
def test_logits_depend_on_exactly_the_allowed_tokens(family: str, kernel: str) -> None:
    denoiser = tiny_denoiser(family, kernel=kernel)
    for pattern in PATTERNS:
        assert torch.equal(attention_influence(denoiser, pattern), allowed_influence(denoiser, pattern)), pattern
    shift = int(family in CAUSAL)
    assert attention_influence(denoiser, Bidirectional())[shift:].all()
    assert torch.equal(attention_influence(denoiser, Causal())[shift:], torch.ones(6, 6).tril(-shift).bool()[shift:])
    check_attention(denoiser)


@pytest.mark.parametrize(
    ("family", "kernel"), [("mistral", "sdpa"), ("qwen3", "eager"), ("gemma3_text", "sdpa"), ("modernbert", "sdpa")]
)
def test_sliding_windows_are_kept_under_a_custom_mask(family: str, kernel: str) -> None:
    changes = {
        "mistral": {"sliding_window": 2},
        "qwen3": {"sliding_window": 2, "use_sliding_window": True, "max_window_layers": 0},
        "gemma3_text": {"sliding_window": 2, "layer_types": ["sliding_attention", "sliding_attention"]},
        "modernbert": {"local_attention": 2, "layer_types": ["sliding_attention", "sliding_attention"]},
    }[family]
    denoiser = tiny_denoiser(family, kernel=kernel, shift=0, **changes)
    influence = attention_influence(denoiser, Bidirectional(), n=9)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    assert torch.equal(influence, distance <= 2)  # two layers, each with a window of one token to either side


def test_a_network_that_ignores_its_mask_is_refused() -> None:
    denoiser = tiny_denoiser("llama")
    body: Any = denoiser.network.base_model
    forward = body.forward
    body.forward = lambda *a, attention_mask, **k: forward(*a, attention_mask=None, **k)
    with pytest.raises(ValueError, match="does not obey"):
        check_attention(denoiser)


def test_a_kernel_that_ignores_the_mask_is_refused() -> None:
    denoiser = tiny_denoiser("llama")
    denoiser.network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        Denoiser(denoiser.network, denoiser.diffusion_config)


def test_a_network_without_position_ids_is_refused() -> None:
    config = BloomConfig(vocab_size=48, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="position_ids"):
        Denoiser(BloomForCausalLM(config), tiny_denoiser("llama").diffusion_config)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "roberta", "albert", "distilbert", "electra", "gpt_neox", "phi3"])
def test_documents_and_padding_do_not_attend_to_each_other(family: str) -> None:
    denoiser = tiny_denoiser(family)
    row = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 0, 0]])
    document = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    packed = denoiser(Canvas.clean(row, document)).logits[0]
    first = denoiser(Canvas.clean(row[:, :3])).logits[0]
    second = denoiser(Canvas.clean(row[:, 3:7])).logits[0]
    shift = denoiser.diffusion_config.shift
    torch.testing.assert_close(packed[shift:3], first[shift:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[3 + shift : 7], second[shift:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prefix_attention() -> None:
    denoiser = tiny_denoiser("bert", Prefix())
    canvas = Canvas.from_tokens([[5, 6, 7, None, None]], noise=47, pad=0)
    other = Canvas.from_tokens([[5, 6, 7, None, None]], noise=46, pad=0)
    a, b = denoiser(canvas).logits[0], denoiser(other).logits[0]
    changed = (a - b).nan_to_num().abs().amax(-1) > 1e-6
    assert changed.tolist() == [False, False, False, True, True]
