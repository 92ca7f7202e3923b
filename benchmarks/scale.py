"""The growth of a training step's time and memory with length, vocabulary and batch, and fitted laws.

    python benchmarks/scale.py

A random Llama of four layers (hidden size 256), so that weights do not hide what grows. Each size runs in a separate
process with its own peak memory; reported is what a step takes beyond the process before it, weights and optimizer
included. Laws are least-squares fits of the relative error. Draws `docs/scale.png`.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy
import torch
from machine import save
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from transformers import LlamaConfig, LlamaForCausalLM

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.recipes import ar, block

PICTURE = Path(__file__).parents[1] / "docs" / "scale.png"
RECIPES = {"block(4)": block(4), "ar": ar(annealing_steps=0)}
DEFAULTS = {"length": 256, "vocabulary": 8192, "batch": 4}
SIZES = {
    "length": [256, 512, 1024, 2048, 4096, 8192],
    "vocabulary": [1024, 4096, 16384, 65536, 262144],
    "batch": [1, 2, 4, 8, 16, 32, 64],
}
SEED, STEPS = 0, 4


def work(name: str, length: int, vocabulary: int, batch: int) -> dict[str, float]:
    """Seconds and GiB of a step."""
    recipe, mask = RECIPES[name], vocabulary - 1
    generator = torch.Generator().manual_seed(SEED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    denoiser = Denoiser(LlamaForCausalLM(config), recipe.diffusion_config("LlamaForCausalLM", mask, "")).train()
    optimize_for_training(denoiser.network)
    optimizer, objective = torch.optim.AdamW(denoiser.parameters(), fused=True), recipe.objective
    seconds = []
    for _ in range(STEPS):
        clean = denoiser.predictable(Canvas.clean(torch.randint(0, mask, (batch, length), generator=generator)))
        share = objective.ar_share if objective.ar_weight else 0.0
        noise = noised(clean, recipe.time, recipe.schedule, mask, ar_share=share, generator=generator)
        start = perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = denoiser(
                noise.canvas, noise.text, positions=noise.canvas.open, ar_positions=objective.ar_targets(noise),
                loss=lambda a, b, noise=noise: objective(a, b, noise, recipe.schedule),
            ).loss  # fmt: skip
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(perf_counter() - start)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": median(seconds[1:]), "gib": taken / 2**20}


def law(sizes: list[int], values: list[float], powers: tuple[int, ...]) -> tuple[list[float], float]:
    """The factors of the best-fitting sum of powers, none below zero, and its largest relative error."""
    x, y = numpy.array(sizes, float), numpy.array(values)
    chosen = list(powers)
    while True:
        matrix = numpy.stack([x**power for power in chosen], 1) / y[:, None]
        factors = numpy.linalg.lstsq(matrix, numpy.ones(len(y)), rcond=None)[0]
        if (factors >= 0).all():
            break
        chosen.pop(int(factors.argmin()))
    found = dict(zip(chosen, factors.tolist(), strict=True))
    return [found.get(power, 0.0) for power in powers], float(numpy.abs(matrix @ factors - 1).max())


def summarize(axis: str, sizes: list[int], taken: list[dict[str, float]]) -> dict[str, Any]:
    """The measured points, and the laws of seconds and memory."""
    tokens = [(DEFAULTS | {axis: size})["length"] * (DEFAULTS | {axis: size})["batch"] for size in sizes]
    powers = (0, 1, 2) if axis == "length" else (0, 1)
    points = {
        "sizes": sizes,
        "tokens_per_second": [round(n / one["seconds"]) for n, one in zip(tokens, taken, strict=True)],
        "gib": [round(one["gib"], 3) for one in taken],
    }
    for key, scale in (("seconds", 1e6), ("gib", 2**30)):
        factors, off = law(sizes, [one[key] for one in taken], powers)
        name = {"seconds": "microseconds", "gib": "bytes"}[key]
        points[f"{name}_by_power"] = [float(f"{factor * scale:.3g}") for factor in factors]
        points[f"{name}_off_at_worst"] = round(off, 2)
    return points


def draw(found: dict[str, Any]) -> None:
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, len(SIZES), sharey="row", sharex="col")
    for column, axis in enumerate(SIZES):
        for name, by_axis in found.items():
            points = by_axis[axis]
            axes[0, column].loglog(points["sizes"], points["tokens_per_second"], "o-", label=name)
            axes[1, column].loglog(points["sizes"], points["gib"], "o-", label=name)
        axes[1, column].set_xlabel(axis)
        for row in axes[:, column]:
            row.grid(alpha=0.3)
            row.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("tokens/s")
    axes[1, 0].set_ylabel("GiB of a step")
    axes[0, 0].legend()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        name, *sizes = chosen.work
        print(json.dumps(work(name, *map(int, sizes))))
        return
    found: dict[str, Any] = {}
    for name in RECIPES:
        found[name] = {}
        for axis, sizes in SIZES.items():
            taken = []
            for size in sizes:
                shape = [str(value) for value in (DEFAULTS | {axis: size}).values()]
                out = subprocess.run([sys.executable, __file__, "--work", name, *shape], stdout=-1, check=True).stdout
                taken.append(json.loads(out))
                print(f"{name:10} {axis:>10} {size:>7}  {taken[-1]['seconds']:7.3f} s  {taken[-1]['gib']:6.2f} GiB")
            found[name][axis] = summarize(axis, sizes, taken)
    draw(found)
    result = {"usual": DEFAULTS, "hidden_size": 256, "layers": 4, "recipes": found}
    print("wrote", save("scale", "python benchmarks/scale.py", SEED, result), "and", PICTURE)


if __name__ == "__main__":
    main()
