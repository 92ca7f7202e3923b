"""A run that is killed with SIGKILL at any moment, also during a save, resumes to the same weights."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from diffusify.models.saving import load_denoiser
from diffusify.training.adapt import adapt
from tests.training.worlds import adapt_until_killed, start_process

SCRIPT = """
import os, signal, sys
from transformers import PreTrainedTokenizerBase
from diffusify.training.adapt import adapt

save, saves = PreTrainedTokenizerBase.save_pretrained, []

def save_or_kill(self, folder, *args, **kwargs):
    saves.append(folder)
    if len(saves) == 2:  # the second checkpoint has its weights, but not its other files
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, folder, *args, **kwargs)

PreTrainedTokenizerBase.save_pretrained = save_or_kill
adapt(sys.argv[1], sys.argv[2], sys.argv[3], steps=3, length=32, held_out=64, per_device_train_batch_size=2,
      bf16=False, save_strategy="steps", save_steps=1)
"""
OPTIONS: dict[str, Any] = {
    "steps": 12, "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False,
    "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip
KILLS = 50
pytestmark = pytest.mark.slow


def test_kill_during_a_save(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", SCRIPT, causal_base, corpus, str(out)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    load_denoiser(out / "checkpoint-1")
    options = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}
    adapt(causal_base, corpus, out, steps=3, save_strategy="steps", save_steps=1, **options)
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".*"))
    load_denoiser(out)


def test_fifty_kills_at_random_times(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """During loading, training, saving or cleaning up: the same command resumes, and the weights are bitwise equal."""
    rng, out, kills, finished = random.Random(0), tmp_path / "0", 0, 0
    duration = run_for(causal_base, corpus, tmp_path / "undisturbed")
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
    assert duration is not None
    while kills < KILLS or not finished:
        seconds = run_for(causal_base, corpus, out, rng.uniform(0, duration) if kills < KILLS else None)
        if seconds is None:
            kills += 1
            continue
        duration = min(duration, 2 * seconds)  # the machine may have been slower at first
        assert (out / "model.safetensors").read_bytes() == expected
        assert not list(out.glob(".*")) and not list(out.glob("checkpoint-*"))
        finished += 1
        out = tmp_path / str(finished)  # a finished run has nothing left to interrupt


def run_for(base: str, corpus: str, out: Path, timeout: float | None = None) -> float | None:
    """The seconds that a run takes; None if it was killed after `timeout` seconds."""
    start = monotonic()
    process = start_process(adapt_until_killed, None, base, corpus, out, OPTIONS)
    process.join(timeout)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return monotonic() - start if process.exitcode == 0 else None
