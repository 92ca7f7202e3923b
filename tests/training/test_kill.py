"""Killed with SIGKILL at any moment, also in the middle of a save, a run goes on to the same weights."""

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
from tests.training.worlds import adapt_until, start

SCRIPT = """
import os, signal, sys
from transformers import PreTrainedTokenizerBase
from diffusify.training.adapt import adapt

save, saves = PreTrainedTokenizerBase.save_pretrained, []

def save_or_die(self, folder, *rest, **more):
    saves.append(folder)
    if len(saves) == 2:  # the weights of the second checkpoint are written, the rest is not
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, folder, *rest, **more)

PreTrainedTokenizerBase.save_pretrained = save_or_die
adapt(sys.argv[1], sys.argv[2], sys.argv[3], steps=3, length=32, held_out=64, per_device_train_batch_size=2,
      bf16=False, save_strategy="steps", save_steps=1)
"""
OPTIONS: dict[str, Any] = {
    "steps": 12, "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False,
    "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip
KILLS = 50


def test_killed_in_the_middle_of_a_save(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    died = subprocess.run([sys.executable, "-c", SCRIPT, causal_base, corpus, str(out)], env=os.environ, check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    load_denoiser(out / "checkpoint-1")
    options = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}
    adapt(causal_base, corpus, out, steps=3, save_strategy="steps", save_steps=1, **options)
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".*"))
    load_denoiser(out)


@pytest.mark.slow
def test_killed_fifty_times_at_random(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Loading, training, saving, tidying up: wherever it dies, the same command goes on, bit by bit."""
    luck, out, kills, finished = random.Random(0), tmp_path / "0", 0, 0
    span = live(causal_base, corpus, tmp_path / "whole")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert span is not None
    while kills < KILLS or not finished:
        took = live(causal_base, corpus, out, luck.uniform(0, span) if kills < KILLS else None)
        if took is None:
            kills += 1
            continue
        span = min(span, 2 * took)  # the machine may have been slower at first
        assert (out / "model.safetensors").read_bytes() == whole
        assert not list(out.glob(".*")) and not list(out.glob("checkpoint-*"))
        finished += 1
        out = tmp_path / str(finished)  # a new run: what is finished already has nothing to kill


def live(base: str, corpus: str, out: Path, left: float | None = None) -> float | None:
    """How many seconds a run takes to come to its end; None if it is killed, because no more were `left` to it."""
    began = monotonic()
    process = start(adapt_until, None, base, corpus, out, OPTIONS)
    process.join(left)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return monotonic() - began if process.exitcode == 0 else None
