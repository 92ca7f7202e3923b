"""Blind answers are those of a text in which the place is open, as far as one pass can tell."""

from itertools import pairwise

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, Prefix
from diffusify.diffusion.policies import Wino
from diffusify.sampling.sampler import Sampler
from diffusify.sampling.shadow import ShadowDenoiser
from tests.families import MASK, tiny_denoiser


def half_written() -> Canvas:
    rows = [[1, 5, 6, *[None] * 9], [1, 7, *[None] * 5]]
    canvas = Canvas.from_tokens(rows, noise=MASK, pad=0)
    written = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    tokens = torch.where(written, torch.arange(12) + 20, canvas.tokens)
    return Canvas(tokens, canvas.open & ~written, canvas.editable, canvas.document)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("pattern", [Bidirectional(), Prefix()])
@torch.no_grad()
def test_one_layer_cannot_tell_a_blind_answer_from_an_open_place(pattern: AttentionPattern, shift: int) -> None:
    denoiser = tiny_denoiser("llama", pattern, shift, num_hidden_layers=1)
    canvas = half_written()
    blind = ShadowDenoiser(denoiser)(canvas, positions=canvas.editable).logits
    about = torch.zeros(*canvas.tokens.shape, blind.shape[-1])
    about[canvas.editable] = blind
    for row, i in canvas.editable.nonzero().tolist():
        tokens, open = canvas.tokens.clone(), canvas.open.clone()
        tokens[row, i], open[row, i] = MASK, True
        place = torch.zeros_like(open)
        place[row, i] = True
        opened = Canvas(tokens, open, canvas.editable, canvas.document)
        torch.testing.assert_close(about[row, i], denoiser(opened, positions=place).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert"])
@torch.no_grad()
def test_the_text_does_not_see_that_it_is_doubted(family: str) -> None:
    denoiser = tiny_denoiser(family)
    canvas = half_written()
    blind, plain = (model(canvas, positions=canvas.editable).logits for model in (ShadowDenoiser(denoiser), denoiser))
    open = canvas.open[canvas.editable]
    torch.testing.assert_close(blind[open], plain[open], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(blind[~open], plain[~open])
    torch.testing.assert_close(ShadowDenoiser(denoiser)(canvas, positions=canvas.open).logits, plain[open])


@pytest.mark.parametrize("shift", [0, 1])
def test_revoking_takes_back_and_still_ends(shift: int) -> None:
    denoiser = tiny_denoiser("llama", shift=shift)
    canvas = Canvas.from_tokens([[1, 5, *[None] * 20], [1, *[None] * 7]], noise=MASK, pad=0)
    frames = list(
        Sampler(policy=Wino(threshold=0.01, threshold_back=0.9))(ShadowDenoiser(denoiser), canvas, noise=MASK)
    )
    assert not frames[-1].canvas.open.any() and frames[-1].forwards <= 20
    taken = [(b.canvas.open & ~a.canvas.open).sum(1).max() for a, b in pairwise(frames)]
    assert max(taken) > 1
