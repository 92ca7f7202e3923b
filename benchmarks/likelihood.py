"""Multiple choice scored by the NELBO: a plain loop of 32 samples, one row at a time, compared with the library.

    python benchmarks/likelihood.py MODEL DATA

MODEL is a folder of the `ar` recipe, DATA a folder with hellaswag.jsonl[.gz]. The plain loop is that of the papers'
scripts: a time sampled for each row, tokens masked independently, logits at every position. Both are timed on the first
`--plain` items, the library on all of them as well. Errors are standard errors of a choice's log-probability, in nats.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter

import torch
from machine import save

from diffusify.evaluation.benchmark_data import chosen_tasks, items
from diffusify.evaluation.likelihood import MonteCarlo
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.evaluation.open_model import open_lm
from diffusify.evaluation.scoring import likelihood_request
from diffusify.evaluation.tasks import MultipleChoice
from diffusify.sampling.diffusion_lm import DiffusionLM

DRAWS = 32


@torch.no_grad()
def plain(lm: DiffusionLM, request: LikelihoodRequest) -> list[tuple[float, float]]:
    """Each choice's NELBO and its standard error."""
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
    requests = [
        (likelihood_request(lm, item), item.gold)
        for item in items(chosen_tasks(["hellaswag"])[0], data=chosen.data, limit=chosen.items)
        if isinstance(item, MultipleChoice)
    ]
    both = [one for one, _ in requests[: chosen.plain]]
    list(MonteCarlo()(lm.denoiser, both[:1]))
    start = perf_counter()
    slow = [plain(lm, one) for one in both]
    plain_seconds = perf_counter() - start
    print(f"plain: {plain_seconds:.1f} s", flush=True)
    start = perf_counter()
    ours = list(MonteCarlo()(lm.denoiser, both))
    our_seconds = perf_counter() - start
    print(f"ours: {our_seconds:.1f} s", flush=True)
    start = perf_counter()
    every = list(MonteCarlo()(lm.denoiser, [one for one, _ in requests]))
    all_seconds = perf_counter() - start
    right = [one.best(result.log_prob) == gold for (one, gold), result in zip(requests, every, strict=True)]
    result = {
        "items": len(requests),
        "plain_items": len(both),
        "times_the_plain_rate": round(plain_seconds / our_seconds, 2),
        "items_per_second": {
            "plain": round(len(both) / plain_seconds, 3),
            "ours": round(len(requests) / all_seconds, 3),
        },
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
