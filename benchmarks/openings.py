"""Openings of texts of several kinds, and how a model continues them, to train its drafts on what it writes itself.

None of them is among the prompts of `prompts.py`, with which decoding is measured.
"""

import json
import random
from itertools import product
from pathlib import Path

from prompts import PROMPTS

import diffusify

TOPICS = (
    "bread", "rain", "the moon", "bicycles", "honey", "the Atlantic", "libraries", "sleep", "tea", "volcanoes",
    "gravity", "the human heart", "winter", "trains", "music", "chess", "salt", "dogs", "cats", "the sun", "paper",
    "glass", "gardens", "football", "money", "clocks", "the internet", "telescopes", "coffee", "rivers", "birds",
    "friendship", "ice", "electricity", "maps", "painting", "the brain", "trees", "whales", "democracy",
    "vaccines", "mountains", "the printing press", "poetry", "lighthouses", "bridges", "rice", "plastics", "dinosaurs",
    "marathons", "cheese", "theatre", "elections", "robots", "satellites", "wool", "bees", "deserts", "photography",
)  # fmt: skip
PEOPLE = (
    "a fisherman", "the old teacher", "my brother", "a young queen", "the doctor", "two strangers", "her neighbour",
    "an engineer", "the captain", "a shy boy", "the baker", "a detective", "our dog", "the gardener", "a lonely robot",
)  # fmt: skip
NAMES = (
    "count_words", "reverse", "is_prime", "merge", "average", "parse_date", "flatten", "load_config", "binary_search",
    "remove_duplicates", "to_celsius", "send_email", "draw_board", "shuffle", "validate", "median", "factorial",
    "save_image", "find_path", "encode", "split_lines", "max_depth", "is_palindrome", "group_by", "power",
)  # fmt: skip
THINGS = (
    "Account", "Queue", "Car", "Node", "Matrix", "Player", "Timer", "Book", "Logger", "Graph", "Student", "Cache",
    "Point", "Order", "Token",
)  # fmt: skip
KINDS = {
    "prose": (
        ("The history of {} begins", "Most people think that {}", "Scientists who study {}", "In a book about {}, the",
         "There are many reasons why {}", "The importance of {} in modern life", "An essay about {}:\n\nIn",
         "News: a new report on {}"),
        TOPICS,
    ),
    "stories": (
        ("Once there was {} who", "One morning {} woke up and", "It was late at night when {}",
         "Long ago, {} had a secret:", "In the middle of the storm, {}", "Dear diary, today {}",
         "Nobody believed {} when"),
        PEOPLE,
    ),
    "code": (
        ("def {}(items):\n", "def {}(text: str) -> str:\n    \"\"\"", "import os\n\ndef {}(path):\n",
         "# Test the function {}\n", "function {}(x) {{\n", "public static int {}(int n) {{\n",
         "from utils import {}\n\n", "def {}(a, b):\n    return"),
        NAMES,
    ),
    "classes": (
        ("class {}:\n", "class {}:\n    def __init__(self,", "public class {} {{\n", "SELECT * FROM {} WHERE",
         "struct {} {{\n", "CREATE TABLE {} (\n"),
        THINGS,
    ),
    "questions": (
        ("What is the meaning of {}?", "Q: Why are {} important?\nA:", "Question: What do we know about {}?\nAnswer:",
         "How does one learn about {}?", "Explain {} to a child.", "What are the dangers of {}?",
         "Who is interested in {}, and why?", "Q: When did {} become popular?\nA:"),
        TOPICS,
    ),
    "lists": (
        ("Five facts about {}:\n1.", "Things that go with {}:\n-", "How to write about {}:\n1.",
         "Steps to understand {}:\n1.", "Questions about {}:\n1.", "Pros and cons of {}:\n-", "A timeline of {}:\n-",
         "Famous places for {}:\n1."),
        TOPICS,
    ),
}  # fmt: skip


def openings(seed: int = 0) -> list[str]:
    """All openings, in random order."""
    rng, known = random.Random(seed), {prompt for prompts in PROMPTS.values() for prompt in prompts}
    every = [form.format(filler) for forms, fillers in KINDS.values() for form, filler in product(forms, fillers)]
    found = [text for text in every if text not in known]
    rng.shuffle(found)
    return found


def write_continuations(model: str, path: Path, *, tokens: int = 128, batch: int = 192) -> str:
    """Write a file of texts: every opening, continued by a model greedily and at temperature 0.7.

    A partial file is continued.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    every, lm = openings(), diffusify.load(model)
    calls = [(first, temperature) for first in range(0, len(every), batch) for temperature in (0.0, 0.7)]
    with path.open("a", encoding="utf-8") as file:
        for first, temperature in calls:
            prompts = every[first : first + batch]
            if done >= len(prompts):
                done -= len(prompts)
                continue
            results = lm.generate(prompts, tokens, temperature=temperature, seed=first)
            texts = (prompt + str(result.completion) for prompt, result in zip(prompts, results, strict=True))
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            file.flush()
            print(f"{first + len(prompts)} of {len(every)} openings, temperature {temperature}", flush=True)
    return str(path)
