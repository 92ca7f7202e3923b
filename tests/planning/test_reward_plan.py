"""Plans of runs that learn from rewards: their parts add up, and their FLOPs are those of real passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diffusify.diffusion.attention_inputs import AttentionInputs
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import Lora
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block
from diffusify.planning.footprint import Footprint, flop_counter
from diffusify.planning.plan import Plan, plan
from diffusify.planning.reward_plan import GROUP, RewardPlan, parse_answers
from diffusify.training.adapt import adapt

CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def learning(recipe: Recipe, answers: float, **options: Any) -> Plan:
    return plan(CONFIG, tokens=answers * 32, gpus="H100", length=32, recipe=recipe, batch=4, **options)


def test_answers_are_a_number_and_a_length() -> None:
    assert parse_answers("6400x64") == (6400.0, 64) and parse_answers("1.5K x 8") == (1500.0, 8)
    for text in ("6400", "x64", "6400x", "6400x-1", "6400x0", "0x8"):
        with pytest.raises(ValueError, match="answers="):
            parse_answers(text)


def test_time_and_memory_are_those_of_both_parts() -> None:
    found = RewardPlan(learning(block(4), 1e6), 1e6, 8)
    assert 0 < found.sampling_hours < found.hours == found.sampling_hours + found.learning_hours
    assert found.positions == 8 + 24 / GROUP
    assert found.memory == max(found.sampling_memory, found.learning_memory)
    twice = RewardPlan(learning(block(4), 2e6), 2e6, 8)
    assert twice.hours == pytest.approx(2 * found.hours) and twice.memory == found.memory
    assert RewardPlan(learning(block(4), 1e6), 1e6, 16).sampling_flops > found.sampling_flops
    assert found.to_dict()["learning"]["tokens"] == 32e6


def test_a_bidirectional_model_runs_the_whole_text_for_each_token() -> None:
    blocks, whole = (RewardPlan(learning(recipe, 1e6), 1e6, 16) for recipe in (block(4), ar(annealing_steps=0)))
    assert whole.sampling_flops > 2 * blocks.sampling_flops
    assert whole.positions == 32 and whole.learning_hours > whole.learning.hours


def test_the_reference_shares_weights_that_are_not_trained() -> None:
    every, few = (RewardPlan(learning(block(4), 1e6, lora=lora), 1e6, 8) for lora in (None, Lora(4)))
    assert every.learning_memory - every.learning.memory.total == 4 * every.learning.parameters.total
    assert few.learning_memory - few.learning.memory.total == 4 * few.learning.parameters.trained


def test_flops_are_those_of_a_real_pass_except_attention() -> None:
    """Attention over 32 positions is a small part."""
    planned = RewardPlan(learning(ar(annealing_steps=0), 1.0), 1.0, 8)
    denoiser = Denoiser(LlamaForCausalLM(CONFIG), block(4).diffusion_config("", 0, ""))
    tokens = torch.zeros(1, 32, dtype=torch.long)
    inputs = AttentionInputs(tokens, tokens, tokens, tokens, lambda b, h, q, k: k <= q, per_row=False)
    with torch.no_grad(), flop_counter() as real:
        denoiser.project(denoiser.hidden_states(inputs, torch.arange(8)))
    assert planned.reference_flops == pytest.approx(real.get_total_flops(), rel=0.15)


@pytest.mark.parametrize("new_tokens", [0, 32])
def test_answers_must_be_shorter_than_texts(new_tokens: int) -> None:
    with pytest.raises(ValueError, match="fewer than length=32, which includes the prompt"):
        RewardPlan(learning(block(4), 1e6), 1e6, new_tokens)
    several = plan(CONFIG, tokens=1e6, gpus="8xH100", length=32, recipe=block(4), batch=4)
    with pytest.raises(ValueError, match="8xH100 are 8 devices, and reinforcement uses 1"):
        RewardPlan(several, 1e6, 8)


def test_a_model_with_adapters_continues_with_them(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapt(causal_base, corpus, tmp_path, lora=Lora(4), steps=1, length=32, held_out=64, bf16=False)
    steps = Footprint(1e9, 0.0, 1e6, 1e6), Footprint(4e9, 0.0, 4e6, 4e6)
    monkeypatch.setattr("diffusify.planning.plan._counted_steps", lambda *arguments: steps)
    found = plan(str(folder), tokens=1e6, gpus="L4", length=32)
    assert found.setup.lora == Lora(4, 8) and 0 < found.parameters.trained < found.parameters.total
    with pytest.raises(ValueError, match="training continues with these; omit --lora"):
        plan(str(folder), tokens=1e6, gpus="L4", length=32, lora=Lora(4))
