"""Multiple choice scored by likelihoods: the library compared with plain loops, one row at a time.

    python benchmarks/likelihood.py DATA

DATA is a folder with hellaswag.jsonl[.gz]. The bound of `smollm2-masked` is compared with the loop of the papers'
scripts: 32 samples of a time for each row, tokens masked independently, logits at every position. The exact likelihood
of `smollm2-block`, which runs the context of an item once for all choices, is compared with a forward pass for each
choice. Both are timed on the first `--plain` items, the library on all of them as well. Errors are standard errors of a
choice's log-probability, in nats.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from machine import save

import diffusify
from diffusify.evaluation.benchmark_data import chosen_tasks, items
from diffusify.evaluation.likelihood import Autoregressive, Likelihood, Measure, MonteCarlo
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.evaluation.scoring import likelihood_request
from diffusify.evaluation.tasks import MultipleChoice
from diffusify.sampling.diffusion_lm import DiffusionLM

DRAWS = 32


@torch.no_grad()
def plain_exact(lm: DiffusionLM, request: LikelihoodRequest) -> Likelihood:
    """The exact log-probability of each choice, by a forward pass for each."""
    found = []
    for choice in request.choices:
        tokens = torch.tensor([[*request.context, *choice]])
        log_probs = lm.denoiser.network(tokens).logits.float().log_softmax(-1)[0, :-1]
        found.append(float(log_probs.gather(1, tokens[0, 1:, None])[-len(choice) :].sum()))
    return Likelihood(tuple(found), (0.0,) * len(found))


@torch.no_grad()
def plain_bound(lm: DiffusionLM, request: LikelihoodRequest) -> Likelihood:
    """The NELBO of each choice and its standard error."""
    network, mask, found = lm.denoiser.network, lm.config.mask_token_id, []
    for choice in request.choices:
        tokens = torch.tensor([[*request.context, *choice]])
        target = torch.arange(tokens.shape[1]) >= len(request.context)
        everything = torch.zeros(1, 1, tokens.shape[1], tokens.shape[1], dtype=network.dtype)
        draws = []
        for _ in range(DRAWS):
            t = float(torch.rand(()).clamp_min(1e-3))
            open = (torch.rand(tokens.shape[1]) < t) & target
            noisy = torch.where(open, mask, tokens)
            logits = network(noisy, attention_mask=everything).logits.float().roll(1, 1)
            logits[..., mask] = -torch.inf
            log_probs = logits.log_softmax(-1).gather(2, tokens[..., None])[0, :, 0]
            draws.append(float(log_probs[open].sum()) / t)
        found.append((fmean(draws), stdev(draws) / DRAWS**0.5))
    log_prob, se = zip(*found, strict=True)
    return Likelihood(log_prob, se, DRAWS)


def compare(
    lm: DiffusionLM, plain: Callable[..., Likelihood], measure: Measure, data: Path, count: int, plain_count: int
) -> dict[str, Any]:
    """Items per second of a plain loop and of the library, standard errors, and the accuracy of the library."""
    requests = [
        (likelihood_request(lm, item), item.gold)
        for item in items(chosen_tasks(["hellaswag"])[0], data=data, limit=count)
        if isinstance(item, MultipleChoice)
    ]
    both = [one for one, _ in requests[:plain_count]]
    list(measure(lm.denoiser, both[:1]))
    plain(lm, both[0])
    start = perf_counter()
    slow = [plain(lm, one) for one in both]
    plain_seconds = perf_counter() - start
    print(f"plain: {plain_seconds:.1f} s", flush=True)
    start = perf_counter()
    ours = list(measure(lm.denoiser, both))
    our_seconds = perf_counter() - start
    print(f"ours: {our_seconds:.1f} s", flush=True)
    start = perf_counter()
    every = list(measure(lm.denoiser, [one for one, _ in requests]))
    all_seconds = perf_counter() - start
    right = [one.best(result.log_prob) == gold for (one, gold), result in zip(requests, every, strict=True)]
    same = [one.best(a.log_prob) == one.best(b.log_prob) for one, a, b in zip(both, slow, ours, strict=True)]
    result = {
        "items": len(requests),
        "plain_items": len(both),
        "times_the_plain_rate": round(plain_seconds / our_seconds, 2),
        "items_per_second": {
            "plain": round(len(both) / plain_seconds, 3),
            "ours": round(len(requests) / all_seconds, 3),
        },
        "standard_error": {
            "plain": round(fmean(se for one in slow for se in one.se), 3),
            "ours": round(fmean(se for one in ours for se in one.se), 3),
        },
        "draws": {"plain": slow[0].draws, "ours": round(fmean(one.draws for one in every), 1)},
        "same_choices": round(fmean(same), 3),
        "accuracy": round(100 * fmean(right), 1),
    }
    print(json.dumps(result, indent=2), flush=True)
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--items", type=int, default=100)
    options.add_argument("--plain", type=int, default=10)
    chosen = options.parse_args()
    torch.manual_seed(0)
    counts = chosen.data, chosen.items, chosen.plain
    result = {
        "exact": compare(diffusify.load("smollm2-block"), plain_exact, Autoregressive(), *counts),
        "bound": compare(diffusify.load("smollm2-masked"), plain_bound, MonteCarlo(), *counts),
    }
    print("wrote", save("likelihood", f"python benchmarks/likelihood.py DATA --plain {chosen.plain}", 0, result))


if __name__ == "__main__":
    main()
