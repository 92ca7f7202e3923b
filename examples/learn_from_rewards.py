"""Teach a chat model to answer with JSON, by rewards only.

python examples/learn_from_rewards.py smollm2-chat runs/json

No right answers are given: the model samples some, and learns from those that are rewarded more than the others.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusify

THINGS = ("cat", "river", "piano", "lemon", "tractor", "moon", "bread", "window", "horse", "kite", "clock", "island")
QUESTION = "Describe a {thing} as a JSON object with the fields name and color."


def has_fields(prompts: list[Any], completions: list[Any], fields: list[list[str]]) -> list[float]:
    """The share of the record's fields that the answer has; a reward between 0 and 1 shows the way."""
    answers = [completion[-1]["content"] for completion in completions]
    pairs = zip(answers, fields, strict=True)
    return [sum(f'"{name}"' in text for name in names) / len(names) for text, names in pairs]


def main(model: str, out: str, **settings: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "prompts.jsonl"
        records = [{"prompt": QUESTION.format(thing=thing), "fields": ["name", "color"]} for thing in THINGS]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        rewards = ["builtin:json", has_fields]
        folder = diffusify.reinforce(model, str(data), out, rewards=rewards, **(settings or {"minutes": 20}))
    for line in (folder / "texts.jsonl").read_text().splitlines()[-3:]:
        text = json.loads(line)
        print(text["rewards"], text["completion"])


if __name__ == "__main__":
    main(*sys.argv[1:3])
