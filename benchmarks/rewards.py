"""Learning from rewards: sorting, before and after, beside finetuning on the right answers of the same prompts.

    python benchmarks/rewards.py [--steps 150] [--seeds 3] [--arms grpo espo sft]

Prompts ask to write some numbers from the smallest to the largest. The reward is the share of numbers at their place;
an answer is correct if it is 1. `grpo` trains `smollm2-chat`, a block model with its AR half; `espo` trains
`smollm2-infill`, which is bidirectional, after `--warmup` steps of finetuning; `sft` finetunes `smollm2-chat` on the
right answers for as many steps, with as many texts in each. Accuracy of greedy answers to held-out prompts, and tokens
per forward pass, before and after. Rollouts per second through the engine beside the same texts one by one. Arms that
are left out keep their numbers in `results/`.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from machine import earlier, save

import diffusify
from diffusify.reinforcement.reward_prompts import RewardPrompt
from diffusify.reinforcement.rollouts import generate_rollouts
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.examples import Template

CHAT, INFILL = "smollm2-chat", "smollm2-infill"
QUESTION = "Write these numbers from the smallest to the largest: {numbers}"
PLAIN = Template("Numbers: {numbers}\nSorted:", " {answer}")
MAX_NEW_TOKENS = 12
ARMS = ("grpo", "espo", "sft")


def right_places(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
    """The share of numbers that stand where they do in the right answer; 0 for another number of numbers."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [_share(text.replace(",", " ").split(), gold.split()) for text, gold in zip(texts, answer, strict=True)]


def _share(found: list[str], gold: list[str]) -> float:
    same = sum(a == b for a, b in zip(found, gold, strict=False))
    return same / len(gold) if len(found) == len(gold) else 0.0


def write_problems(path: Path, count: int, size: int, seed: int) -> None:
    """Records with `numbers`, `answer`, and the `prompt` and `completion` of a chat."""
    rng, seen = random.Random(seed), set()
    with path.open("w") as file:
        while len(seen) < count:
            numbers = tuple(rng.sample(range(1, 100), size))
            if numbers not in seen:
                seen.add(numbers)
                record = {"numbers": " ".join(map(str, numbers)), "answer": " ".join(map(str, sorted(numbers)))}
                chat = {"prompt": QUESTION.format(**record), "completion": record["answer"]}
                file.write(json.dumps(record | chat) + "\n")


def measure(model: str, tests: list[dict[str, str]], *, chat: bool) -> dict[str, float]:
    """Percent of sorted lists and of numbers at their place in greedy answers, and tokens per forward pass."""
    lm = diffusify.load(model)
    prompts = [_prompt(lm, record, chat) for record in tests]
    answers = generate_rollouts(lm, [([prompt], [SamplingConfig()]) for prompt in prompts], MAX_NEW_TOKENS)
    gold = [record["answer"] for record in tests]
    shares = right_places([], [answer.completion for answer in answers], gold)
    tokens, forwards = (sum(getattr(answer, name) for answer in answers) for name in ("tokens", "forwards"))
    found = {
        "correct": round(100 * fmean(share == 1 for share in shares), 1),
        "right_places": round(100 * fmean(shares), 1),
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


def rollout_rates(tests: list[dict[str, str]], group: int) -> dict[str, float]:
    """Sampled texts per second: groups through the engine, and one text at a time."""
    lm = diffusify.load(CHAT)
    prompts = [_prompt(lm, record, chat=True) for record in tests[:4]]
    settings = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(group)]
    batched = [([prompt] * group, settings) for prompt in prompts]
    single = [([prompt], [one]) for prompt in prompts for one in settings]
    start = perf_counter()
    generate_rollouts(lm, batched, MAX_NEW_TOKENS)
    middle = perf_counter()
    for each in single:
        generate_rollouts(lm, [each], MAX_NEW_TOKENS)
    count, end = len(single), perf_counter()
    return {"batched": round(count / (middle - start), 2), "one_by_one": round(count / (end - middle), 2)}


def run_arm(arm: str, scratch: Path, data: str, tests: list[dict[str, str]], seed: int, chosen: Any) -> dict[str, Any]:
    """One seed of an arm: before, after, and steps per minute."""
    texts = chosen.group * chosen.prompts
    common: dict[str, Any] = {"steps": chosen.steps, "held_out": 0, "seed": seed}
    learning = {"group": chosen.group, "prompts": chosen.prompts, "max_new_tokens": MAX_NEW_TOKENS}
    out, model = scratch / f"{arm}-{seed}", CHAT
    if arm == "espo":
        model = str(
            diffusify.tune(
                INFILL,
                data,
                scratch / f"warm-{seed}",
                template=PLAIN,
                steps=chosen.warmup,
                held_out=0,
                seed=seed,
                length=64,
            )
        )
    before, start = measure(model, tests, chat=arm != "espo"), perf_counter()
    if arm == "sft":
        split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": max(1, texts // 8)}
        diffusify.tune(model, data, out, length=64, learning_rate=chosen.rate, **common, **split)
    else:
        prompt = PLAIN.prompt if arm == "espo" else None
        diffusify.reinforce(
            model, data, out, rewards=right_places, prompt=prompt, learning_rate=chosen.rate, **learning, **common
        )
    minutes = (perf_counter() - start) / 60
    after = measure(str(out), tests, chat=arm != "espo")
    return {"before": before, "after": after, "steps_per_minute": round(chosen.steps / minutes, 2)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--warmup", type=int, default=30)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--size", type=int, default=3, help="numbers in a list")
    options.add_argument("--group", type=int, default=8)
    options.add_argument("--prompts", type=int, default=4)
    options.add_argument("--rate", type=float, default=1e-4)
    options.add_argument("--dry", action="store_true", help="print the result instead of saving it")
    chosen = options.parse_args()
    settings = {name: getattr(chosen, name) for name in ("steps", "size", "group", "prompts", "rate", "tests")}
    result = earlier("rewards") if set(chosen.arms) != set(ARMS) and not chosen.dry else {}
    result |= {"settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        train, held_out = scratch / "train.jsonl", scratch / "held_out.jsonl"
        write_problems(train, 2000, chosen.size, seed=0)
        write_problems(held_out, chosen.tests, chosen.size, seed=1)
        known = {json.loads(line)["numbers"] for line in train.read_text().splitlines()}
        tests = [
            record for line in held_out.read_text().splitlines() if (record := json.loads(line))["numbers"] not in known
        ]
        result["rollouts_per_second"] = rollout_rates(tests, chosen.group)
        print(result["rollouts_per_second"], flush=True)
        for arm in chosen.arms:
            runs = [run_arm(arm, scratch, str(train), tests, seed, chosen) for seed in range(chosen.seeds)]
            result[arm] = runs
    if chosen.dry:
        print(json.dumps(result, indent=2))
    else:
        command = f"python benchmarks/rewards.py --steps {chosen.steps} --seeds {chosen.seeds} --tests {chosen.tests}"
        print("wrote", save("rewards", command, 0, result))


if __name__ == "__main__":
    main()
