"""The ablation of the DiffuLLaMA paper at a small size: shift, attention annealing and a pretrained start.

    python benchmarks/ablation.py BASE TRAIN VALID

BASE is a small AR model (the published run uses the 260k-parameter TinyStories Llama); without it the script trains
one. The networks {shift, none} x {annealing, none} x {pretrained, random} see the same tokens in the same order, each
at the learning rate that was best for it in a shorter run with another seed. The results are NELBOs of held-out text
over tokens of training, for three seeds.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from datasets import Dataset
from machine import save
from matplotlib.figure import Figure
from tiny import train_tiny_base
from transformers import TrainingArguments

from diffusify.models.loading import load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import ar
from diffusify.text.packing import pack
from diffusify.text.sources import load_texts
from diffusify.training.budget import Budget
from diffusify.training.trainer import DiffusionTrainer

ROWS, LENGTH, HELD_OUT = 16, 256, 64
SEEDS, TUNING_SEED = (0, 1, 2), 100
RATES = (1e-3, 3e-3, 1e-2)
ARMS = [
    {"init": init, "shift": shift, "annealing": annealing}
    for init, shift, annealing in product(("pretrained", "random"), (1, 0), (True, False))
]


def train(arm: dict, rate: float, seed: int, *, steps: int, parts: int, data: tuple[str, str, str]) -> list[float]:
    """The NELBO of held-out text (nats per token) before training and after each of `parts` equal parts of it."""
    torch.set_num_threads(1)
    base, texts, held_out = data
    source = load_base(base)
    if arm["init"] == "random":
        torch.manual_seed(seed)
        source = replace(source, network=type(source.network)(source.network.config))
    recipe = ar(annealing_steps=40 if arm["annealing"] else 0, shift=arm["shift"])
    denoiser, tokenizer = make_denoiser(source, recipe)
    rows, held = (pack(load_texts(path), tokenizer, LENGTH) for path in (texts, held_out))
    assert isinstance(held, Dataset)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            adam_beta2=0.95,
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=ROWS,
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = DiffusionTrainer(
            denoiser,
            recipe,
            args,
            train_dataset=rows,
            eval_dataset=held.select(range(HELD_OUT)),
            tokenizer=source.tokenizer,
            budget=Budget(steps, evaluations=parts),
        )
        trainer.train()
    curve = [point["eval_bound"] for point in trainer.state.log_history if "eval_bound" in point]
    print(f"{arm} rate {rate:g} seed {seed}: " + " ".join(f"{bound:.3f}" for bound in curve), flush=True)
    return curve


def plot(result: dict, file: Path) -> None:
    """Plot the curves with their spread over seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    thousands = [tokens / 1000 for tokens in result["tokens"]]
    for arm in result["arms"]:
        name = f"{arm['init']}, {'shift' if arm['shift'] else 'no shift'}{', annealing' if arm['annealing'] else ''}"
        bound, spread = arm["bound"], arm["spread"]
        (line,) = axes.plot(
            thousands, bound, label=name, ls="-" if arm["shift"] else "--", lw=2 if arm["annealing"] else 1
        )
        low, high = ([b + sign * s for b, s in zip(bound, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(thousands, low, high, alpha=0.15, color=line.get_color())
    axes.set(xlabel="thousand tokens trained on", ylabel="bound, nats per token, held-out text", ylim=(3, 6.5))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base", nargs="?", help="a small AR model")
    options.add_argument("train", nargs="?", default="builtin:pydoc")
    options.add_argument("valid", nargs="?", default="builtin:pydoc")
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--parts", type=int, default=16)
    options.add_argument("--name", default="ablation")
    chosen = options.parse_args()
    if chosen.base is None:
        chosen.base = str(train_tiny_base(Path(tempfile.mkdtemp()) / "base", chosen.train))
    data = (chosen.base, chosen.train, chosen.valid)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        trial = partial(train, steps=int(chosen.steps * 0.4), parts=1, data=data)
        trials = {(i, rate): pool.submit(trial, arm, rate, TUNING_SEED) for i, arm in enumerate(ARMS) for rate in RATES}
        tuned = [min(RATES, key=lambda rate: trials[i, rate].result()[-1]) for i in range(len(ARMS))]
        whole = partial(train, steps=chosen.steps, parts=chosen.parts, data=data)
        runs = [[pool.submit(whole, arm, rate, seed) for seed in SEEDS] for arm, rate in zip(ARMS, tuned, strict=True)]
        arms = []
        for i, arm in enumerate(ARMS):
            curves = [run.result() for run in runs[i]]
            arms.append(
                arm
                | {
                    "learning_rate": tuned[i],
                    "tuning": {str(rate): round(trials[i, rate].result()[-1], 3) for rate in RATES},
                    "bound": [round(mean(point), 3) for point in zip(*curves, strict=True)],
                    "spread": [round(stdev(point), 3) for point in zip(*curves, strict=True)],
                }
            )
    every = chosen.steps // chosen.parts * ROWS * LENGTH
    result = {"tokens": [part * every for part in range(chosen.parts + 1)], "seeds": SEEDS, "arms": arms}
    print(json.dumps(result, indent=1))
    plot(result, Path(__file__).parents[1] / "docs" / f"{chosen.name}.png")
    print(
        "wrote",
        save(
            chosen.name,
            f"python benchmarks/ablation.py BASE TRAIN VALID --steps {chosen.steps} --parts {chosen.parts}",
            SEEDS[0],
            result,
        ),
    )


if __name__ == "__main__":
    main()
