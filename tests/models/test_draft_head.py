"""A draft head makes drafts depend on each other, is saved and trained further, and never changes a text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import training_inputs
from diffusify.diffusion.corruption import PerBlock, noised
from diffusify.diffusion.objectives import CANDIDATES
from diffusify.diffusion.schedules import Linear
from diffusify.models.denoiser import Denoiser
from diffusify.models.draft_head import DraftHead
from diffusify.models.recipes import block, draft
from diffusify.models.saving import load_denoiser
from diffusify.sampling.draft_tree import DraftTree
from diffusify.sampling.drafts import ChainedDrafts
from diffusify.sampling.speculative import Speculative
from diffusify.training.adapt import adapt
from tests.families import CAUSAL, MASK
from tests.sampling.test_speculative import ROWS, block_denoiser, greedy

SMALL: dict[str, Any] = {
    "steps": 2,
    "length": 32,
    "held_out": 64,
    "bf16": False,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
}


def with_random_head(family: str) -> Denoiser:
    """A block model whose head changes drafts at random."""
    plain = block_denoiser(4, family)
    config = draft(4, head=8).diffusion_config(plain.diffusion_config.architecture, MASK, "some/base")
    denoiser = Denoiser(plain.network, config).eval()
    assert denoiser.draft_head is not None
    torch.manual_seed(0)
    torch.nn.init.normal_(denoiser.draft_head.outer.weight)
    return denoiser


def test_a_new_head_changes_nothing() -> None:
    head, hidden, previous = DraftHead(6, 4), torch.randn(3, 6), torch.randn(3, 6)
    assert torch.equal(head(hidden, previous), hidden)
    torch.nn.init.ones_(head.outer.weight)
    assert not torch.allclose(head(hidden, previous), head(hidden, previous.flip(0)))
    scaled = head(hidden, 7 * previous)  # embeddings have any scale
    torch.testing.assert_close(scaled, head(hidden, previous), atol=1e-4, rtol=1e-4)


def test_every_mask_learns_with_and_without_the_token_before() -> None:
    """The loss is that of the masks' own logits and that of the head's, and both give gradients to the adapters."""
    denoiser, objective = with_random_head("llama").train(), draft(4).objective
    generator = torch.Generator().manual_seed(0)
    clean = denoiser.predictable(Canvas.clean(torch.randint(1, MASK, (2, 12), generator=generator)))
    batch = noised(clean, PerBlock(4, min_t=1.0), Linear(), MASK, generator=generator)
    batch = replace(batch, weight=batch.weight * draft(4).position_weight(batch.canvas))
    positions, ar_positions = batch.targets, objective.ar_targets(batch)
    common: dict[str, Any] = {"positions": positions, "ar_positions": ar_positions}
    found = denoiser(batch.canvas, batch.clean, **common, loss=lambda a, b: objective(a, b, batch, Linear())).loss
    prediction = denoiser(batch.canvas, batch.clean, **common)
    truth = prediction.ar_logits.softmax(-1)
    plain = -(truth * prediction.logits.log_softmax(-1).masked_fill(truth == 0, 0.0)).sum()
    inputs = training_inputs(denoiser.diffusion_config.attention, batch.canvas, batch.clean, positions, shift=1)
    hidden = denoiser.hidden_states(inputs, inputs.flat_index(inputs.output_index, positions))
    after = batch.clean.roll(1, 1)[positions]
    assert denoiser.draft_head is not None
    changed = denoiser.project(denoiser.draft_head(hidden, denoiser.embed(after)))
    tokens = prediction.logits.topk(min(CANDIDATES, MASK + 1)).indices
    log_probs = changed.gather(1, tokens).masked_fill(tokens == MASK, -1e4).log_softmax(-1)
    with_head = -(truth.gather(1, tokens) * log_probs).sum()
    torch.testing.assert_close(found.total, plain + with_head, atol=1e-3, rtol=1e-4)
    found.total.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in denoiser.draft_head.parameters())


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_any_head_gives_the_text_of_the_base(family: str) -> None:
    denoiser = with_random_head(family)
    frames = list(Speculative(denoiser)(Canvas.from_tokens(ROWS, noise=MASK, pad=0), noise=MASK))
    for row, tokens in zip(ROWS, frames[-1].canvas.tokens.tolist(), strict=True):
        assert tokens[: len(row)] == greedy(denoiser.network, row)


@pytest.mark.parametrize("family", sorted(CAUSAL))
@torch.no_grad()
def test_probabilities_are_those_of_the_whole_head(family: str) -> None:
    """Computed for the candidates alone, or by the network's own head where it is not the embedding."""
    denoiser = with_random_head(family)
    assert denoiser.draft_head is not None
    canvas = Canvas.from_tokens(ROWS[:1], noise=MASK, pad=0)
    inputs = denoiser.diffusion_config.attention(canvas, shift=1)
    hidden = denoiser.hidden_states(inputs, torch.arange(3, 6))
    logits = denoiser.project(hidden)[None]
    drafts = ChainedDrafts.from_masks(denoiser, logits, hidden[None], torch.tensor([7]))
    path = torch.tensor([[[5, -1, -1], [9, -1, -1]]])
    for _ in range(2):  # the first call finds out how
        found = drafts.prob_after(1, path)
        for i, previous in enumerate((5, 9)):
            changed = denoiser.draft_head(hidden[1:2], denoiser.embed(torch.tensor([previous])))
            expected = denoiser.project(changed)[0].softmax(-1)[drafts.tokens[0, 1]]
            torch.testing.assert_close(found[0, i], expected, atol=1e-4, rtol=1e-3)
    first = denoiser.draft_head(hidden[:1], denoiser.embed(torch.tensor([7])))  # follows the latest token
    expected = denoiser.project(first)[0].softmax(-1)[drafts.tokens[0, 0]]
    torch.testing.assert_close(drafts.prob_after(0, path[:, :1])[0, 0], expected, atol=1e-4, rtol=1e-3)
    nothing = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0)
    tree = DraftTree.from_drafts(drafts, *nothing, 300, 4)
    node = int((tree.depth[0] == 2).nonzero()[0])
    chosen = tree.path[:, node : node + 1]
    probs = [drafts.prob_after(depth, chosen)[0, 0][drafts.tokens[0, depth] == chosen[0, 0, depth]] for depth in (0, 1)]
    torch.testing.assert_close(tree.prob[0, node], (0.999 * probs[0] * 0.999 * probs[1])[0])


def test_a_head_is_trained_saved_and_trained_further(causal_base: str, corpus: str, tmp_path: Path) -> None:
    first = adapt(causal_base, corpus, tmp_path / "first", recipe=draft(4, head=8), **SMALL)
    assert DiffusionConfig.load(first).draft_head == 8
    weights = load_file(first / "draft_head.safetensors")
    assert weights["outer.weight"].abs().max() > 0
    head = load_denoiser(first)[0].draft_head
    assert head is not None and torch.equal(head.outer.weight, weights["outer.weight"])
    second = adapt(str(first), corpus, tmp_path / "second", **dict(SMALL, learning_rate=1e-9))
    later = load_file(second / "draft_head.safetensors")
    assert all((later[name] - weight).abs().max() < 1e-6 for name, weight in weights.items())
    (first / "draft_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names a head whose file draft_head.safetensors is missing"):
        load_denoiser(first)
    with pytest.raises(ValueError, match=r"names a head whose file draft_head.safetensors is missing"):
        adapt(str(first), corpus, tmp_path / "third", **SMALL)


def test_heads_are_for_drafting_adapters() -> None:
    with pytest.raises(ValueError, match="draft_head=0 must be above 0"):
        draft(4, head=0)
    with pytest.raises(ValueError, match="is for drafting adapters"):
        replace(block(4), draft_head=8)
