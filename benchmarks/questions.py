"""Questions on topics of everyday life and of Python, in short forms; a chat model learns a base's answers to them."""

import json
from pathlib import Path

import diffusify
from diffusify.sampling.diffusion_lm import Message
from diffusify.sampling.sampling_config import SamplingConfig

THINGS = (
    "bread", "rain", "the moon", "a bicycle", "honey", "the sea", "a library", "sleep", "tea", "a volcano", "gravity",
    "the heart", "winter", "a train", "music", "chess", "salt", "a dog", "cats", "the sun", "paper", "glass",
    "a garden", "football", "money", "time", "the internet", "a telescope", "coffee", "rivers", "birds", "dreams",
    "friendship", "ice", "electricity", "maps", "cooking", "painting", "the brain", "trees",
)  # fmt: skip
ABOUT_THINGS = (
    "What is {}? Answer in one sentence.",
    "Explain {} to a child in two sentences.",
    "Name three words that go with {}.",
    "Write one sentence with {} in it.",
    "Write a very short poem about {}.",
    "Why do people care about {}? Answer briefly.",
    "Give one fact about {}.",
    "Ask me a question about {}.",
    "Begin a story about {} in two sentences.",
    "What would you say to somebody who dislikes {}? One sentence.",
)
PYTHON = (
    "a list", "a dictionary", "a tuple", "a set", "a for loop", "a while loop", "an exception", "a class", "a function",
    "a lambda", "a module", "a generator", "a decorator", "a string", "an f-string", "slicing", "the with statement",
    "an integer", "recursion", "a list comprehension",
)  # fmt: skip
ABOUT_PYTHON = (
    "What is {} in Python? Answer in one sentence.",
    "Show a short example of {} in Python.",
    "When should I use {} in Python? Answer briefly.",
    "Name one mistake that beginners make with {} in Python.",
)
HELD_OUT = 40  # held-out questions


def questions() -> tuple[list[str], list[str]]:
    """Training questions and held-out questions, evenly spread."""
    every = [form.format(thing) for form in ABOUT_THINGS for thing in THINGS]
    every += [form.format(thing) for form in ABOUT_PYTHON for thing in PYTHON]
    apart = every[:: len(every) // HELD_OUT][:HELD_OUT]
    return [one for one in every if one not in apart], apart


def write_answers(model: str, path: Path, *, tokens: int = 144, batch: int = 64) -> str:
    """Write a file of chats: a model's answers to the training questions, greedily and at temperature 0.7.

    Answers longer than `tokens` are left out. A finished file is not written again.
    """
    if path.is_file():
        return str(path)
    asked, lm, chats = questions()[0], diffusify.load(model), []
    for first in range(0, len(asked), batch):
        mine = asked[first : first + batch]
        prompts = [[Message(role="user", content=one)] for one in mine]
        for temperature in (0.0, 0.7):
            settings = SamplingConfig(temperature=temperature, seed=first)
            for one, result in zip(mine, lm.prepare_chat(prompts, tokens, settings).results(), strict=True):
                if result.finish_reason == "stop":
                    chats.append({"prompt": one, "completion": result.completion})
        print(f"{first + len(mine)} of {len(asked)} questions, {len(chats)} answers", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in chats), encoding="utf-8")
    return str(path)
