"""Rewards: the built-in ones, functions by name, and what happens to those that fail."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from diffusify.reinforcement.rewards import Reward, RewardError, make_rewards


def measured(name: str, texts: list[str], **columns: list[Any]) -> list[float]:
    [reward] = make_rewards(name)
    reward.check_columns(list(columns))
    return reward(["?"] * len(texts), texts, columns, seconds=60.0).tolist()


def test_builtin_rewards() -> None:
    texts = ["so it is 1,200", "= 5\n#### 1200.0", "1200 or 13", "none"]
    assert measured("builtin:math", texts, answer=["3 * 400 = 1200\n#### 1,200"] * 4) == [1, 1, 0, 0]
    assert measured("builtin:math", ["7.0", "8"], answer=[7, 7]) == [1, 0]
    assert measured("builtin:math", ["none"], answer=["none"]) == [0]
    programs = ["Here:\n```python\ndef f(x):\n    return x + 1\n```", "def f(x): return x", "while True: pass", "1/0"]
    tests = ["assert f(1) == 2", ["assert f(1) == 1", "assert f(2) == 2"], "", ""]
    assert measured("builtin:code", [*programs[:2], programs[3]], test=[*tests[:2], ""]) == [1, 1, 0]
    assert measured("builtin:json", ['{"a": [1]}', "[]", "3", "{", '{"a": 1} so']) == [1, 1, 0, 0, 0]
    assert measured(r"builtin:format:<a>.*</a>\d", ["<a>x\ny</a>3 ", "<a></a>", "so <a></a>1"]) == [1, 0, 0]


def test_a_chat_s_completion_is_a_message() -> None:
    [reward] = make_rewards("builtin:json")
    chats = [[{"role": "assistant", "content": "{}"}], [{"role": "assistant", "content": "no"}]]
    assert reward([[], []], chats, {}, seconds=60.0).tolist() == [1, 0]


def test_functions_by_name_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "def short(prompts, completions, limit):\n    return [float(len(c) < n) for c, n in zip(completions, limit)]\n"
    )
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    rewards = make_rewards(["0.5*my_rewards:short", "my_rewards.py:short", "-2*builtin:json"])
    assert [(each.name, each.weight) for each in rewards] == [
        ("my_rewards:short", 0.5), ("my_rewards.py:short", 1.0), ("builtin:json", -2.0),
    ]  # fmt: skip
    columns = {"limit": [3, 3], "other": [1, 2]}  # it takes only `limit`
    assert rewards[0](["", ""], ["ab", "abc"], columns, seconds=60.0).tolist() == [1, 0]
    with pytest.raises(ValueError, match="needs the field limit, and the records have other"):
        rewards[0].check_columns(["other"])
    for name, message in {
        "my_rewards:shrot": 'no function "shrot"; did you mean "short"',
        "builtin:maths": '"maths" is not known; did you mean "math"',
        "builtin:format:(": "not a regular expression",
        "no_such_module:f": "no_such_module cannot be imported",
        "math": "write builtin:NAME, module:function or file.py:function",
        "1.2.3*builtin:json": "1.2.3 is not a weight",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_rewards(name)
    with pytest.raises(ValueError, match=r"given twice; add up the weights"):
        make_rewards(["builtin:json", "2*builtin:json"])
    with pytest.raises(ValueError, match="there is no reward"):
        make_rewards([])


def test_a_reward_that_fails_is_one_error() -> None:
    never = threading.Event()

    def call(function: Any) -> list[float]:
        return Reward(function, "mine")(["?"] * 2, ["a", "b"], {}, seconds=0.02).tolist()

    for function, message in [
        (lambda prompts, completions: 1 / 0, r"reward mine raised ZeroDivisionError"),
        (lambda prompts, completions: [1.0], r"returned 1 numbers for 2 texts"),
        (lambda prompts, completions: 1.0, r"returned 1.0; return a list"),
        (lambda prompts, completions: ["good", "bad"], r"not a number"),
        (lambda prompts, completions: never.wait(), r"has not returned after 0.02 s; .* raise reward_seconds"),
    ]:
        with pytest.raises(RewardError, match=message):
            call(function)
    never.set()
    values = call(lambda prompts, completions: [None, math.inf])
    assert values[0] == 0 and math.isnan(values[1])
