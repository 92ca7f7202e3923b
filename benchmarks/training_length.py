"""Lossless decoding over tokens of training: tokens per forward pass of drafting adapters.

    python benchmarks/training_length.py FOLDER[:TOKENS] [FOLDER[:TOKENS] ...]

FOLDERs are adaptations of one base by the `draft` recipe, of different lengths, such as
`python -m diffusify.demo --minutes 5 --out runs/5`. TOKENS are those of training, for a folder without the log of its
run, such as a bundled model. Batch 1, bfloat16, 16 prompts of four kinds (`prompts.py`), 64 new tokens. Draws
`docs/decoding.png`.
"""

import argparse
import json
from pathlib import Path

from decoding import tokens_per_forward
from machine import save
from matplotlib.figure import Figure

PICTURE = Path(__file__).parents[1] / "docs" / "decoding.png"
WAYS = {"copying": 12, "not copying": 0}  # tokens that may be copied from the text


def measure(source: str) -> dict:
    """The tokens of training of a model, and its tokens per forward pass by kind of prompt."""
    folder, _, tokens = source.partition(":")
    if not tokens:
        run = json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
        tokens = run["log"][-1]["step"] * run["tokens_per_step"]
    return {"folder": Path(folder).name, "training_tokens": int(tokens)} | {
        way: tokens_per_forward(folder, copies, prompts=4, tokens=64) for way, copies in WAYS.items()
    }


def picture(models: list[dict]) -> None:
    """Plot tokens per forward pass over tokens of training."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        points = sorted((model["training_tokens"], model[way]["all"]) for model in models)
        axes.plot(*zip(*points, strict=True), marker="o", label=way)
    axes.set(xlabel="tokens of training", ylabel="tokens per forward pass", xscale="log", ylim=(1, None))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", nargs="+", metavar="FOLDER[:TOKENS]")
    chosen = options.parse_args()
    models = []
    for source in chosen.folders:
        models.append(measure(source))
        print(json.dumps(models[-1], indent=2), flush=True)
    picture(models)
    result = {"prompts": 16, "new_tokens": 64, "dtype": "bfloat16", "models": models}
    print("wrote", save("training_length", "python benchmarks/training_length.py FOLDERS", 0, result))


if __name__ == "__main__":
    main()
