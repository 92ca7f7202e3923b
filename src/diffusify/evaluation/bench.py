"""How fast a model writes, and how well: every way to decode side by side, and `transformers.generate` beside them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, get_args

import torch
from matplotlib.figure import Figure
from transformers import GenerationConfig, PreTrainedModel

from diffusify.diffusion.policies import Klass, Unmask
from diffusify.diffusion.quotas import EntropyBudget, Factor
from diffusify.diffusion.ranking import Entropy
from diffusify.evaluation.text_metrics import distinct, entropy, perplexity
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import Preset, SamplingConfig
from diffusify.text.prompts import continuation_canvas

AR = "left to right"


@dataclass(frozen=True)
class Row:
    """One way to write, over all prompts: medians of rates, means of qualities.

    `speedup` is the median over prompts of the rate beside left-to-right decoding's in the same round. `agreement` is
    the share of tokens that equal those of one token per forward; `perplexity` is under the base's left-to-right model.
    """

    way: str
    tokens_per_second: float
    speedup: float | None
    tokens_per_forward: float
    agreement: float | None
    perplexity: float
    distinct_2: float
    entropy: float


def ways(lm: DiffusionLM) -> dict[str, SamplingConfig]:
    """What is worth a look for this kind of model: one token per forward, the presets, and what lies between them."""
    found = {"one token a forward": SamplingConfig(policy=Unmask())}
    found |= {name: SamplingConfig.preset(name, lm.config) for name in get_args(Preset)}
    if lm.config.reads_as_ar_model:
        found |= {f"tolerance {nats}": SamplingConfig(tolerance=nats) for nats in (0.3, 1.2, 3.0)}
    elif lm.config.sees_right_context:
        found["balanced, no cache"] = replace(found["balanced"], cache="none")
    found |= {f"threshold {least}": SamplingConfig(threshold=least) for least in (0.9, 0.7, 0.5)}
    found["factor 1"] = SamplingConfig(policy=Unmask(quota=Factor(1.0)))
    found["entropy 0.1"] = SamplingConfig(policy=Unmask(Entropy(), EntropyBudget(0.1)))
    found["stable"] = SamplingConfig(policy=Klass())
    return found


def bench(
    lm: DiffusionLM,
    base: PreTrainedModel,
    prompts: list[str],
    chosen: dict[str, SamplingConfig],
    *,
    max_new_tokens: int = 64,
    told: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Write every prompt in every way, round by round, so that a noisy machine is noisy to all of them.

    Left-to-right decoding is that of the model's own weights where they can, else of `base`.
    """
    own = lm.denoiser.network if lm.config.reads_as_ar_model else base
    texts: dict[str, list[list[int]]] = {AR: []} | {name: [] for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in texts}
    forwards: dict[str, list[int]] = {name: [] for name in texts}
    plain = next(iter(chosen))
    greedy_ar(lm, own, prompts[0], 4)
    for number, prompt in enumerate(prompts, 1):
        for name in texts:
            begun = perf_counter()
            if name == AR:
                ids = greedy_ar(lm, own, prompt, max_new_tokens)
                passes = len(ids)
            else:
                ids, passes = diffused(lm, prompt, max_new_tokens, chosen[name])
            seconds[name].append(perf_counter() - begun)
            texts[name].append(ids)
            forwards[name].append(passes)
        told(f"prompt {number} of {len(prompts)}")
    rows = []
    for name, written in texts.items():
        rates = [len(ids) / s for ids, s in zip(written, seconds[name], strict=True)]
        beside = [len(ids) / s for ids, s in zip(texts[AR], seconds[AR], strict=True)]
        tokens = sum(map(len, written))
        rows.append(
            Row(
                way=name,
                tokens_per_second=round(median(rates), 1),
                speedup=None if name == AR else round(median(a / b for a, b in zip(rates, beside, strict=True)), 2),
                tokens_per_forward=round(tokens / max(1, sum(forwards[name])), 2),
                agreement=None if name == AR else round(mean(map(_agreement, texts[plain], written)), 3),
                perplexity=round(perplexity(lm.tokenizer, base, prompts, written), 2),
                distinct_2=round(distinct(written, 2), 3),
                entropy=round(mean(map(entropy, written)), 2),
            )
        )
    return rows


def plot(rows: list[Row], file: Path) -> None:
    """Rate against perplexity: up and to the left is better."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        place = (row.perplexity, row.tokens_per_second)
        axes.scatter(*place, color="tab:red" if row.way == AR else "tab:blue")
        axes.annotate(row.way, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="perplexity under the base model", ylabel="tokens per second", ylim=(0, None))
    axes.margins(x=0.2)
    axes.grid(alpha=0.25)
    figure.savefig(file, dpi=150)


def diffused(lm: DiffusionLM, prompt: str, room: int, settings: SamplingConfig) -> tuple[list[int], int]:
    """What a model continues a prompt with, as token ids, and in how many forwards."""
    writing = lm.prepare_generation([prompt], room, settings)
    writing.results()
    return writing.canvas.tokens[writing.canvas.written].tolist(), writing.forwards


def greedy_ar(lm: DiffusionLM, network: PreTrainedModel, prompt: str, room: int) -> list[int]:
    """What a left-to-right network continues a prompt with, by `transformers` and its key-value cache."""
    canvas = continuation_canvas(lm.tokenizer, [prompt], room, context=None)
    given = canvas.tokens[~canvas.editable][None].to(network.device)
    settings = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        eos_token_id=lm.tokenizer.end_token_id,
        pad_token_id=lm.tokenizer.pad_token_id,
        suppress_tokens=[lm.config.mask_token_id],
    )
    generate: Any = network.generate
    made = generate(given, generation_config=settings, attention_mask=torch.ones_like(given))
    return made[0, given.shape[1] :].tolist()


def cut_prompts(
    lm: DiffusionLM, texts: Iterable[str], count: int, *, lengths: tuple[int, ...] = (32, 64, 128, 256)
) -> list[str]:
    """The beginnings of `count` texts, of these lengths in turn (tokens). ValueError if the texts are too few."""
    prompts = []
    for text in texts:
        ids = lm.tokenizer.encode(text)
        length = lengths[len(prompts) % len(lengths)]
        if len(ids) >= length:
            prompts.append(lm.tokenizer.decode(ids[:length]))
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"the texts give only {len(prompts)} prompts of {lengths} tokens, not {count}; give longer texts, or more"
    )


def _agreement(one: list[int], other: list[int]) -> float:
    longest = max(len(one), len(other), 1)
    return sum(a == b for a, b in zip(one, other, strict=False)) / longest
