"""Killed with SIGKILL in the middle of a save, a run goes on from the checkpoint before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from diffusify.models.saving import load_denoiser
from diffusify.training.adapt import adapt

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
