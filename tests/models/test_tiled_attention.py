"""Tiled attention equals transformers' own, in the forward and the backward pass."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, AttentionPattern, Bidirectional, BlockCausal, Causal
from diffusify.models import tiled_attention
from diffusify.models.denoiser import Denoiser
from diffusify.models.tiled_attention import use_tiled_attention
from tests.families import FAMILIES, MASK, tiny_denoiser

PATTERNS = [Causal(), Annealed(0.3), Bidirectional(), BlockCausal(3), BlockCausal(4, clean="block")]


def gradients(denoiser: Denoiser, canvas: Canvas, clean: torch.Tensor, pattern: AttentionPattern) -> dict[str, Any]:
    denoiser.zero_grad()
    logits = denoiser(canvas, clean, positions=canvas.open, attention=pattern).logits
    logits.log_softmax(-1)[:, 0].sum().backward()
    return {"logits": logits} | {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}


def noisy(documents: torch.Tensor, seed: int = 0) -> tuple[Canvas, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, MASK, documents.shape, generator=generator)
    open = (torch.rand(documents.shape, generator=generator) < 0.5) & (documents > 0)
    open[:, 1] = True
    return Canvas(clean.masked_fill(open, MASK), open, documents > 0, documents), clean


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_gradients(
    family: str, pattern: AttentionPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "gemma2":
        pytest.skip("its scores are capped, which sdpa does not support")
    monkeypatch.setattr(tiled_attention, "TILE_SIZE", 4)
    denoiser = tiny_denoiser(family)
    canvas, clean = noisy(torch.tensor([[1] * 13, [1] * 6 + [2] * 5 + [0] * 2]))
    plain = gradients(denoiser, canvas, clean, pattern)
    use_tiled_attention(denoiser.network)
    assert denoiser.network.config._attn_implementation == "tiles"
    tiled = gradients(denoiser, canvas, clean, pattern)
    assert plain.keys() == tiled.keys()
    for name in plain:
        torch.testing.assert_close(tiled[name], plain[name], atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=60)
@given(
    tile_size=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 99),
)
def test_any_mask_in_tiles_of_any_size(tile_size: int, sizes: list[int], pattern: AttentionPattern, seed: int) -> None:
    documents = torch.tensor([[n for n, size in enumerate(sizes, 1) for _ in range(size)]])
    canvas, clean = noisy(torch.nn.functional.pad(documents, (0, 2)), seed)
    bias = pattern(canvas, clean).bias(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, bias.shape[-1], 4, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    tiled: Any = tiled_attention._TiledAttention.apply(query, key, value, cut_into_tiles(bias, tile_size), 0.5)
    repeated = [heads.repeat_interleave(2, 1) for heads in (key, value)]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=bias, scale=0.5)
    torch.testing.assert_close(tiled, plain, atol=1e-5, rtol=1e-4)
    weight = torch.randn(tiled.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad((tiled * weight).sum(), (query, key, value)),
        torch.autograd.grad((plain * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_fully_masked_tiles_are_skipped() -> None:
    canvas, clean = noisy(torch.ones(1, 64, dtype=torch.long))
    tiles = cut_into_tiles(BlockCausal(4)(canvas, clean).bias(torch.float32), 16)
    computed = [sum(keys.stop - keys.start for keys in tile.key_ranges) for tile in tiles]
    assert computed == [32, 48, 64, 80, 16, 32, 48, 64]  # noisy: own block and clean history; clean: clean history


def test_a_mask_is_cut_into_tiles_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, cut = [], tiled_attention._tiles
    monkeypatch.setattr(tiled_attention, "_tiles", lambda bias: cuts.append(1) or cut(bias))
    denoiser = tiny_denoiser("llama")
    use_tiled_attention(denoiser.network)
    canvas, clean = noisy(torch.ones(2, 9, dtype=torch.long))
    gradients(denoiser, canvas, clean, BlockCausal(3))
    assert len(cuts) == 1


@torch.no_grad()
def test_without_gradients_sdpa_is_used() -> None:
    denoiser = tiny_denoiser("llama")
    canvas, clean = noisy(torch.ones(2, 9, dtype=torch.long))
    before = denoiser(canvas, clean, attention=BlockCausal(3)).logits
    use_tiled_attention(denoiser.network)
    assert torch.equal(denoiser(canvas, clean, attention=BlockCausal(3)).logits, before)


def cut_into_tiles(bias: torch.Tensor, tile_size: int) -> list[tiled_attention.QueryTile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention, "TILE_SIZE", tile_size)
        return tiled_attention._tiles(bias)
