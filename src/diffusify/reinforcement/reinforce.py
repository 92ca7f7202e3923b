"""Reinforcement learning: a diffusion model learns from rewards of the texts that it samples."""

import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffusify.config import DiffusionConfig, keeps_ar_model, to_plain
from diffusify.diffusion.policy_objectives import Espo, Grpo, PolicyObjective, TraceRl
from diffusify.models.attention_check import check_attention
from diffusify.models.bundled import find_diffusion_config, resolve_model
from diffusify.models.document_frame import choose_frame
from diffusify.models.lora import Lora, adapter_base, check_lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import saved_recipe
from diffusify.models.saving import open_base
from diffusify.planning.reward_plan import texts_per_pass
from diffusify.reinforcement.reward_progress import RewardProgress, draw_rewards
from diffusify.reinforcement.reward_prompts import columns_of, make_prompts, split_off_held_out
from diffusify.reinforcement.reward_trainer import Reinforcement, RewardTrainer
from diffusify.reinforcement.rewards import make_rewards
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.sources import load_records, source_checksum
from diffusify.training.adapt import known_frame
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_run_folder, check_training_options, train

_DISTORTING = (
    *("top_k", "top_p", "repetition_penalty", "suppress_tokens", "logits_processor", "regex", "stop", "guidance"),
)


def reinforce(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    rewards: Any,
    policy: PolicyObjective | None = None,
    prompt: str | None = None,
    sampling: SamplingConfig | None = None,
    group: int = 8,
    prompts: int = 4,
    updates: int = 1,
    max_new_tokens: int = 256,
    lora: Lora | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    held_out: int = 32,
    seed: int = 0,
    reward_seconds: float = 60.0,
    rollout_tokens: int = 16384,
    max_skipped: int = 10,
    max_corrupt: float = 0.01,
    console: Console | None = None,
    **training: Any,
) -> Path:
    """Train a diffusion model on the rewards of its own answers, and save it in `out`.

    - `model`: a folder that `adapt` or `tune` made, or a bundled model. It continues with its own adapters; `lora`
      trains new ones instead of all weights.
    - `data`: records as `load_records` takes them, with a chat, a question or a prompt each. `prompt` is a template of
      the prompt; default: the chat before its last answer. Other fields are passed to the rewards.
    - `rewards`: one or several functions `reward(prompts, completions, **columns) -> list[float]` as in TRL, or names
      of them (see `make_rewards`); rewards are added up with their weights.
    - `policy`: `Grpo()` for models that keep their AR half, `TraceRl()` for other block models (and for threshold
      decoding), `Espo()` for bidirectional ones; this is also the default.
    - `sampling`: how answers are sampled; default: temperature 1, and a `threshold` of 0.9 for `TraceRl`. Settings that
      distort probabilities, such as `top_p`, are refused.
    - Each rollout samples `group` answers of up to `max_new_tokens` to each of `prompts` prompts, and is used for
      `updates` optimizer steps.
    - `steps` or `minutes` is the budget, rollouts included; default: 100 steps.
    - `held_out` prompts, at most a tenth, are answered greedily to measure the reward; 0 measures nothing.
    - A reward function may take `reward_seconds`. Texts whose reward is not finite are left out and counted.
    - `rollout_tokens` is the number of positions that are sampled at the same time.

    Sampled texts and rewards are in `texts.jsonl`. Other arguments, resuming and errors are as in `tune`. Raises
    ValueError for bad arguments and for a reward that fails, after a checkpoint.
    """
    model, data, out, console = str(model), str(data), Path(out), console or Console(stderr=True, highlight=False)
    functions = make_rewards(rewards)
    training = check_training_options(training, minutes=minutes)
    config, recipe = find_diffusion_config(model), saved_recipe(model)
    if config is None or recipe is None:
        raise ValueError(f"{model} is not a diffusion model; make one with `diffusify adapt {model}` first")
    policy = policy or default_policy(config)
    sampling = _check_sampling(policy, sampling or SamplingConfig(temperature=1.0))
    check_policy(model, config, policy)
    check_lora(model, lora, recipe)
    _check_counts(group=group, prompts=prompts, updates=updates, max_new_tokens=max_new_tokens, held_out=held_out)
    if reward_seconds <= 0:
        raise ValueError(f"reward_seconds={reward_seconds} must be above 0; 60 is usual")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("reinforcement runs in one process; start it without torchrun or accelerate launch")
    budget = Budget(100 if steps is None and minutes is None else steps, minutes)
    has_adapters = lora is not None or adapter_base(resolve_model(model)) is not None
    defaults = {"learning_rate": 1e-4 if has_adapters else 1e-5, "logging_steps": 1}
    defaults |= {} if held_out else {"eval_strategy": "no"}
    training = defaults | training | _micro_batch(training, group * prompts, max_new_tokens)
    settings = {
        "model": model,
        "data": data,
        "data_checksum": source_checksum(data, records=True),
        "rewards": [{"name": each.name, "weight": each.weight} for each in functions],
        "policy": to_plain(policy),
        "sampling": to_plain(sampling),
        "prompt": prompt,
        "group": group,
        "prompts": prompts,
        "updates": updates,
        "max_new_tokens": max_new_tokens,
        "lora": to_plain(lora),
        "budget": {"steps": budget.steps, "minutes": minutes},
        "held_out": held_out,
        "seed": seed,
        "training": training,
    }
    if check_run_folder(out, settings):
        console.print(f"{out} already holds this run, finished")
        return out
    records = load_records(data, seed=seed)
    base = open_base(model)
    frame, note = choose_frame(base, known_frame(out, model))
    if note:
        console.print(note, markup=False, soft_wrap=True)
    torch.manual_seed(seed)  # new adapters are the same after a resume
    denoiser, tokenizer = make_denoiser(base, recipe, lora=lora, frame=frame)
    check_attention(denoiser)
    room = None if denoiser.context_length is None else denoiser.context_length - max_new_tokens
    loaded, notes = make_prompts(records, tokenizer, template=prompt, length=room, max_corrupt=max_corrupt)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    for function in functions:
        function.check_columns(list(columns_of(loaded)))
    order = random.Random(seed).sample(range(len(loaded)), len(loaded))
    train_prompts, held_prompts = split_off_held_out(loaded, held_out, order)
    make_trainer = partial(
        RewardTrainer,
        reinforcement=Reinforcement(
            policy, functions, sampling, group, prompts, updates, max_new_tokens, reward_seconds, rollout_tokens
        ),
        text_tokenizer=tokenizer,
    )
    return train(
        out, settings, denoiser, _training_recipe(recipe), base.tokenizer,
        rows=train_prompts, held_out=held_prompts, length=max_new_tokens, budget=budget, console=console,
        max_skipped=max_skipped, make_trainer=make_trainer, make_progress=RewardProgress, draw=draw_rewards,
    )  # fmt: skip


def default_policy(config: DiffusionConfig) -> PolicyObjective:
    """The policy objective that fits a model."""
    if config.keeps_ar_model:
        return Grpo()
    return Espo() if config.block_size is None else TraceRl()


def check_policy(model: str, config: DiffusionConfig, policy: PolicyObjective) -> None:
    """ValueError if a model cannot learn by a policy objective."""
    if config.adapters == "masks":
        raise ValueError(
            f"{model} has adapters that act on masks only, so its AR half, the frozen {config.base_model}, cannot "
            "learn from rewards; train adapters for all tokens first and reinforce that model: "
            f"diffusify adapt {config.base_model} --recipe block --lora 16"
        )
    if isinstance(policy, Grpo) and not config.keeps_ar_model:
        raise ValueError(f"Grpo needs a block model that keeps its AR half, and {model} has none; use {_other(config)}")
    if isinstance(policy, TraceRl) and config.block_size is None:
        raise ValueError(f"TraceRl needs a block model, and {model} is bidirectional; use {_other(config)}")
    if isinstance(policy, Espo) and config.block_size is not None:
        raise ValueError(f"Espo is for bidirectional models, and {model} decodes in blocks; use {_other(config)}")


def _other(config: DiffusionConfig) -> str:
    name = type(default_policy(config)).__name__
    return f"{name} (--policy {name.lower()})"


def _check_sampling(policy: PolicyObjective, sampling: SamplingConfig) -> SamplingConfig:
    """The settings with the defaults of a policy. ValueError if texts would not come from what the policy scores."""
    for name in _DISTORTING:
        if getattr(sampling, name) != getattr(SamplingConfig, name):
            raise ValueError(
                f"{name}={getattr(sampling, name)} changes the probabilities of sampled texts, which are scored "
                "without it; leave it out"
            )
    if sampling.temperature == 0:
        raise ValueError("temperature=0 samples equal answers, which teach nothing; 1.0 is usual")
    stepwise = sampling.stepwise_fields()
    if isinstance(policy, Grpo):
        if stepwise:
            raise ValueError(
                f"{stepwise[0]} decodes by the drafts, and Grpo scores the AR half, whose lossless decoding it needs; "
                "leave it out, or use TraceRl (--policy tracerl)"
            )
        if sampling.tolerance:
            raise ValueError(
                f"tolerance={sampling.tolerance} keeps drafts that the AR half did not sample; leave it out"
            )
        return replace(sampling, tolerance=0.0)
    if sampling.tolerance is not None:
        raise ValueError(f"tolerance={sampling.tolerance} is for Grpo; leave it out")
    return replace(sampling, threshold=0.9) if isinstance(policy, TraceRl) and not stepwise else sampling


def _check_counts(**given: int) -> None:
    least = {"group": 2, "held_out": 0}
    for name, value in given.items():
        if value < least.get(name, 1):
            reason = ": the answers to a prompt are compared with each other" if name == "group" else ""
            raise ValueError(f"{name}={value} must be at least {least.get(name, 1)}{reason}")


def _micro_batch(training: dict[str, Any], texts: int, max_new_tokens: int) -> dict[str, int]:
    """How the texts of a step are split into micro-batches. ValueError for a size that does not divide them."""
    if "gradient_accumulation_steps" in training:
        raise ValueError(
            "gradient_accumulation_steps follows from prompts and group; set per_device_train_batch_size, the number "
            "of texts in a forward pass, or leave it out"
        )
    size = texts_per_pass(max_new_tokens, training.get("per_device_train_batch_size"), texts)
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": texts // size}


def _training_recipe(recipe: Recipe) -> Recipe:
    """A model's recipe for its own texts: its drafts learn from its AR half, and nothing else is trained beside it."""
    objective = replace(recipe.objective, ar_weight=0.0, teacher="own", per="editable")
    if not keeps_ar_model(recipe.attention, recipe.shift):
        objective = replace(objective, distill=0.0, total_variation=0.0)
    return replace(recipe, objective=objective, infilling=0.0, spans=None, length_noise=None)
