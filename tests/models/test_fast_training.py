"""What makes training steps fast changes nothing but rounding."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, AttentionPattern, BlockCausal, Causal
from diffusify.diffusion.corruption import PerBlock, noised
from diffusify.diffusion.objectives import Objective
from diffusify.diffusion.schedules import Linear
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import layers, optimize_for_training
from tests.families import CAUSAL, FAMILIES, MASK, tiny_denoiser

OBJECTIVE = Objective()


def learnt(denoiser: Denoiser, *, half: bool) -> dict[str, Any]:
    """The loss of a step and all gradients."""
    luck = torch.Generator().manual_seed(0)
    clean = denoiser.predictable(Canvas.clean(torch.randint(1, MASK, (4, 24), generator=luck)))
    batch = noised(clean, PerBlock(4), Linear(), MASK, generator=luck)
    denoiser.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        made: Any = denoiser(
            batch.canvas, batch.clean, positions=batch.canvas.open, loss=lambda a, b: OBJECTIVE(a, b, batch, Linear())
        )
    made.loss.total.backward()
    grads = {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}
    return {"loss": made.loss.total} | grads


def some_denoiser(family: str) -> Denoiser:
    kernel = "eager" if family == "gemma2" else "sdpa"
    return tiny_denoiser(family, BlockCausal(4, clean="token" if family in CAUSAL else "block"), kernel=kernel)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_autocast_nothing_is_narrowed(family: str) -> None:
    denoiser = some_denoiser(family)
    before = learnt(denoiser, half=False)
    optimize_for_training(denoiser.network)
    after = learnt(denoiser, half=False)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_stream_teaches_the_same_up_to_rounding(family: str) -> None:
    exact, plain, quick = (some_denoiser(family) for _ in range(3))
    optimize_for_training(quick.network)
    widths = set()
    for layer in layers(quick.network):
        layer.register_forward_hook(lambda m, a, out: widths.add((out[0] if isinstance(out, tuple) else out).dtype))
    told = learnt(exact, half=False), learnt(plain, half=True), learnt(quick, half=True)
    truth, autocast, narrow = (torch.cat([part.flatten().float() for part in one.values()]) for one in told)
    assert widths == {torch.bfloat16}
    assert torch.cosine_similarity(narrow, truth, dim=0) > torch.cosine_similarity(autocast, truth, dim=0) - 0.02


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_layers_teach_the_same() -> None:
    """In a process without the checks of types and shapes, which the compiler does not know."""
    code = """
from tests.models.test_compute import learnt, quicken, some_denoiser
plain, quick = some_denoiser("llama"), some_denoiser("llama")
quicken(quick.network, compiled=True)
before, after = learnt(plain, half=False), learnt(quick, half=False)
assert before.keys() == after.keys() and all(layer._compiled_call_impl for layer in quick.network.model.layers)
print(max(float((after[name] - before[name]).abs().max()) for name in before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-4


def flexed(query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, **_: Any) -> Tensor:
    """What flex attention is asked for, by the plain kernel: the real one must be compiled, which not every CPU can."""
    seen = create_mask(block_mask.mask_mod, block_mask.shape[0], 1, query.shape[2], key.shape[2], device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )


@pytest.mark.parametrize("pattern", [BlockCausal(4), BlockCausal(4, clean="block"), Causal(), Annealed(0.3)], ids=str)
@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("mistral", {"sliding_window": 8})])
@pytest.mark.parametrize("documents", [1, 2])
def test_flex_attention_is_told_who_looks_at_whom(
    monkeypatch: pytest.MonkeyPatch, pattern: AttentionPattern, family: str, settings: dict[str, int], documents: int
) -> None:
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", flexed)
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
