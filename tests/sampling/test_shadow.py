"""Shadow predictions are those of a text with the position masked, as far as one forward pass allows."""

from itertools import pairwise

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, Prefix
from diffusify.diffusion.policies import Wino
from diffusify.sampling.sampler import Sampler
from diffusify.sampling.shadow import ShadowDenoiser
from tests.families import MASK, tiny_denoiser


def half_decoded() -> Canvas:
    rows = [[1, 5, 6, *[None] * 9], [1, 7, *[None] * 5]]
    canvas = Canvas.from_tokens(rows, noise=MASK, pad=0)
    written = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    tokens = torch.where(written, torch.arange(12) + 20, canvas.tokens)
    return Canvas(tokens, canvas.open & ~written, canvas.editable, canvas.document)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("pattern", [Bidirectional(), Prefix()])
@torch.no_grad()
def test_with_one_layer_shadow_predictions_are_exact(pattern: AttentionPattern, shift: int) -> None:
    denoiser = tiny_denoiser("llama", pattern, shift, num_hidden_layers=1)
    canvas = half_decoded()
    shadow = ShadowDenoiser(denoiser)(canvas, positions=canvas.editable).logits
    logits = torch.zeros(*canvas.tokens.shape, shadow.shape[-1])
    logits[canvas.editable] = shadow
    for row, i in canvas.editable.nonzero().tolist():
        tokens, open = canvas.tokens.clone(), canvas.open.clone()
        tokens[row, i], open[row, i] = MASK, True
        position = torch.zeros_like(open)
        position[row, i] = True
        masked = Canvas(tokens, open, canvas.editable, canvas.document)
        expected = denoiser(masked, positions=position).logits[0]
        torch.testing.assert_close(logits[row, i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert"])
@torch.no_grad()
def test_shadow_masks_do_not_change_other_predictions(family: str) -> None:
    denoiser = tiny_denoiser(family)
    canvas = half_decoded()
    shadow, plain = (model(canvas, positions=canvas.editable).logits for model in (ShadowDenoiser(denoiser), denoiser))
    open = canvas.open[canvas.editable]
    torch.testing.assert_close(shadow[open], plain[open], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shadow[~open], plain[~open])
    torch.testing.assert_close(ShadowDenoiser(denoiser)(canvas, positions=canvas.open).logits, plain[open])


@pytest.mark.parametrize("shift", [0, 1])
def test_wino_remasks_tokens_and_terminates(shift: int) -> None:
    denoiser = tiny_denoiser("llama", shift=shift)
    canvas = Canvas.from_tokens([[1, 5, *[None] * 20], [1, *[None] * 7]], noise=MASK, pad=0)
    frames = list(
        Sampler(policy=Wino(threshold=0.01, threshold_back=0.9))(ShadowDenoiser(denoiser), canvas, noise=MASK)
    )
    assert not frames[-1].canvas.open.any() and frames[-1].forwards <= 20
    remasked = [(b.canvas.open & ~a.canvas.open).sum(1).max() for a, b in pairwise(frames)]
    assert max(remasked) > 1
