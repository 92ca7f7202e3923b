"""Policy objectives: gradients against exact enumeration, ratios, divergences, and what stands after the end."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.corruption import Noised, PerBlock, PerText
from diffusify.diffusion.objectives import Loss
from diffusify.diffusion.policy_objectives import (
    NEVER,
    Espo,
    Grpo,
    PolicyLoss,
    PolicyObjective,
    SampledTexts,
    TraceRl,
    group_advantages,
    token_log_probs,
)
from diffusify.diffusion.schedules import Linear
from diffusify.models.denoiser import Denoiser
from tests.families import tiny_network

V, MASK, LENGTH = 4, 4, 3  # three-token answers of four tokens: 64 texts
TIMES = {"block": PerBlock(2), "ar": PerText()}


def toy(kind: str) -> Denoiser:
    network = tiny_network("llama", vocab_size=V + 1).double().train()
    pattern = BlockCausal(2) if kind == "block" else Bidirectional()
    return Denoiser(network, DiffusionConfig(MASK, 1, pattern, "LlamaForCausalLM"))


def every_text() -> SampledTexts:
    """All answers to one prompt, with advantages of 1."""
    answers = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    tokens = torch.cat([torch.tensor([[0, 1]]).expand(len(answers), -1), answers], 1)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    scored[:, 2:] = True
    canvas = Canvas.clean(tokens, torch.ones_like(tokens), scored)
    return SampledTexts(canvas, scored, torch.where(scored, 0, NEVER), torch.ones(len(tokens)))


def canvases(policy: PolicyObjective, texts: SampledTexts, kind: str, seed: int = 0) -> Noised:
    return policy.canvases(texts, TIMES[kind], Linear(), MASK, torch.Generator().manual_seed(seed))


def log_probs(denoiser: Denoiser, policy: PolicyObjective, noised: Noised) -> Tensor:
    found: list[Tensor] = []

    def score(logits: Any, ar_logits: Any) -> Loss:
        scored = ar_logits if policy.reads_ar_half else logits
        found.append(token_log_probs(scored, noised.clean[policy.scored(noised)]))
        none = torch.zeros(0)
        return Loss(torch.zeros(()), torch.ones(()), none, none)

    denoiser(noised.canvas, noised.text, positions=noised.targets, ar_positions=noised.ar_positions, loss=score)
    return found[0]


def gradient(denoiser: Denoiser, value: Tensor) -> Tensor:
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, grads, strict=True)]
    )


def policy_loss(policy: Any, denoiser: Denoiser, texts: SampledTexts, noised: Noised) -> PolicyLoss:
    log_prob = log_probs(denoiser, policy, noised)
    return policy(log_prob, log_prob.detach(), log_prob.detach(), noised, texts)


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [torch.nan, 1.0, 2.0, torch.nan]])
    third = 1 / 3
    expected = torch.tensor([[1.0, -third, -third, -third], [0.0] * 4, [0.0, -1.0, 1.0, 0.0]])
    advantages = group_advantages(rewards.double())
    torch.testing.assert_close(advantages.float(), expected)
    assert (advantages[1] == 0).all()  # exactly, though the mean of 0.1 is not 0.1


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Over all texts x, the expected advantage of x is R(x) - J, and the gradient is exactly that of J."""
    denoiser, texts, policy = toy("block"), every_text(), Grpo()
    noised = canvases(policy, texts, "block")
    log_prob = log_probs(denoiser, policy, noised).view(-1, LENGTH).sum(1)
    probability = log_prob.exp()
    assert float(probability.detach().sum()) == pytest.approx(1, abs=1e-9)
    rewards = torch.rand(len(probability), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_reward = (probability * rewards).sum()
    pairs = group_advantages(torch.cartesian_prod(rewards, rewards)).view(len(rewards), len(rewards), 2)
    advantage = (pairs[..., 0] * probability.detach()).sum(1)  # of x, over the other text of its group
    torch.testing.assert_close(advantage, (rewards - expected_reward).detach())
    weighted = replace(texts, advantage=probability.detach() * advantage)
    loss = policy_loss(policy, denoiser, weighted, noised)
    torch.testing.assert_close(gradient(denoiser, -loss.total), gradient(denoiser, expected_reward))


def exact_elbo(denoiser: Denoiser, texts: SampledTexts) -> Tensor:
    """The ELBO of each text: the mean over mask counts l, and over all masks of l of L tokens, of L / l times log p."""
    total = torch.zeros(len(texts.scored), dtype=torch.float64)
    masks = [mask for mask in itertools.product([False, True], repeat=LENGTH) if any(mask)]
    for mask in masks:
        open = torch.zeros_like(texts.scored)
        open[:, 2:] = torch.tensor(mask)
        tokens = torch.where(open, MASK, texts.canvas.tokens)
        logits = denoiser(replace(texts.canvas, tokens=tokens, open=open), positions=open).logits
        found = logits.log_softmax(-1).gather(-1, texts.canvas.tokens[open][:, None])[:, 0].view(len(open), -1)
        count = sum(mask)
        alike = sum(sum(other) == count for other in masks)
        total = total + found.sum(1) * LENGTH / count / alike / LENGTH
    return total


def test_the_elbo_and_its_gradient_are_right_on_average() -> None:
    denoiser, texts, policy = toy("ar"), every_text(), Espo(samples=2)
    texts = replace(texts[slice(0, 64, 8)], advantage=torch.linspace(-1, 1, 8, dtype=torch.float64))
    exact = exact_elbo(denoiser, texts)
    exact_gradient = gradient(denoiser, (texts.advantage * exact).sum() / LENGTH)
    direction = torch.randn(3, len(exact_gradient), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    elbos, projections = [], []
    for seed in range(48):
        noised = canvases(policy, texts, "ar", seed)
        log_prob = log_probs(denoiser, policy, noised)
        elbos.append(policy.elbo(log_prob.detach(), noised, texts))
        loss = policy(log_prob, log_prob.detach(), log_prob.detach(), noised, texts)
        projections.append(direction @ gradient(denoiser, -loss.total))
    for values, expected in (
        (torch.stack(elbos), exact.detach()),
        (torch.stack(projections), direction @ exact_gradient),
    ):
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - expected).abs() < 4 * error + 1e-9).all()


POLICIES = pytest.mark.parametrize(
    ("policy", "kind"), [(Grpo(), "block"), (TraceRl(), "block"), (Espo(), "ar")], ids=["grpo", "tracerl", "espo"]
)


@POLICIES
def test_the_first_step(policy: PolicyObjective, kind: str) -> None:
    """The ratio is 1, the divergence of a model from itself 0, and equal rewards give no gradient."""
    denoiser, texts = toy(kind), every_text()[slice(0, 6)]
    noised = canvases(policy, texts, kind)
    loss = policy_loss(policy, denoiser, texts, noised)
    assert float(loss.kl) == 0 and float(loss.clipped) == 0
    units = len(texts.advantage) * (1 if isinstance(policy, Espo) else LENGTH)
    assert float(loss.total.detach()) == -units and loss.count == units  # each ratio times an advantage of 1
    equal = replace(texts, advantage=torch.zeros(6))
    assert not gradient(denoiser, policy_loss(policy, denoiser, equal, noised).total).any()
    again = canvases(policy, texts, kind)  # the same for the old, the new and the reference model
    assert torch.equal(again.canvas.tokens, noised.canvas.tokens) and torch.equal(again.weight, noised.weight)


@POLICIES
def test_ratios_are_clipped_and_divergences_grow(policy: Any, kind: str) -> None:
    denoiser, texts = toy(kind), every_text()[slice(0, 6)]
    noised = canvases(policy, texts, kind)
    log_prob = log_probs(denoiser, policy, noised)
    ahead = policy(log_prob, log_prob.detach() - 1, log_prob.detach() - 1, noised, texts)
    assert float(ahead.clipped) == ahead.count and float(ahead.kl) > 0
    clipped = replace(policy, kl_weight=0.0)(log_prob, log_prob.detach() - 1, None, noised, texts)
    assert not gradient(denoiser, clipped.total).any()  # nothing is gained beyond the limit
    worse = replace(texts, advantage=-texts.advantage)
    pulled = replace(policy, kl_weight=0.0)(log_prob, log_prob.detach() - 1, None, noised, worse)
    assert float(pulled.clipped) == 0 and gradient(denoiser, pulled.total).any()


@POLICIES
def test_nothing_after_the_end_counts(policy: PolicyObjective, kind: str) -> None:
    """The tail's tokens are impossible (the mask token) or arbitrary: the loss is finite and the same."""
    denoiser, texts = toy(kind), every_text()[slice(0, 6)]
    scored = texts.scored.clone()
    scored[:, -1] = False
    tail = texts.scored & ~scored
    texts = replace(texts, scored=scored, step=texts.step.masked_fill(tail, NEVER))
    losses = []
    for token in (MASK, 0, 3):
        tokens = texts.canvas.tokens.masked_fill(tail, token)
        written = replace(texts, canvas=replace(texts.canvas, tokens=tokens, open=tail))
        noised = canvases(policy, written, kind)
        assert not (policy.scored(noised) & tail.repeat_interleave(noised.views, 0)).any()
        losses.append(gradient(denoiser, policy_loss(policy, denoiser, written, noised).total))
    assert losses[0].isfinite().all() and losses[0].any()
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grpo(clip=0.0), "clip=0.0 must be between 0 and 1"),
        (lambda: TraceRl(kl_weight=-1.0), "kl_weight=-1.0 must be at least 0"),
        (lambda: Grpo(drafts=-1.0), "drafts=-1.0 must be at least 0"),
        (lambda: Espo(samples=0), "samples=0 must be at least 1"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
