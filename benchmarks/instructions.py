"""Instruction tuning: a diffusion model before and after, on unseen tasks, without and with two examples.

    python benchmarks/instructions.py MODEL INSTRUCTIONS.jsonl

MODEL is a block diffusion model, such as `smollm2-block`; the file has `task`, `instruction` and `output`.
All prompts of a few task families are held out of training and tested. Exact match and ROUGE-L.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from arms import read_records
from machine import save
from rouge_score.rouge_scorer import RougeScorer

import diffusify
from diffusify.diffusion.policies import Unmask
from diffusify.sampling.diffusion_lm import DiffusionLM, Message
from diffusify.sampling.sampling_config import SamplingConfig

UNSEEN = ("rotten_tomatoes", "trec", "qasc", "social_i_qa", "samsum", "glue_qqp", "wiki_bio", "sciq")
MAX_NEW_TOKENS = 24


def family(task: str) -> str:
    return next((name for name in UNSEEN if task.startswith(name)), "")


def chat(record: dict[str, str], shots: list[dict[str, str]]) -> list[Message]:
    """The instruction as a chat, after solved ones."""
    messages: list[Message] = []
    for shot in shots:
        messages += [
            {"role": "user", "content": shot["instruction"]}, {"role": "assistant", "content": shot["output"]}
        ]  # fmt: skip
    return [*messages, {"role": "user", "content": record["instruction"]}]


def answers(lm: DiffusionLM, chats: list[list[Message]], batch: int = 8) -> list[str]:
    settings = SamplingConfig(policy=Unmask())
    order = sorted(range(len(chats)), key=lambda i: len(str(chats[i])))
    out = [""] * len(chats)
    for start in range(0, len(order), batch):
        mine = order[start : start + batch]
        results = lm.prepare_chat([chats[i] for i in mine], MAX_NEW_TOKENS, settings).results()
        for i, result in zip(mine, results, strict=True):
            out[i] = result.text
    return out


def scores(lm: DiffusionLM, tests: list[dict[str, str]], shots: dict[str, list[dict[str, str]]]) -> dict:
    scorer = RougeScorer(["rougeL"])
    out = {}
    for name, count in (("zero-shot", 0), ("2-shot", 2)):
        generated = answers(lm, [chat(test, shots[test["task"]][:count]) for test in tests])
        golds = [test["output"].strip().lower() for test in tests]
        pairs = list(zip((text.strip().lower() for text in generated), golds, strict=True))
        exact = [text == gold for text, gold in pairs]
        rouge = [scorer.score(gold, text)["rougeL"].fmeasure for text, gold in pairs]
        out[name] = {
            "exact_match": round(100 * sum(exact) / len(exact), 1), "rouge_l": round(100 * sum(rouge) / len(rouge), 1)
        }  # fmt: skip
        print(name, out[name], pairs[:3], flush=True)
    return out


def split_tasks(
    path: str, tests: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """Training records, tests of task families that are not among them, and two solved examples per task."""
    records = [record for record in read_records(path) if record["output"].strip() and len(record["instruction"]) < 900]
    random.Random(seed).shuffle(records)
    unseen = [record for record in records if family(record["task"]) and len(record["instruction"]) < 600]
    by_task: dict[str, list[dict[str, str]]] = {}
    for record in unseen:
        by_task.setdefault(record["task"], []).append(record)
    shots = {task: sorted(mine, key=lambda r: len(r["instruction"]))[:2] for task, mine in by_task.items()}
    shot_ids = {id(shot) for pair in shots.values() for shot in pair}
    held_out = [record for record in unseen if id(record) not in shot_ids][:tests]
    return [record for record in records if not family(record["task"])], held_out, shots


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("data")
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--tests", type=int, default=160)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    train, tests, shots = split_tasks(chosen.data, chosen.tests, chosen.seed)
    arguments = f"--steps {chosen.steps} --tests {chosen.tests}"
    result: dict = {"model": "make demo", "tokens": chosen.steps * 4 * 512, "unseen": UNSEEN, "tests": len(tests)}
    result["before"] = scores(diffusify.load(chosen.model), tests, shots)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in train))
        out = diffusify.tune(
            chosen.model, str(data), Path(scratch) / "out", steps=chosen.steps, length=512, learning_rate=1e-4,
            seed=chosen.seed,
        )  # fmt: skip
        result["after"] = scores(diffusify.load(out), tests, shots)
    print(
        "wrote",
        save("instructions", f"python benchmarks/instructions.py MODEL DATA {arguments}", chosen.seed, result),
    )


if __name__ == "__main__":
    main()
