"""Laws 2 and 3: answers stand where they belong, and training's one pass equals sampling's many."""

from typing import Any, Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion import logits
from diffusify.diffusion.attention import AttentionInputs, AttentionPattern, Bidirectional, BlockCausal, Causal
from diffusify.diffusion.corruption import PerBlock, noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.objectives import Objective
from diffusify.diffusion.schedules import Linear
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import Lora, add_lora
from tests.families import CAUSAL, FAMILIES, MASK, MASKED, tiny_denoiser


def texts(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, MASK, (b, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_only_asked_positions_are_projected_and_nothing_else_changes(family: str) -> None:
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, kernel=kernel)
    canvas = Canvas.clean(texts(3, 8))
    positions = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    widths = []
    head: Any = denoiser.network.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[:-1].numel()))
    whole, some = denoiser(canvas).logits, denoiser(canvas, positions=positions).logits
    torch.testing.assert_close(whole[positions], some, atol=1e-5, rtol=1e-5)
    assert widths == [24, int(positions.sum())]
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
    assert tiny_denoiser("llama").predictable(clean).editable.tolist() == [[False, True, False, True, True, False]]
    assert torch.equal(tiny_denoiser("bert").predictable(clean).editable, clean.editable)


def shown(denoiser: Denoiser, clean: torch.Tensor, positions: torch.Tensor, document: torch.Tensor) -> Canvas:
    """A canvas with the asked positions open."""
    tokens = torch.where(positions, MASK, clean)
    return Canvas(tokens, open=positions, editable=document > 0, document=document)


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
    positions = (luck < 0.6) & denoiser.predictable(plain).editable
    noisy = shown(denoiser, clean, positions, document)
    together = torch.full((2, 12, 48), torch.nan)
    together[positions] = denoiser(noisy, clean, positions=positions).logits
    block = plain.position_ids // size + 100 * document
    for number in block.unique():
        here = positions & (block == number)
        if not here.any():
            continue
        # earlier blocks are written, later ones are still wholly open
        later = (block > number) & (document > 0)
        canvas = shown(denoiser, clean, here | later, document)
        alone = denoiser(canvas, positions=here).logits
        torch.testing.assert_close(alone, together[here], atol=1e-5, rtol=1e-5)
        assert denoiser(canvas).logits[here].allclose(alone, atol=1e-5)  # what comes later is not seen


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_with_a_token_causal_clean_half_block_starts_are_the_ar_model(size: int) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(size))
    clean = texts(2, 12)
    canvas = Canvas.clean(clean)
    starts = (canvas.position_ids % size == 0) & (canvas.position_ids > 0)
    noisy = shown(denoiser, clean, starts, canvas.document)
    ar = denoiser(canvas, attention=Causal()).logits
    torch.testing.assert_close(denoiser(noisy, clean, positions=starts).logits, ar[starts], atol=1e-5, rtol=1e-5)
    everywhere = canvas.position_ids > 0
    both = denoiser(noisy, clean, positions=starts, ar_positions=everywhere)
    torch.testing.assert_close(both.ar_logits, ar[everywhere], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [Bidirectional(), Causal(), BlockCausal(2)])
def test_a_batch_gives_each_row_what_it_gets_alone(pattern: AttentionPattern) -> None:
    denoiser = tiny_denoiser("llama", pattern)
    canvas = Canvas.from_tokens([[3, 4, 5, None, None], [6, None, None], [7, 8, 9, 10, None, None]], noise=MASK, pad=0)
    together = denoiser(canvas).logits
    for row, length in enumerate((5, 3, 6)):
        alone = denoiser(canvas[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, 1:length], alone[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_that_are_projected_later_are_the_same(family: str) -> None:
    """Soft caps, scales and heads of several layers included."""
    denoiser = tiny_denoiser(family, kernel="eager" if family == "gemma2" else "sdpa")
    canvas = Canvas.from_tokens([[1, 5, None, 6, None, None], [1, None, 4]], noise=MASK, pad=0)
    now, later = denoiser(canvas, positions=canvas.open).logits, denoiser.predict(canvas, positions=canvas.open)
    torch.testing.assert_close(later.logits, now)
    torch.testing.assert_close(later[torch.tensor([2, 0])].logits, now[[2, 0]])
    assert denoiser.predict(canvas, positions=torch.zeros_like(canvas.open)).logits.shape == (0, now.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert", "gemma3_text"])
@pytest.mark.parametrize("half", ["token", "block"])
def test_blocks_that_nobody_reads_are_left_out_and_nothing_else_changes(
    family: str, half: Literal["token", "block"], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = tiny_denoiser(family, BlockCausal(4, clean=half))
    document = torch.tensor([[1] * 20, [1] * 7 + [2] * 9 + [0] * 4])
    clean = texts(2, 20)
    positions = torch.zeros(2, 20, dtype=torch.bool)
    positions[0, [1, 4, 9, 10]] = positions[1, [4, 5, 6, 14]] = True
    canvas = shown(denoiser, clean, positions, document)
    shapes, ar = [], document > 0
    denoiser.network.base_model.register_forward_hook(lambda m, a, out: shapes.append(out[0].shape[1]))
    with monkeypatch.context() as patch:
        patch.setattr(AttentionInputs, "keep_only", lambda inputs, keep: inputs)
        whole = denoiser(canvas, clean, positions=positions, ar_positions=ar)
    real = AttentionInputs.keep_only
    monkeypatch.setattr(AttentionInputs, "keep_only", lambda inputs, keep: real(inputs, keep, multiple=1))
    some = denoiser(canvas, clean, positions=positions, ar_positions=ar)
    torch.testing.assert_close(some.logits, whole.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(some.ar_logits, whole.ar_logits, atol=1e-5, rtol=1e-4)
    # Under shift the block of position 4 in the first row is answered by clean text alone.
    assert shapes == [40, 28] if denoiser.diffusion_config.shift else [40, 32]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_two_canvases_of_a_text_share_its_clean_half(family: str) -> None:
    """One pass over [noisy, its complement, clean] answers what a pass for each does."""
    denoiser = tiny_denoiser(family, BlockCausal(4, clean="token" if family in CAUSAL else "block"))
    document = torch.tensor([[1] * 20, [1] * 7 + [2] * 9 + [0] * 4])
    clean = denoiser.predictable(Canvas.clean(texts(2, 20), document))
    time, luck = PerBlock(4, complement=True), torch.Generator().manual_seed(1)
    batch = noised(clean, time, Linear(), MASK, ar_share=0.3, generator=luck)
    ar = batch.ar_positions | batch.canvas.open
    together = denoiser(batch.canvas, batch.text, positions=batch.canvas.open, ar_positions=ar)
    apart = denoiser(batch.canvas, batch.clean, positions=batch.canvas.open, ar_positions=ar)
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.ar_logits, apart.ar_logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_a_loss_made_on_the_way_teaches_what_one_of_all_logits_does(
    family: str, distill: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few logits at a time, tied weights and heads of several layers included."""
    if family in MASKED and distill:
        pytest.skip("a masked model has no left-to-right half")
    kernel = "eager" if family == "gemma2" else "sdpa"
    pattern = BlockCausal(4) if family in CAUSAL else Bidirectional()
    denoiser = tiny_denoiser(family, pattern, kernel=kernel, tie_word_embeddings=True)
    ar_weight = 0.5 if family in CAUSAL else 0.0
    objective = Objective(ar_weight=ar_weight, distill=distill, label_smoothing=0.1)
    luck = torch.Generator().manual_seed(3)
    clean = denoiser.predictable(Canvas.clean(texts(3, 12)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, ar_share=0.25, generator=luck)
    how: Any = {"positions": batch.canvas.open, "ar_positions": objective.ar_targets(batch)}

    def gradients(loss: Any) -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        loss.total.backward()
        return {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}

    whole = denoiser(batch.canvas, batch.clean, **how)
    plain = objective(LazyLogits.of(whole.logits), LazyLogits.of(whole.ar_logits), batch, Linear())
    monkeypatch.setattr(logits, "LEARNT", 5)
    made = denoiser(batch.canvas, batch.clean, **how, loss=lambda a, b: objective(a, b, batch, Linear()))
    torch.testing.assert_close(made.loss.total, plain.total)
    torch.testing.assert_close(made.loss.nll, plain.nll)
    torch.testing.assert_close(made.loss.ar_nll, plain.ar_nll)
    one, other = gradients(made.loss), gradients(plain)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_loss_made_on_the_way_under_autocast() -> None:
    denoiser, objective = tiny_denoiser("llama", BlockCausal(4), tie_word_embeddings=True), Objective(ar_weight=0.5)
    clean = denoiser.predictable(Canvas.clean(texts(3, 12)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, ar_share=0.5, generator=torch.Generator().manual_seed(3))
    found = []
    for half in (False, True):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            made = denoiser(
                batch.canvas, batch.clean, positions=batch.canvas.open, ar_positions=objective.ar_targets(batch),
                loss=lambda a, b: objective(a, b, batch, Linear()),
            )  # fmt: skip
        made.loss.total.backward()
        found.append(torch.cat([weight.grad.flatten() for weight in denoiser.parameters() if weight.grad is not None]))
    assert torch.cosine_similarity(*found, dim=0) > 0.995 and len(found[0]) == len(found[1])


def test_frozen_weights_under_adapters_get_no_gradient() -> None:
    denoiser, objective = tiny_denoiser("llama", BlockCausal(4)), Objective()
    add_lora(denoiser.network, Lora(2), MASK, "base")
    clean = denoiser.predictable(Canvas.clean(texts(2, 8)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, generator=torch.Generator().manual_seed(3))
    made = denoiser(
        batch.canvas, batch.clean, positions=batch.canvas.open, loss=lambda a, b: objective(a, b, batch, Linear())
    )
    made.loss.total.backward()
    learnt = {name for name, weight in denoiser.named_parameters() if weight.grad is not None}
    assert learnt and learnt == {name for name, weight in denoiser.named_parameters() if weight.requires_grad}
