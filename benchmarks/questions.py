"""Questions for a chat model to learn from its own answers: topics of everyday life and of Python, in short forms."""

import json
from pathlib import Path

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


def write_questions(path: Path) -> str:
    """Write the training questions as a file of records."""
    lines = [json.dumps({"prompt": one, "completion": ""}) + "\n" for one in questions()[0]]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)
