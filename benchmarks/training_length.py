"""Lossless decoding over tokens of training: tokens per forward pass, and the perplexity of the texts.

    python benchmarks/training_length.py FOLDER [FOLDER ...]

FOLDERs are adaptations of one base by the `block` recipe, of different lengths, such as
`python -m diffusify.demo --minutes 10 --out runs/10`. Batch 1, bfloat16, prompts of 32 to 256 tokens, 128 new tokens.
Draws `docs/decoding.png`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from machine import save
from matplotlib.figure import Figure

import diffusify
from diffusify.evaluation.bench import bench, cut_prompts
from diffusify.models.loading import load_base
from diffusify.models.saving import load_ar_half
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.sources import load_texts

PICTURE = Path(__file__).parents[1] / "docs" / "decoding.png"
PRESETS = ("quality", "balanced", "fast")
DTYPE = torch.bfloat16


def measure(folder: Path, texts: list[str], prompts: int) -> dict:
    """The tokens of training, the NELBO and the AR loss of a run, and the rows of the benchmark."""
    lm = diffusify.load(folder, dtype=DTYPE)
    base = load_base(lm.config.base_model, dtype=DTYPE).network.eval()
    settings = {name: SamplingConfig.preset(name, lm.config) for name in PRESETS}
    chosen, ar_half = cut_prompts(lm, texts, prompts), load_ar_half(folder, dtype=DTYPE)
    rows = bench(lm, base, chosen, settings, ar_half=ar_half, max_new_tokens=128, progress=print)
    run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    point = [entry for entry in run["log"] if "eval_bound" in entry][-1]
    return {
        "folder": folder.name,
        "training_tokens": point["step"] * run["tokens_per_step"],
        "bound": round(point["eval_bound"], 3),
        "ar_loss": round(point["eval_ar_nll"], 3),
        "ways": [asdict(row) for row in rows],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", type=Path, nargs="+")
    options.add_argument("--data", default="builtin:pydoc")
    options.add_argument("--prompts", type=int, default=8)
    chosen = options.parse_args()
    texts = [dict(row)["text"] for row in load_texts(chosen.data)]
    models = []
    for folder in chosen.folders:
        models.append(measure(folder, texts, chosen.prompts))
        print(json.dumps(models[-1], indent=2), flush=True)
    picture(models)
    result = {"prompts": chosen.prompts, "new_tokens": 128, "dtype": "bfloat16", "models": models}
    print("wrote", save("training_length", "python benchmarks/training_length.py FOLDERS", 0, result))


def picture(models: list[dict]) -> None:
    """Plot tokens per forward pass over tokens of training."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for preset in PRESETS:
        points = [
            (model["training_tokens"], row["tokens_per_forward"])
            for model in models
            for row in model["ways"]
            if row["way"] == preset
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=preset)
    axes.set(xlabel="tokens of training", ylabel="tokens per forward pass", xscale="log", ylim=(1, None))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
