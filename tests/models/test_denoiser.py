"""Laws 2 and 3: answers stand where they belong, and training's one pass equals sampling's many."""

from typing import Any, Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Causal
from diffusify.models.denoiser import Denoiser
from tests.families import FAMILIES, MASK, tiny_denoiser


def texts(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, MASK, (b, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_only_asked_positions_are_projected_and_nothing_else_changes(family: str) -> None:
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, kernel=kernel)
    canvas = Canvas.clean(texts(3, 8))
    ask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    widths = []
    head: Any = denoiser.network.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[:-1].numel()))
    whole, some = denoiser(canvas).logits, denoiser(canvas, ask=ask).logits
    torch.testing.assert_close(whole[ask], some, atol=1e-5, rtol=1e-5)
    assert widths == [24, int(ask.sum())]
    assert (whole[..., MASK] == -torch.inf).all()


@torch.no_grad()
def test_a_next_token_network_answers_about_the_next_position() -> None:
    denoiser = tiny_denoiser("llama", Causal())
    row = texts(2, 8)
    raw = denoiser.network(row).logits
    answers = denoiser(Canvas.clean(row)).logits
    raw[..., MASK] = -torch.inf
    torch.testing.assert_close(answers[:, 1:], raw[:, :-1], atol=1e-5, rtol=1e-5)


def test_the_first_position_of_every_document_is_never_asked() -> None:
    document = torch.tensor([[1, 1, 2, 2, 2, 0]])
    clean = Canvas.clean(texts(1, 6), document)
    assert tiny_denoiser("llama").answerable(clean).editable.tolist() == [[False, True, False, True, True, False]]
    assert torch.equal(tiny_denoiser("bert").answerable(clean).editable, clean.editable)


def shown(denoiser: Denoiser, clean: torch.Tensor, ask: torch.Tensor, document: torch.Tensor) -> Canvas:
    """A canvas with the asked positions open."""
    tokens = torch.where(ask, MASK, clean)
    return Canvas(tokens, open=ask, editable=document > 0, document=document)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "modernbert", "roberta"])
@pytest.mark.parametrize("half", ["token", "block"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_one_two_stream_pass_equals_block_by_block(family: str, half: Literal["token", "block"], size: int) -> None:
    denoiser = tiny_denoiser(family, BlockCausal(size, half))
    clean = texts(2, 12, seed=size)
    document = torch.tensor([[1] * 12, [1] * 5 + [2] * 5 + [0] * 2])
    luck = torch.rand(2, 12, generator=torch.Generator().manual_seed(size))
    plain = Canvas.clean(clean, document)
    ask = (luck < 0.6) & denoiser.answerable(plain).editable
    noisy = shown(denoiser, clean, ask, document)
    together = torch.full((2, 12, 48), torch.nan)
    together[ask] = denoiser(noisy, clean, ask=ask).logits
    block = plain.positions // size + 100 * document
    for number in block.unique():
        here = ask & (block == number)
        if not here.any():
            continue
        # earlier blocks are written, later ones are still wholly open
        later = (block > number) & (document > 0)
        canvas = shown(denoiser, clean, here | later, document)
        alone = denoiser(canvas, ask=here).logits
        torch.testing.assert_close(alone, together[here], atol=1e-5, rtol=1e-5)
        assert denoiser(canvas).logits[here].allclose(alone, atol=1e-5)  # what comes later is not seen


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_with_a_token_causal_clean_half_block_starts_are_the_ar_model(size: int) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(size))
    clean = texts(2, 12)
    canvas = Canvas.clean(clean)
    starts = (canvas.positions % size == 0) & (canvas.positions > 0)
    noisy = shown(denoiser, clean, starts, canvas.document)
    ar = denoiser(canvas, attention=Causal()).logits
    torch.testing.assert_close(denoiser(noisy, clean, ask=starts).logits, ar[starts], atol=1e-5, rtol=1e-5)
    everywhere = canvas.positions > 0
    both = denoiser(noisy, clean, ask=starts, ar=everywhere)
    torch.testing.assert_close(both.ar_logits, ar[everywhere], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [Bidirectional(), Causal(), BlockCausal(2)])
def test_a_batch_gives_each_row_what_it_gets_alone(pattern: AttentionPattern) -> None:
    denoiser = tiny_denoiser("llama", pattern)
    canvas = Canvas.room([[3, 4, 5, None, None], [6, None, None], [7, 8, 9, 10, None, None]], noise=MASK, pad=0)
    together = denoiser(canvas).logits
    for row, length in enumerate((5, 3, 6)):
        alone = denoiser(canvas[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, 1:length], alone[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_that_are_projected_later_are_the_same(family: str) -> None:
    """Soft caps, scales and heads of several layers included."""
    denoiser = tiny_denoiser(family, kernel="eager" if family == "gemma2" else "sdpa")
    canvas = Canvas.room([[1, 5, None, 6, None, None], [1, None, 4]], noise=MASK, pad=0)
    now, later = denoiser(canvas, ask=canvas.open).logits, denoiser.answers(canvas, ask=canvas.open)
    torch.testing.assert_close(later.logits, now)
    torch.testing.assert_close(later[torch.tensor([2, 0])].logits, now[[2, 0]])
    assert denoiser.answers(canvas, ask=torch.zeros_like(canvas.open)).logits.shape == (0, now.shape[1])
