"""Faster training steps give the same losses and gradients up to rounding."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, AttentionPattern, BlockCausal, Causal
from diffusify.diffusion.corruption import PerBlock, noised
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.diffusion.objectives import Objective
from diffusify.diffusion.schedules import Linear
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training, transformer_layers
from diffusify.models.lora import Lora, add_lora
from tests.families import CAUSAL, FAMILIES, MASK, tiny_denoiser

OBJECTIVE = Objective()


def loss_and_gradients(denoiser: Denoiser, *, autocast: bool) -> dict[str, Any]:
    """The loss of one training step, and all gradients."""
    generator = torch.Generator().manual_seed(0)
    clean = denoiser.predictable(Canvas.clean(torch.randint(1, MASK, (4, 24), generator=generator)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, generator=generator)
    denoiser.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction: Any = denoiser(
            batch.canvas, batch.clean, positions=batch.canvas.open, loss=lambda a, b: OBJECTIVE(a, b, batch, Linear())
        )
    prediction.loss.total.backward()
    grads = {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}
    return {"loss": prediction.loss.total} | grads


def denoiser_of(family: str) -> Denoiser:
    kernel = "eager" if family == "gemma2" else "sdpa"
    return tiny_denoiser(family, BlockCausal(4, clean="token" if family in CAUSAL else "block"), kernel=kernel)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_autocast_nothing_changes(family: str) -> None:
    denoiser = denoiser_of(family)
    before = loss_and_gradients(denoiser, autocast=False)
    optimize_for_training(denoiser.network)
    after = loss_and_gradients(denoiser, autocast=False)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_gradients_are_as_exact_as_before(family: str) -> None:
    exact, plain, fast = (denoiser_of(family) for _ in range(3))
    optimize_for_training(fast.network)
    dtypes = set()
    for layer in transformer_layers(fast.network):
        layer.register_forward_hook(lambda m, a, out: dtypes.add((out[0] if isinstance(out, tuple) else out).dtype))
    float32, autocast, narrow = (
        torch.cat([values.flatten().float() for values in loss_and_gradients(denoiser, autocast=on).values()])
        for denoiser, on in ((exact, False), (plain, True), (fast, True))
    )
    assert dtypes == {torch.bfloat16}
    assert torch.cosine_similarity(narrow, float32, dim=0) > torch.cosine_similarity(autocast, float32, dim=0) - 0.02


@pytest.mark.parametrize("rows", ["all", "masks"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_frozen_weights_of_half_the_width_change_nothing_under_autocast(
    family: str, rows: Literal["all", "masks"]
) -> None:
    denoisers = []
    for dtype in (None, torch.bfloat16):
        plain = denoiser_of(family)
        torch.manual_seed(0)
        add_lora(plain.network, Lora(2), MASK, "base", rows)
        denoisers.append(Denoiser(plain.network, plain.diffusion_config))
        optimize_for_training(plain.network, autocast_dtype=dtype)
    wide, narrow = denoisers
    before, after = loss_and_gradients(wide, autocast=True), loss_and_gradients(narrow, autocast=True)
    kinds = {(weight.requires_grad, weight.dtype) for weight in narrow.parameters() if weight.ndim > 1}
    assert {(True, torch.float32), (False, torch.bfloat16)} <= kinds and (True, torch.bfloat16) not in kinds
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_trained_rows_beside_a_frozen_matrix_give_the_same_loss_and_gradients(family: str) -> None:
    denoiser = denoiser_of(family)
    torch.manual_seed(0)
    add_lora(denoiser.network, Lora(2), MASK, "base", length_tokens=LengthTokens(3, 4))
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.normal_()
    before = loss_and_gradients(denoiser, autocast=False)
    optimize_for_training(denoiser.network)
    after = loss_and_gradients(denoiser, autocast=False)
    assert before.keys() == after.keys() and any("trainable_tokens_delta" in name for name in before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_layers_have_the_same_gradients() -> None:
    """Runs in a process without the checks of types and shapes, which the compiler does not support."""
    code = """
from tests.models.test_fast_training import denoiser_of, loss_and_gradients, optimize_for_training
plain, fast = denoiser_of("llama"), denoiser_of("llama")
optimize_for_training(fast.network, compiled=True)
before, after = loss_and_gradients(plain, autocast=False), loss_and_gradients(fast, autocast=False)
assert before.keys() == after.keys() and all(layer._compiled_call_impl for layer in fast.network.model.layers)
print(max(float((after[name] - before[name]).abs().max()) for name in before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-4


def flex_reference(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, **_: Any
) -> Tensor:
    """Flex attention by the sdpa kernel, because flex attention must be compiled, which not every CPU supports."""
    mask = create_mask(block_mask.mask_mod, block_mask.shape[0], 1, query.shape[2], key.shape[2], device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )


@pytest.mark.parametrize("pattern", [BlockCausal(4), BlockCausal(4, clean="block"), Causal(), Annealed(0.3)], ids=str)
@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("mistral", {"sliding_window": 8})])
@pytest.mark.parametrize("documents", [1, 2])
def test_flex_attention_gets_the_same_mask(
    monkeypatch: pytest.MonkeyPatch, pattern: AttentionPattern, family: str, settings: dict[str, int], documents: int
) -> None:
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", flex_reference)
    document = torch.tensor([[1] * 20 + [documents] * 28, [1] * 9 + [documents] * 39])
    tokens = torch.randint(1, 40, (2, 48), generator=torch.Generator().manual_seed(0))
    batch = noised(
        Canvas.clean(tokens, document), PerBlock(4), Linear(), MASK, ar_share=0.3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    text = batch.text if isinstance(pattern, BlockCausal) else None
    plain, flex = (
        tiny_denoiser(family, pattern, kernel=kernel, **settings)(
            batch.canvas, text, positions=batch.canvas.open
        ).logits
        for kernel in ("sdpa", "flex_attention")
    )
    torch.testing.assert_close(flex, plain, atol=1e-4, rtol=1e-4)
