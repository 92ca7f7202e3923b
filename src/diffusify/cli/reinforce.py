"""`diffusify reinforce`: train a diffusion model on the rewards of its own answers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusify.cli.options import Model, argument_types, parse_options, training_argument_types, unescape
from diffusify.cli.terminal import console, report_errors, suggest
from diffusify.cli.training_options import LoraRank, Minutes, data_source, folder_name

# The arguments of the Python function, and the fields of the sampling settings, that `-o` sets.
_RUN_OPTIONS = ("held_out", "seed", "reward_seconds", "rollout_tokens", "max_corrupt", "max_skipped")
_SAMPLING_OPTIONS = ("threshold", "window", "cache")


class PolicyName(StrEnum):
    """The policy objectives of `diffusify.diffusion.policy_objectives`."""

    grpo = "grpo"
    espo = "espo"
    tracerl = "tracerl"


def reinforce(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Records with a prompt, a question or a chat each, as for `diffusify tune`. Their other fields are "
            "passed to the rewards. Can be given several times."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Reward function in TRL's form: module:function, file.py:function, or builtin:NAME with NAME one of "
            "math, code, json and format:REGEX. 0.5*NAME is its weight. Can be given several times."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=r"Template of the prompt, with the fields of a record in braces, such as 'Q: {question}\nA:'.",
            show_default="the chat template of the model",
        ),
    ] = None,
    policy: Annotated[
        PolicyName | None,
        typer.Option(
            help="Objective: grpo for the AR half of a block model, tracerl for threshold decoding in blocks, espo for "
            "bidirectional models.",
            show_default="what fits the model",
        ),
    ] = None,
    group: Annotated[int, typer.Option(help="Number of answers that are sampled to each prompt.")] = 8,
    prompts: Annotated[int, typer.Option(help="Number of prompts in a step.")] = 4,
    updates: Annotated[int, typer.Option(help="Number of optimizer steps with the same answers.")] = 1,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled answers.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")] = 256,
    lora: LoraRank = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder where the model is saved.", show_default="runs/reinforced-MODEL"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            metavar="KEY=VALUE",
            help="Set a field of the policy (clip, kl_weight, drafts, samples), of the run (held_out, seed, "
            "reward_seconds, rollout_tokens), of sampling (threshold, window, cache), of LoRA (alpha) or of "
            "transformers.TrainingArguments, for example -o learning_rate=5e-5. Can be given several times.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Number of optimizer steps.", show_default="100", rich_help_panel="Training length"),
    ] = None,
    minutes: Minutes = None,
) -> None:
    """Train a diffusion model on the rewards of its own answers (reinforcement learning).

    A step samples a group of answers to each prompt, asks the rewards for their value, and makes answers that are
    better than the others of their group more likely. To resume an interrupted run, give the same command again.
    """
    with report_errors():
        try:
            from diffusify.diffusion.policy_objectives import Espo, Grpo, TraceRl
            from diffusify.models.bundled import find_diffusion_config
            from diffusify.models.lora import Lora
            from diffusify.reinforcement.reinforce import default_policy
            from diffusify.reinforcement.reinforce import reinforce as run
            from diffusify.sampling.sampling_config import SamplingConfig
        except ImportError as error:
            raise ValueError(str(error)) from error

        if not reward:
            raise ValueError("--reward is missing; give builtin:math, or a function of your own as module:function")
        classes: dict[PolicyName, Any] = {PolicyName.grpo: Grpo, PolicyName.espo: Espo, PolicyName.tracerl: TraceRl}
        config = find_diffusion_config(model)
        make_policy = classes[policy] if policy else type(default_policy(config)) if config else Grpo
        policy_options, run_options, sampling_options, lora_options, training_options = parse_options(
            option or [],
            argument_types(make_policy.__init__),
            argument_types(run, *_RUN_OPTIONS),
            argument_types(SamplingConfig, *_SAMPLING_OPTIONS),
            argument_types(Lora, "alpha", "embeddings") if lora is not None else {},
            training_argument_types(),
        )
        folder = run(
            model,
            data_source(data),
            out or Path("runs") / f"reinforced-{folder_name(model)}",
            rewards=reward,
            policy=make_policy(**policy_options),
            prompt=None if prompt is None else unescape(prompt),
            sampling=SamplingConfig(temperature=temperature, **sampling_options),
            group=group,
            prompts=prompts,
            updates=updates,
            max_new_tokens=max_new_tokens,
            lora=None if lora is None else Lora(lora, **lora_options),
            steps=steps,
            minutes=minutes,
            console=console,
            **run_options,
            **training_options,
        )
        curve = folder / "curve.png"  # missing if nothing was evaluated
        console.print(f"saved {folder}" + f"  (reward curve: {curve})" * curve.is_file(), soft_wrap=True)
        suggest(f"diffusify chat {folder}")
