"""Learning from rewards: the largest of three numbers, before and after, beside finetuning on the right answers.

    python benchmarks/rewards.py GSM8K.jsonl [--arms grpo grpo_high_rate espo sft gsm8k]

Prompts ask for the largest of three numbers; the reward is 1 for it, else 0. `grpo` trains `smollm2-chat`, a block
model with its AR half, and `grpo_high_rate` does at a higher learning rate; `espo` trains `smollm2-masked`, which is
bidirectional, after `--warmup` steps of finetuning on right answers, with half as many prompts in a step; `sft`
finetunes `smollm2-chat` on the right answers to as many prompts as `grpo` has. Accuracy of greedy answers to prompts
that are held out, and tokens per forward pass, before and after, with standard errors: of a share before, over the
seeds after. `gsm8k` trains `smollm2-chat` for some minutes on GSM8K's training questions, of which 100 are held out,
with the reward `builtin:math`. Rollouts per second through the engine beside the same texts one by one. The result is
saved after every run; arms that are left out keep their numbers in `results/`.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import Any

from arms import read_records
from machine import earlier, save

import diffusify
from diffusify.reinforcement.builtin_rewards import math
from diffusify.reinforcement.reward_prompts import RewardPrompt
from diffusify.reinforcement.rollouts import generate_rollouts
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.examples import Template

CHAT, INFILL = "smollm2-chat", "smollm2-masked"
QUESTION = "Which is the largest number: {numbers}? Answer with the number only."
PLAIN = Template("Numbers: {numbers}\nLargest:", " {answer}")
RATES = {"grpo": 2e-4, "grpo_high_rate": 3e-4, "espo": 1e-4, "sft": 3e-4}  # of learning; all train LoRA adapters
GSM8K = {"minutes": 60, "held_out": 100, "max_new_tokens": 96, "group": 8, "prompts": 4}


@dataclass(frozen=True)
class Task:
    """Prompts to train on, those that are held out, the reward, and the most tokens of an answer."""

    train: Path
    tests: list[dict[str, str]]
    reward: Callable[..., list[float]]
    new_tokens: int


def is_right(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
    """1 for the right answer and nothing else."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(text.strip() == gold) for text, gold in zip(texts, answer, strict=True)]


def problems(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Different records with `numbers`, `answer`, and the `prompt` and `completion` of a chat."""
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        numbers = tuple(rng.sample(range(10, 100), 3))
        if numbers not in seen:
            seen.add(numbers)
            record = {"numbers": ", ".join(map(str, numbers)), "answer": str(max(numbers))}
            yield record | {"prompt": QUESTION.format(**record), "completion": record["answer"]}


def measure(model: str, task: Task, *, chat: bool) -> dict[str, float]:
    """Percent of right greedy answers and its standard error, and tokens per forward pass."""
    lm = diffusify.load(model)
    groups = [([_prompt(lm, record, chat)], [SamplingConfig()]) for record in task.tests]
    answers = generate_rollouts(lm, groups, task.new_tokens)
    gold = [record["answer"] for record in task.tests]
    right = fmean(task.reward([], [answer.completion for answer in answers], gold))
    tokens, forwards = (sum(getattr(answer, name) for answer in answers) for name in ("tokens", "forwards"))
    found = {
        "correct": round(100 * right, 1),
        "standard_error": round(100 * (right * (1 - right) / len(gold)) ** 0.5, 1),
        "tokens_per_forward": round(tokens / forwards, 3),
    }
    print(model, found, flush=True)
    return found


def _prompt(lm: diffusify.DiffusionLM, record: dict[str, str], chat: bool) -> RewardPrompt:
    if not chat:
        text = PLAIN.fill_prompt(record)
        return RewardPrompt(lm.tokenizer.add_start(lm.tokenizer.encode(text)), text, record)
    messages = [{"role": "user", "content": record["prompt"]}]
    return RewardPrompt(lm.chat_template.prompt(messages), messages, record)


def rollout_rates(task: Task, group: int) -> dict[str, float]:
    """Sampled texts per second, the better of two: groups through the engine, and one text at a time."""
    lm = diffusify.load(CHAT)
    prompts = [_prompt(lm, record, chat=True) for record in task.tests[:4]]
    settings = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(group)]
    batched = [[([prompt] * group, settings) for prompt in prompts]]
    single = [[([prompt], [one])] for prompt in prompts for one in settings]

    def rate(calls: list[Any]) -> float:
        seconds = []
        for _ in range(2):
            start = perf_counter()
            for groups in calls:
                generate_rollouts(lm, groups, task.new_tokens)
            seconds.append(perf_counter() - start)
        return round(len(single) / min(seconds), 2)

    found = {"batched": rate(batched), "one_by_one": rate(single)}
    print(found, flush=True)
    return found


def learn(model: str, task: Task, out: Path, **settings: Any) -> dict[str, Any]:
    """Train on rewards: the mean reward of sampled answers in parts of the run, and the seconds of a typical step."""
    ticks = [perf_counter()]

    def reward(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
        ticks.append(perf_counter())
        return task.reward(prompts, completions, answer)

    diffusify.reinforce(
        model, str(task.train), out, rewards=reward, max_new_tokens=task.new_tokens, held_out=0, **settings
    )
    log = json.loads((out / "training.json").read_text())["log"]
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    size = max(1, len(rewards) // 10)
    return {
        "steps": len(rewards),
        "sampled_rewards": [round(fmean(rewards[i : i + size]), 3) for i in range(0, len(rewards), size)],
        "seconds_per_step": round(median(b - a for a, b in zip(ticks, ticks[1:], strict=False)), 2),
    }


def run_arm(arm: str, scratch: Path, task: Task, seed: int, chosen: Any) -> dict[str, Any]:
    """One seed of an arm: before, after, and how the reward rose."""
    out, model, chat, found = scratch / f"{arm}-{seed}", CHAT, arm != "espo", {}
    common: dict[str, Any] = {"steps": chosen.steps, "seed": seed, "learning_rate": RATES[arm]}
    if not chat:
        warm = {"steps": chosen.warmup, "held_out": 0, "seed": seed, "length": 64, "template": PLAIN}
        model = str(diffusify.tune(INFILL, str(task.train), scratch / f"warm-{seed}", **warm))
    before = measure(model, task, chat=chat)
    if arm == "sft":
        batch = {"length": 64, "per_device_train_batch_size": chosen.prompts}
        diffusify.tune(model, str(task.train), out, held_out=0, **batch, **common)
    elif chat:
        found = learn(model, task, out, group=chosen.group, prompts=chosen.prompts, **common)
    else:  # a bidirectional model runs all texts whole
        found = learn(model, task, out, group=chosen.group, prompts=chosen.prompts // 2, prompt=PLAIN.prompt, **common)
    return {"before": before, "after": measure(str(out), task, chat=chat)} | found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of an arm, and means over them with their standard errors."""
    result: dict[str, Any] = {"runs": runs}
    for when in ("before", "after"):
        values = [run[when]["correct"] for run in runs]
        spread = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        error = max(spread, runs[0][when]["standard_error"]) if when == "before" else spread
        tokens = fmean(run[when]["tokens_per_forward"] for run in runs)
        result[when] = {
            "correct": round(fmean(values), 1),
            "standard_error": round(error, 1),
            "tokens_per_forward": round(tokens, 2),
        }
    return result


def largest_of_three(scratch: Path, count: int) -> Task:
    """The task, with `count` prompts held out."""
    tests = list(problems(count, seed=1))
    known = {record["numbers"] for record in tests}
    lines = [json.dumps(record) + "\n" for record in problems(4000, seed=0) if record["numbers"] not in known]
    (scratch / "train.jsonl").write_text("".join(lines))
    return Task(scratch / "train.jsonl", tests, is_right, 4)


def run_gsm8k(scratch: Path, source: str) -> dict[str, Any]:
    """A run on GSM8K: before, after, and how the reward rose."""
    records = [
        {"prompt": each["question"], "completion": each["answer"], "answer": each["answer"]}
        for each in read_records(source)
    ]
    random.Random(0).shuffle(records)
    count = int(GSM8K["held_out"])
    (scratch / "gsm8k.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[count:]))
    task = Task(scratch / "gsm8k.jsonl", records[:count], math, int(GSM8K["max_new_tokens"]))
    before, out = measure(CHAT, task, chat=True), scratch / "solver"
    found = learn(CHAT, task, out, **{name: GSM8K[name] for name in ("minutes", "group", "prompts")})
    return {"settings": GSM8K, "before": before, "after": measure(str(out), task, chat=True)} | found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("gsm8k", help="JSON lines with GSM8K's question and answer")
    options.add_argument("--arms", nargs="+", choices=[*RATES, "gsm8k"], default=[*RATES, "gsm8k"])
    options.add_argument("--steps", type=int, default=24)
    options.add_argument("--warmup", type=int, default=5)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--group", type=int, default=8)
    options.add_argument("--prompts", type=int, default=4)
    chosen = options.parse_args()
    names = ("steps", "warmup", "seeds", "tests", "group", "prompts")
    result = earlier("rewards") | {"settings": {name: getattr(chosen, name) for name in names} | {"rates": RATES}}
    command = f"python benchmarks/rewards.py GSM8K --steps {chosen.steps} --seeds {chosen.seeds}"

    def keep(name: str, value: dict[str, Any]) -> None:
        result[name] = value
        print("wrote", save("rewards", command, 0, result), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        task = largest_of_three(scratch, chosen.tests)
        if "grpo" in chosen.arms:
            keep("rollouts_per_second", rollout_rates(task, chosen.group))
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in chosen.arms if arm in RATES}
        for seed in range(chosen.seeds):
            for arm in runs:
                runs[arm].append(run_arm(arm, scratch, task, seed, chosen))
                keep(arm, summary(runs[arm]))
        if "gsm8k" in chosen.arms:
            keep("gsm8k", run_gsm8k(scratch, chosen.gsm8k))


if __name__ == "__main__":
    main()
