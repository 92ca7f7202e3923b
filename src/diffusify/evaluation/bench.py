"""Benchmark of decoding settings: speed and text quality, compared with `transformers.generate`."""

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

AR, PACKED_AR = "AR, transformers", "AR, packed weights"


@dataclass(frozen=True)
class BenchRow:
    """The results of one decoding setting over all prompts: medians of rates, and means of text metrics.

    `speedup` is the median over prompts of the rate relative to AR decoding by `transformers` in the same round.
    `agreement` is the share of tokens that equal those of AR decoding, or, if the model keeps no AR half, of decoding
    one token per forward pass. `perplexity` is under the base model.
    """

    way: str
    tokens_per_second: float
    speedup: float | None
    tokens_per_forward: float
    agreement: float | None
    perplexity: float
    distinct_2: float
    entropy: float


def decoding_settings(lm: DiffusionLM) -> dict[str, SamplingConfig]:
    """The settings to compare for a kind of model: one token per forward pass, the presets, and values in between."""
    settings = {"one token a forward": SamplingConfig(policy=Unmask())}
    settings |= {name: SamplingConfig.preset(name, lm.config) for name in get_args(Preset)}
    if lm.config.reads_as_ar_model:
        settings |= {f"tolerance {nats}": SamplingConfig(tolerance=nats) for nats in (0.3, 1.2, 3.0)}
    elif lm.config.sees_right_context:
        settings["balanced, no cache"] = replace(settings["balanced"], cache="none")
    settings |= {f"threshold {value}": SamplingConfig(threshold=value) for value in (0.9, 0.7, 0.5)}
    settings["factor 1"] = SamplingConfig(policy=Unmask(quota=Factor(1.0)))
    settings["entropy 0.1"] = SamplingConfig(policy=Unmask(Entropy(), EntropyBudget(0.1)))
    settings["stable"] = SamplingConfig(policy=Klass())
    return settings


def bench(
    lm: DiffusionLM,
    base: PreTrainedModel,
    prompts: list[str],
    settings: dict[str, SamplingConfig],
    *,
    ar_half: PreTrainedModel | None = None,
    max_new_tokens: int = 64,
    progress: Callable[[str], None] = lambda line: None,
) -> list[BenchRow]:
    """Continue every prompt with every setting, prompt by prompt, so that machine load affects all settings alike.

    `ar_half` is the model's network as `transformers` opens it (`load_ar_half`), if the model keeps its AR half. AR
    decoding then uses it, and once more the network with packed weights; otherwise it uses `base`. `progress` receives
    a line per prompt.
    """
    ar_networks = {AR: base} if ar_half is None else {AR: ar_half, PACKED_AR: lm.denoiser.network}
    texts: dict[str, list[list[int]]] = {name: [] for name in (*ar_networks, *settings)}
    seconds: dict[str, list[float]] = {name: [] for name in texts}
    forwards: dict[str, list[int]] = {name: [] for name in texts}
    reference = next(iter(settings)) if ar_half is None else AR
    for network in ar_networks.values():
        greedy_ar(lm, network, prompts[0], 4)  # warms up
    for number, prompt in enumerate(prompts, 1):
        for name in texts:
            start = perf_counter()
            if name in ar_networks:
                ids = greedy_ar(lm, ar_networks[name], prompt, max_new_tokens)
                passes = len(ids)
            else:
                ids, passes = generate_ids(lm, prompt, max_new_tokens, settings[name])
            seconds[name].append(perf_counter() - start)
            texts[name].append(ids)
            forwards[name].append(passes)
        progress(f"prompt {number} of {len(prompts)}")
    rows = []
    for name, generated in texts.items():
        rates = [len(ids) / s for ids, s in zip(generated, seconds[name], strict=True)]
        ar_rates = [len(ids) / s for ids, s in zip(texts[AR], seconds[AR], strict=True)]
        tokens = sum(map(len, generated))
        rows.append(
            BenchRow(
                way=name,
                tokens_per_second=round(median(rates), 1),
                speedup=None if name == AR else round(median(a / b for a, b in zip(rates, ar_rates, strict=True)), 2),
                tokens_per_forward=round(tokens / max(1, sum(forwards[name])), 2),
                agreement=None if name == AR else round(mean(map(_agreement, texts[reference], generated)), 3),
                perplexity=round(perplexity(lm.tokenizer, base, prompts, generated), 2),
                distinct_2=round(distinct(generated, 2), 3),
                entropy=round(mean(map(entropy, generated)), 2),
            )
        )
    return rows


def plot(rows: list[BenchRow], file: Path) -> None:
    """Plot the rate against the perplexity; up and to the left is better."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        point = (row.perplexity, row.tokens_per_second)
        axes.scatter(*point, color="tab:red" if row.way in (AR, PACKED_AR) else "tab:blue")
        axes.annotate(row.way, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="perplexity under the base model", ylabel="tokens per second", ylim=(0, None))
    axes.margins(x=0.2)
    axes.grid(alpha=0.25)
    figure.savefig(file, dpi=150)


def generate_ids(lm: DiffusionLM, prompt: str, max_new_tokens: int, settings: SamplingConfig) -> tuple[list[int], int]:
    """Continue a prompt with a diffusion model; returns the new token ids and the number of forward passes."""
    run = lm.prepare_generation([prompt], max_new_tokens, settings)
    run.results()
    return run.canvas.tokens[run.canvas.written].tolist(), run.forwards


def greedy_ar(lm: DiffusionLM, network: PreTrainedModel, prompt: str, max_new_tokens: int) -> list[int]:
    """Continue a prompt with an AR network, by `transformers.generate` with its KV cache; returns the new token ids."""
    canvas = continuation_canvas(lm.tokenizer, [prompt], max_new_tokens, context=None)
    given = canvas.tokens[~canvas.editable][None].to(network.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(lm.tokenizer.end_token_ids),
        pad_token_id=lm.tokenizer.pad_token_id,
        suppress_tokens=[lm.config.mask_token_id],
    )
    generate: Any = network.generate
    output = generate(given, generation_config=config, attention_mask=torch.ones_like(given))
    return output[0, given.shape[1] :].tolist()


def cut_prompts(
    lm: DiffusionLM, texts: Iterable[str], count: int, *, lengths: tuple[int, ...] = (32, 64, 128, 256)
) -> list[str]:
    """Make `count` prompts from the beginnings of texts, with these lengths in turn (in tokens).

    ValueError if too few texts are long enough.
    """
    prompts = []
    for text in texts:
        ids = lm.tokenizer.encode(text)
        length = lengths[len(prompts) % len(lengths)]
        if len(ids) >= length:
            prompts.append(lm.tokenizer.decode(ids[:length]))
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"the texts give only {len(prompts)} prompts of {lengths} tokens, not {count}; give more or longer texts"
    )


def _agreement(one: list[int], other: list[int]) -> float:
    longest = max(len(one), len(other), 1)
    return sum(a == b for a, b in zip(one, other, strict=False)) / longest
