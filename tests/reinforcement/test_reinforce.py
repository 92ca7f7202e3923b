"""Runs that learn from rewards: they improve, resume bit for bit, and lose nothing when a reward fails."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffusify
from diffusify.diffusion.policy_objectives import Espo, Grpo, TraceRl
from diffusify.models.lora import Lora
from diffusify.models.recipes import ar, block, mlm
from diffusify.models.saving import load_denoiser
from diffusify.reinforcement.reinforce import reinforce
from diffusify.reinforcement.reward_trainer import RewardTrainer
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget

SMALL: dict[str, Any] = {
    "prompt": "{question}", "group": 4, "prompts": 2, "max_new_tokens": 8, "steps": 3, "held_out": 2, "bf16": False,
    "learning_rate": 1e-2, "warmup_steps": 0,
}  # fmt: skip


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of vowels: a reward that a byte-level model can raise at once."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "questions.jsonl"
    lines = [json.dumps({"question": f"cat {i}", "answer": f"#### {i}"}) + "\n" for i in range(24)]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="session")
def models(
    causal_base: str, masked_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("policies")
    made = {"block": (causal_base, block()), "ar": (causal_base, ar()), "mlm": (masked_base, mlm(20))}
    options: dict[str, Any] = {"steps": 1, "length": 32, "held_out": 64, "bf16": False}
    return {
        name: str(adapt(base, corpus, folder / name, recipe=recipe, **options)) for name, (base, recipe) in made.items()
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "training.json").read_text())["log"]


POLICIES = [("block", Grpo()), ("block", TraceRl()), ("ar", Espo()), ("mlm", Espo())]


@pytest.mark.parametrize(("kind", "policy"), POLICIES, ids=["grpo", "tracerl", "espo-ar", "espo-mlm"])
def test_rewards_rise(kind: str, policy: Any, models: dict[str, str], questions: str, tmp_path: Path) -> None:
    options = SMALL | {"steps": 12, "group": 8}
    out = reinforce(models[kind], questions, tmp_path / "out", rewards=vowels, policy=policy, **options)
    rewards = [entry["reward"] for entry in log_of(out) if "reward" in entry]
    assert len(rewards) == 12 and sum(rewards[-3:]) > sum(rewards[:3])
    evaluations = [entry for entry in log_of(out) if "eval_reward" in entry]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["eval_reward"] > evaluations[0]["eval_reward"]
    lines = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert sum(line["split"] == "train" for line in lines) == 12 * 16
    assert diffusify.load(out).generate("cat", max_new_tokens=4).text
