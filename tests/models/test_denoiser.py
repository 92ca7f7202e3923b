"""Laws 2 and 3: logits are about their own position, and one training pass equals many sampling passes."""

from typing import Any, Literal

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion import logits
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Causal
from diffusify.diffusion.attention_inputs import AttentionInputs
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
def test_only_requested_positions_are_projected_with_the_same_logits(family: str) -> None:
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, kernel=kernel)
    canvas = Canvas.clean(texts(3, 8))
    positions = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    projected = []
    head: Any = denoiser.network.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: projected.append(args[0].shape[:-1].numel()))
    all_logits, requested = denoiser(canvas).logits, denoiser(canvas, positions=positions).logits
    torch.testing.assert_close(all_logits[positions], requested, atol=1e-5, rtol=1e-5)
    assert projected == [24, int(positions.sum())]
    assert (all_logits[..., MASK] == -torch.inf).all()


@torch.no_grad()
def test_the_logits_of_an_ar_network_are_shifted_by_one() -> None:
    denoiser = tiny_denoiser("llama", Causal())
    row = texts(2, 8)
    raw = denoiser.network(row).logits
    logits = denoiser(Canvas.clean(row)).logits
    raw[..., MASK] = -torch.inf
    torch.testing.assert_close(logits[:, 1:], raw[:, :-1], atol=1e-5, rtol=1e-5)


def test_the_first_position_of_every_document_is_not_predictable_under_shift() -> None:
    document = torch.tensor([[1, 1, 2, 2, 2, 0]])
    clean = Canvas.clean(texts(1, 6), document)
    assert tiny_denoiser("llama").predictable(clean).editable.tolist() == [[False, True, False, True, True, False]]
    assert torch.equal(tiny_denoiser("bert").predictable(clean).editable, clean.editable)


def masked_canvas(denoiser: Denoiser, clean: torch.Tensor, positions: torch.Tensor, document: torch.Tensor) -> Canvas:
    """A canvas with `positions` open."""
    tokens = torch.where(positions, MASK, clean)
    return Canvas(tokens, open=positions, editable=document > 0, document=document)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "modernbert", "roberta"])
@pytest.mark.parametrize("half", ["token", "block"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_one_training_pass_equals_denoising_block_by_block(
    family: str, half: Literal["token", "block"], size: int
) -> None:
    denoiser = tiny_denoiser(family, BlockCausal(size, half))
    clean = texts(2, 12, seed=size)
    document = torch.tensor([[1] * 12, [1] * 5 + [2] * 5 + [0] * 2])
    uniform = torch.rand(2, 12, generator=torch.Generator().manual_seed(size))
    plain = Canvas.clean(clean, document)
    positions = (uniform < 0.6) & denoiser.predictable(plain).editable
    noisy = masked_canvas(denoiser, clean, positions, document)
    together = torch.full((2, 12, 48), torch.nan)
    together[positions] = denoiser(noisy, clean, positions=positions).logits
    block = plain.position_ids // size + 100 * document
    for number in block.unique():
        current = positions & (block == number)
        if not current.any():
            continue
        # earlier blocks are written, later ones are fully open
        later = (block > number) & (document > 0)
        canvas = masked_canvas(denoiser, clean, current | later, document)
        alone = denoiser(canvas, positions=current).logits
        torch.testing.assert_close(alone, together[current], atol=1e-5, rtol=1e-5)
        assert denoiser(canvas).logits[current].allclose(alone, atol=1e-5)  # cropping later blocks changes nothing


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_with_a_token_causal_clean_half_block_starts_are_the_ar_model(size: int) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(size))
    clean = texts(2, 12)
    canvas = Canvas.clean(clean)
    starts = (canvas.position_ids % size == 0) & (canvas.position_ids > 0)
    noisy = masked_canvas(denoiser, clean, starts, canvas.document)
    ar = denoiser(canvas, attention=Causal()).logits
    torch.testing.assert_close(denoiser(noisy, clean, positions=starts).logits, ar[starts], atol=1e-5, rtol=1e-5)
    all_but_first = canvas.position_ids > 0
    both = denoiser(noisy, clean, positions=starts, ar_positions=all_but_first)
    torch.testing.assert_close(both.ar_logits, ar[all_but_first], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [Bidirectional(), Causal(), BlockCausal(2)])
def test_logits_do_not_depend_on_the_rest_of_the_batch(pattern: AttentionPattern) -> None:
    denoiser = tiny_denoiser("llama", pattern)
    canvas = Canvas.from_tokens([[3, 4, 5, None, None], [6, None, None], [7, 8, 9, 10, None, None]], noise=MASK, pad=0)
    together = denoiser(canvas).logits
    for row, length in enumerate((5, 3, 6)):
        alone = denoiser(canvas[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, 1:length], alone[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lazy_logits_equal_those_of_forward(family: str) -> None:
    """This includes networks with soft caps, scales and heads of several layers."""
    denoiser = tiny_denoiser(family, kernel="eager" if family == "gemma2" else "sdpa")
    canvas = Canvas.from_tokens([[1, 5, None, 6, None, None], [1, None, 4]], noise=MASK, pad=0)
    eager, lazy = denoiser(canvas, positions=canvas.open).logits, denoiser.predict(canvas, positions=canvas.open)
    torch.testing.assert_close(lazy.logits, eager)
    torch.testing.assert_close(lazy[torch.tensor([2, 0])].logits, eager[[2, 0]])
    assert denoiser.predict(canvas, positions=torch.zeros_like(canvas.open)).logits.shape == (0, eager.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert", "gemma3_text"])
@pytest.mark.parametrize("half", ["token", "block"])
def test_blocks_without_requested_positions_are_left_out_with_the_same_logits(
    family: str, half: Literal["token", "block"], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = tiny_denoiser(family, BlockCausal(4, clean=half))
    document = torch.tensor([[1] * 20, [1] * 7 + [2] * 9 + [0] * 4])
    clean = texts(2, 20)
    positions = torch.zeros(2, 20, dtype=torch.bool)
    positions[0, [1, 4, 9, 10]] = positions[1, [4, 5, 6, 14]] = True
    canvas = masked_canvas(denoiser, clean, positions, document)
    lengths, ar = [], document > 0
    denoiser.network.base_model.register_forward_hook(lambda m, a, out: lengths.append(out[0].shape[1]))
    with monkeypatch.context() as patch:
        patch.setattr(AttentionInputs, "keep_only", lambda inputs, keep: inputs)
        full = denoiser(canvas, clean, positions=positions, ar_positions=ar)
    real = AttentionInputs.keep_only
    monkeypatch.setattr(AttentionInputs, "keep_only", lambda inputs, keep: real(inputs, keep, multiple=1))
    reduced = denoiser(canvas, clean, positions=positions, ar_positions=ar)
    torch.testing.assert_close(reduced.logits, full.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reduced.ar_logits, full.ar_logits, atol=1e-5, rtol=1e-4)
    # Under shift, position 4 of the first row is predicted from clean text, so its noisy block is not needed.
    assert lengths == [40, 28] if denoiser.diffusion_config.shift else [40, 32]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_two_canvases_of_a_text_share_its_clean_half(family: str) -> None:
    """One pass over [noisy, its complement, clean] gives the same logits as one pass for each canvas."""
    denoiser = tiny_denoiser(family, BlockCausal(4, clean="token" if family in CAUSAL else "block"))
    document = torch.tensor([[1] * 20, [1] * 7 + [2] * 9 + [0] * 4])
    clean = denoiser.predictable(Canvas.clean(texts(2, 20), document))
    time, generator = PerBlock(4, complement=True), torch.Generator().manual_seed(1)
    batch = noised(clean, time, Linear(), MASK, ar_share=0.3, generator=generator)
    ar = batch.ar_positions | batch.canvas.open
    together = denoiser(batch.canvas, batch.text, positions=batch.canvas.open, ar_positions=ar)
    apart = denoiser(batch.canvas, batch.clean, positions=batch.canvas.open, ar_positions=ar)
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.ar_logits, apart.ar_logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("time", [PerBlock(4, complement=True), PerBlock(4, min_t=1.0)], ids=["some", "all"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "gemma3_text"])
def test_texts_of_a_group_share_what_they_begin_with(family: str, time: PerBlock) -> None:
    """One row for each group gives the same logits as one row for each text, and is shorter than its texts."""
    denoiser = tiny_denoiser(family, BlockCausal(4, clean="token" if family in CAUSAL else "block"))
    tokens = texts(6, 20)
    tokens[1:3, :9], tokens[4:, :3] = tokens[0, :9], tokens[3, :3]  # three texts begin with 9 tokens, three with 3
    lengths = torch.tensor([20, 14, 18, 12, 20, 12])
    document = (torch.arange(20) < lengths[:, None]).long()
    clean = denoiser.predictable(Canvas.clean(tokens, document, (torch.arange(20) > 2) & (document > 0)))
    generator = torch.Generator().manual_seed(1)
    batch = noised(clean, time, Linear(), MASK, ar_share=0.5, generator=generator)
    asked = {"positions": batch.targets, "ar_positions": batch.ar_positions | batch.targets}
    widths = []
    denoiser.network.base_model.register_forward_hook(lambda m, a, out: widths.append(out[0].shape[:2]))
    apart, together = (denoiser(batch.canvas, batch.text, group=group, **asked) for group in (1, 3))
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.ar_logits, apart.ar_logits, atol=1e-5, rtol=1e-4)
    assert widths[1][0] == 2 and widths[1].numel() < widths[0].numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_the_chunked_loss_has_the_gradients_of_one_over_all_logits(
    family: str, distill: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes networks with tied weights and heads of several layers."""
    if family in MASKED and distill:
        pytest.skip("a masked LM has no AR half")
    kernel = "eager" if family == "gemma2" else "sdpa"
    pattern = BlockCausal(4) if family in CAUSAL else Bidirectional()
    denoiser = tiny_denoiser(family, pattern, kernel=kernel, tie_word_embeddings=True)
    ar_weight = 0.5 if family in CAUSAL else 0.0
    objective = Objective(ar_weight=ar_weight, distill=distill, label_smoothing=0.1)
    generator = torch.Generator().manual_seed(3)
    clean = denoiser.predictable(Canvas.clean(texts(3, 12)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, ar_share=0.25, generator=generator)
    requested: Any = {"positions": batch.canvas.open, "ar_positions": objective.ar_targets(batch)}

    def gradients(loss: Any) -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        loss.total.backward()
        return {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}

    prediction = denoiser(batch.canvas, batch.clean, **requested)
    expected = objective(
        LazyLogits.from_tensor(prediction.logits), LazyLogits.from_tensor(prediction.ar_logits), batch, Linear()
    )
    monkeypatch.setattr(logits, "TRAINING_CHUNK_SIZE", 5)
    chunked = denoiser(batch.canvas, batch.clean, **requested, loss=lambda a, b: objective(a, b, batch, Linear()))
    torch.testing.assert_close(chunked.loss.total, expected.total)
    torch.testing.assert_close(chunked.loss.nll, expected.nll)
    torch.testing.assert_close(chunked.loss.ar_nll, expected.ar_nll)
    actual, reference = gradients(chunked.loss), gradients(expected)
    assert actual.keys() == reference.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], reference[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_chunked_loss_under_autocast() -> None:
    denoiser, objective = tiny_denoiser("llama", BlockCausal(4), tie_word_embeddings=True), Objective(ar_weight=0.5)
    clean = denoiser.predictable(Canvas.clean(texts(3, 12)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, ar_share=0.5, generator=torch.Generator().manual_seed(3))
    grads = []
    for autocast in (False, True):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = denoiser(
                batch.canvas, batch.clean, positions=batch.canvas.open, ar_positions=objective.ar_targets(batch),
                loss=lambda a, b: objective(a, b, batch, Linear()),
            )  # fmt: skip
        prediction.loss.total.backward()
        grads.append(torch.cat([weight.grad.flatten() for weight in denoiser.parameters() if weight.grad is not None]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.995 and len(grads[0]) == len(grads[1])


def test_frozen_weights_under_adapters_get_no_gradient() -> None:
    denoiser, objective = tiny_denoiser("llama", BlockCausal(4)), Objective()
    add_lora(denoiser.network, Lora(2), MASK, "base")
    clean = denoiser.predictable(Canvas.clean(texts(2, 8)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, generator=torch.Generator().manual_seed(3))
    prediction = denoiser(
        batch.canvas, batch.clean, positions=batch.canvas.open, loss=lambda a, b: objective(a, b, batch, Linear())
    )
    prediction.loss.total.backward()
    trained = {name for name, weight in denoiser.named_parameters() if weight.grad is not None}
    assert trained and trained == {name for name, weight in denoiser.named_parameters() if weight.requires_grad}


def test_a_length_head_grows() -> None:
    denoiser = tiny_denoiser("llama")
    denoiser.add_length_head(4)
    first = denoiser.length_head
    for longest, expected in ((6, 6), (3, 6)):
        denoiser.add_length_head(longest)
        assert first and denoiser.length_head and denoiser.diffusion_config.longest_answer == expected
        assert torch.equal(denoiser.length_head.inner.weight, first.inner.weight)
        assert torch.equal(denoiser.length_head.outer.weight[:4], first.outer.weight)
        assert len(denoiser.length_head.outer.bias) == expected
