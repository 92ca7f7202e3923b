"""Rewards that every installation has: numbers, programs, formats and JSON.

A completion is a text, or for a chat the list of its one message, as in TRL.
"""

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffusify.evaluation.answers import final_answer, last_number
from diffusify.evaluation.sandbox import runs_without_error

_FENCE = re.compile(r"```(?:python|py)?\n(.*?)(?:```|\Z)", re.DOTALL)


def completion_text(completion: Any) -> str:
    """The text of a completion."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def math(prompts: list[Any], completions: list[Any], answer: list[Any]) -> list[float]:
    """1 if the text's number is that of `answer`: the one after `####` (GSM8K's rule), else the last one."""
    return [
        float(_number(completion_text(text)) == _number(str(gold)) is not None)
        for text, gold in zip(completions, answer, strict=True)
    ]


def code(prompts: list[Any], completions: list[Any], test: list[Any]) -> list[float]:
    """1 if the text's program, the first fenced block or all of it, and then `test` run without an error.

    `test` is a program, or a list of lines as in MBPP. See `runs_without_error` for what a program may do.
    """
    programs = [
        f"{_program(completion_text(text))}\n{check if isinstance(check, str) else chr(10).join(check)}\n"
        for text, check in zip(completions, test, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(map(float, pool.map(runs_without_error, programs)))


def json_object(prompts: list[Any], completions: list[Any]) -> list[float]:
    """1 if the text is a JSON object or array."""
    return [float(_is_json(completion_text(text))) for text in completions]


def format_reward(regex: str) -> Callable[..., list[float]]:
    """A reward of 1 if all of the text, without the white space around it, matches a regular expression."""
    try:
        pattern = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward builtin:format:{regex}: not a regular expression: {error}") from error
    if not regex:
        raise ValueError(r"reward builtin:format needs a regular expression, such as builtin:format:.*####\s*\d+")

    def matches(prompts: list[Any], completions: list[Any]) -> list[float]:
        return [float(pattern.fullmatch(completion_text(text).strip()) is not None) for text in completions]

    return matches


REWARDS = {"math": math, "code": code, "json": json_object}


def _number(text: str) -> str | None:
    """The number of a solution in a form that equal numbers share."""
    answer = final_answer(text)
    return last_number(text if answer is None else answer)


def _program(text: str) -> str:
    fenced = _FENCE.search(text)
    return fenced[1] if fenced else text


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
