"""A run that learns from rewards and is killed with SIGKILL at any moment resumes to the same weights and texts."""

import json
import random
import signal
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from diffusify.models.recipes import block
from diffusify.training.adapt import adapt
from tests.training.worlds import reinforce_until_killed, start_process

KILLS = 20
OPTIONS: dict[str, Any] = {
    "rewards": "builtin:math", "prompt": "{question}", "group": 4, "prompts": 2, "updates": 2, "max_new_tokens": 8,
    "steps": 8, "held_out": 2, "bf16": False, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip


@pytest.mark.slow
def test_twenty_kills(causal_base: str, corpus: str, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{i} is", "answer": i}) + "\n" for i in range(24)))
    options: dict[str, Any] = {"steps": 1, "length": 32, "held_out": 64, "bf16": False}
    model = str(adapt(causal_base, corpus, tmp_path / "model", recipe=block(), **options))
    rng, out, kills, finished = random.Random(0), tmp_path / "0", 0, 0
    duration = run_for(model, str(questions), tmp_path / "undisturbed")
    expected = [(tmp_path / "undisturbed" / name).read_bytes() for name in ("model.safetensors", "texts.jsonl")]
    assert duration is not None
    while kills < KILLS or not finished:
        seconds = run_for(model, str(questions), out, rng.uniform(0, duration) if kills < KILLS else None)
        if seconds is None:
            kills += 1
            continue
        assert [(out / name).read_bytes() for name in ("model.safetensors", "texts.jsonl")] == expected
        assert not list(out.glob(".*")) and not list(out.glob("checkpoint-*"))
        finished += 1
        out = tmp_path / str(finished)


def run_for(model: str, data: str, out: Path, timeout: float | None = None) -> float | None:
    """The seconds that a run takes; None if it was killed after `timeout` seconds."""
    start = monotonic()
    process = start_process(reinforce_until_killed, model, data, out, OPTIONS)
    process.join(timeout)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return monotonic() - start if process.exitcode == 0 else None
