"""Decoding speed over tokens of training: tokens per forward pass and tokens/s, compared with the AR model.

    python benchmarks/decoding.py FOLDER [FOLDER ...]

FOLDERs are adaptations of one base by the `block` recipe, of different lengths, such as
`python -m diffusify.demo --minutes 10 --out runs/10`. Batch 1, bfloat16, prompts of 32 to 256 tokens, 128 new tokens;
`transformers.generate` with its key-value cache in the same rounds. The lossless texts of the last folder are compared
with greedy ones, token for token, in float32 and in bfloat16. Draws `docs/decoding.png`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from machine import save
from matplotlib.figure import Figure

import diffusify
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.bench import bench, cut_prompts, generate_ids, greedy_ar
from diffusify.models.loading import load_base
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.sources import load_texts

PICTURE = Path(__file__).parents[1] / "docs" / "decoding.png"
PRESETS = ("quality", "balanced", "fast")


def equal_texts(folder: Path, texts: list[str], prompts: int, dtype: torch.dtype) -> int:
    """The number of lossless texts that equal the greedy ones of `transformers` token for token."""
    lm = diffusify.load(folder, dtype=dtype)
    same = 0
    for prompt in cut_prompts(lm, texts, prompts):
        ours, _ = generate_ids(lm, prompt, 64, SamplingConfig(tolerance=0.0))
        theirs = greedy_ar(lm, lm.denoiser.network, prompt, 64)
        same += ours[: len(theirs)] == theirs
    return same


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", type=Path, nargs="+")
    options.add_argument("--data", default="builtin:pydoc")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--equal", type=int, default=50)
    chosen = options.parse_args()
    texts = [dict(row)["text"] for row in load_texts(chosen.data)]
    result: dict = {"prompts": chosen.prompts, "new_tokens": 128, "dtype": "bfloat16", "models": []}
    for folder in chosen.folders:
        lm = diffusify.load(folder, dtype=torch.bfloat16)
        base = load_base(lm.config.base_model, dtype=torch.bfloat16).network.eval()
        variants = {"one token a forward": SamplingConfig(policy=Unmask())}
        variants |= {name: SamplingConfig.preset(name, lm.config) for name in PRESETS}
        variants["tolerance 4.0"] = SamplingConfig(tolerance=4.0)
        variants["threshold 0.7"] = SamplingConfig(threshold=0.7)
        rows = bench(lm, base, cut_prompts(lm, texts, chosen.prompts), variants, max_new_tokens=128, progress=print)
        run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        point = [entry for entry in run["log"] if "eval_bound" in entry][-1]
        del lm, base
        model = {
            "folder": folder.name,
            "training_tokens": point["step"] * run["tokens_per_step"],
            "bound": round(point["eval_bound"], 3),
            "ar_loss": round(point["eval_ar_nll"], 3),
            "ways": [asdict(row) for row in rows],
        }
        print(json.dumps(model, indent=2), flush=True)
        result["models"].append(model)
    picture(result["models"])
    result["equal_texts"] = {"of": chosen.equal} | {
        str(dtype).removeprefix("torch."): equal_texts(chosen.folders[-1], texts, chosen.equal, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    print("wrote", save("decoding", "python benchmarks/decoding.py FOLDERS", 0, result))


def picture(models: list[dict]) -> None:
    """Plot tokens per forward pass, and the speedup over the AR model, over tokens of training."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("tokens_per_forward", "speedup"),
        ("tokens per forward", "tokens/s, times AR"),
        strict=True,
    ):
        for preset in PRESETS:
            points = [(m["training_tokens"], next(r[key] for r in m["ways"] if r["way"] == preset)) for m in models]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=preset)
        axes.axhline(1.0, color="grey", linestyle=":")
        axes.set(xlabel="tokens of training", ylabel=label, xscale="log")
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
