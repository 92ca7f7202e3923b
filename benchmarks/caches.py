"""Decoding with a bidirectional model, 256 tokens in 64 steps: a plain loop, the sampler, and approximate caches.

    python benchmarks/caches.py smollm2-masked [TEXTS]

The plain loop is that of the papers' scripts: logits at every position, every row sampled, in every step. Rounds
alternate. Rates are measured at temperature 1, the agreement of a cache with no cache at temperature 0.
"""

import argparse
import json
from statistics import mean, median
from time import perf_counter

import torch
from machine import save

import diffusify
from diffusify.evaluation.bench import cut_prompts, generate_ids
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.prompts import continuation_canvas
from diffusify.text.sources import load_texts

CANVAS, PROMPT, STEPS, WINDOW = 256, 32, 64, 32


@torch.no_grad()
def plain(lm: DiffusionLM, prompt: str) -> list[int]:
    """Low-confidence decoding as in the scripts of the papers."""
    canvas = continuation_canvas(lm.tokenizer, [prompt], CANVAS - PROMPT, context=None)
    tokens, open = canvas.tokens, canvas.open
    mask, network = lm.config.mask_token_id, lm.denoiser.network
    no_mask = torch.zeros(1, 1, tokens.shape[1], tokens.shape[1], dtype=network.dtype)
    for step in range(STEPS):
        logits = network(tokens, attention_mask=no_mask).logits.roll(1, 1)
        logits[..., mask] = -torch.inf
        gumbel = -torch.log(-torch.log(torch.rand(logits.shape, dtype=torch.float64)))
        sampled = (logits.double() + gumbel).argmax(-1)
        confidence = logits.double().softmax(-1).gather(-1, sampled[..., None])[..., 0].masked_fill(~open, -torch.inf)
        best = confidence.topk(-(-int(open.sum()) // (STEPS - step))).indices
        tokens, open = tokens.scatter(1, best, sampled.gather(1, best)), open.scatter(1, best, False)
    return tokens[canvas.editable].tolist()


def ours(lm: DiffusionLM, prompt: str, settings: SamplingConfig) -> list[int]:
    return generate_ids(lm, prompt, CANVAS - PROMPT, settings)[0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("texts", nargs="?", default="builtin:pydoc")
    options.add_argument("--prompts", type=int, default=5)
    options.add_argument("--dtype", default="bfloat16")
    chosen = options.parse_args()
    lm = diffusify.load(chosen.model, dtype=getattr(torch, chosen.dtype))
    texts = (dict(row)["text"] for row in load_texts(chosen.texts))
    prompts = cut_prompts(lm, texts, chosen.prompts, lengths=(PROMPT - 1,))
    # An end token would end a text early, but all variants have to do the same work.
    every = {"steps": STEPS, "suppress_tokens": (lm.tokenizer.end_token_id,)}
    variants = {
        "no cache": SamplingConfig(**every),
        "no cache, window": SamplingConfig(**every, window=WINDOW),
        "prefix cache": SamplingConfig(**every, window=WINDOW, cache="prefix"),
        "dual cache": SamplingConfig(**every, window=WINDOW, cache="dual"),
    }
    seconds: dict[str, list[float]] = {"plain loop": []} | {name: [] for name in variants}
    agreement: dict[str, list[float]] = {"prefix cache": [], "dual cache": []}
    for prompt in ["warm up", *prompts]:
        for name in seconds:
            start = perf_counter()
            if name == "plain loop":
                plain(lm, prompt)
            else:
                ours(lm, prompt, SamplingConfig(**{**vars(variants[name]), "temperature": 1.0}))
            seconds[name].append(perf_counter() - start)
            print(name, round(seconds[name][-1], 2), flush=True)
    for prompt in prompts:
        exact = ours(lm, prompt, variants["no cache, window"])
        for name, shares in agreement.items():
            shares.append(mean(a == b for a, b in zip(exact, ours(lm, prompt, variants[name]), strict=True)))
    rounds = {name: times[1:] for name, times in seconds.items()}
    result = {
        "canvas": CANVAS, "steps": STEPS, "window": WINDOW, "dtype": chosen.dtype, "prompts": len(prompts),
        "seconds": {name: round(median(times), 2) for name, times in rounds.items()},
        "times_plain": {
            name: round(median(a / b for a, b in zip(rounds["plain loop"], times, strict=True)), 2)
            for name, times in rounds.items()
        },
        "times_uncached": {
            name: round(median(a / b for a, b in zip(rounds["no cache"], times, strict=True)), 2)
            for name, times in rounds.items()
        },
        "agreement": {name: round(mean(shares), 3) for name, shares in agreement.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    print("wrote", save("caches", f"python benchmarks/caches.py {chosen.model}", 0, result))


if __name__ == "__main__":
    main()
