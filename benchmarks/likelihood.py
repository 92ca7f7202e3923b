"""Multiple choice by the bound: a plain loop of 32 draws, one row at a time, and ours, on the same questions.

    python benchmarks/likelihood.py MODEL DATA

MODEL is a folder of the `ar` recipe, DATA one with hellaswag.jsonl[.gz]. The plain loop is that of the first papers'
scripts: a time drawn anew for each row, tokens masked independently, logits at every position. Both are timed on the
first `--plain` items, ours on all of them, too. Errors are standard errors of a choice's log-probability, in nats.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter

import torch
from machine import save

from diffusify.evaluation.benchmark_data import chosen_tasks, items
from diffusify.evaluation.likelihood import MonteCarlo, Question
from diffusify.evaluation.open_model import open_lm
from diffusify.evaluation.scoring import question
from diffusify.evaluation.tasks import Choice
from diffusify.sampling.diffusion_lm import DiffusionLM

DRAWS = 32


@torch.no_grad()
def plain(lm: DiffusionLM, asked: Question) -> list[tuple[float, float]]:
    """Each choice's bound and its standard error."""
    network, mask, found = lm.denoiser.network, lm.config.mask_token_id, []
    for choice in asked.choices:
        tokens = torch.tensor([[*asked.context, *choice]])
        target = torch.arange(tokens.shape[1]) >= len(asked.context)
        everything = torch.zeros(1, 1, tokens.shape[1], tokens.shape[1], dtype=network.dtype)
        draws = []
        for _ in range(DRAWS):
            t = float(torch.rand(()).clamp_min(1e-3))
            open = (torch.rand(tokens.shape[1]) < t) & target
            noisy = torch.where(open, mask, tokens)
            logits = network(noisy, attention_mask=everything).logits.float().roll(1, 1)
            logits[..., mask] = -torch.inf
            told = logits.log_softmax(-1).gather(2, tokens[..., None])[0, :, 0]
            draws.append(float(told[open].sum()) / t)
        found.append((fmean(draws), stdev(draws) / DRAWS**0.5))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("data", type=Path)
    options.add_argument("--items", type=int, default=100)
    options.add_argument("--plain", type=int, default=10)
    chosen = options.parse_args()
    torch.manual_seed(0)
    lm = open_lm(chosen.model)
    asked = [
        (question(lm, item), item.gold)
        for item in items(chosen_tasks(["hellaswag"])[0], data=chosen.data, limit=chosen.items)
        if isinstance(item, Choice)
    ]
    both = [one for one, _ in asked[: chosen.plain]]
    list(MonteCarlo()(lm.denoiser, both[:1]))
    begun = perf_counter()
    slow = [plain(lm, one) for one in both]
    plain_seconds = perf_counter() - begun
    print(f"plain: {plain_seconds:.1f} s", flush=True)
    begun = perf_counter()
    ours = list(MonteCarlo()(lm.denoiser, both))
    our_seconds = perf_counter() - begun
    print(f"ours: {our_seconds:.1f} s", flush=True)
    begun = perf_counter()
    every = list(MonteCarlo()(lm.denoiser, [one for one, _ in asked]))
    all_seconds = perf_counter() - begun
    right = [one.best(told.log_prob) == gold for (one, gold), told in zip(asked, every, strict=True)]
    result = {
        "items": len(asked),
        "plain_items": len(both),
        "times_the_plain_rate": round(plain_seconds / our_seconds, 2),
        "items_per_second": {"plain": round(len(both) / plain_seconds, 3), "ours": round(len(asked) / all_seconds, 3)},
        "standard_error": {
            "plain": round(fmean(se for one in slow for _, se in one), 3),
            "ours": round(fmean(se for one in ours for se in one.se), 3),
        },
        "draws": {"plain": DRAWS, "ours": round(fmean(one.draws for one in every), 1)},
        "accuracy": round(100 * fmean(right), 1),
    }
    print(json.dumps(result, indent=2))
    print("wrote", save("likelihood", "python benchmarks/likelihood.py MODEL DATA", 0, result))


if __name__ == "__main__":
    main()
