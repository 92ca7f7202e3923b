"""The benchmark for a GPU runs from beginning to end without one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.pretend_accelerator import accelerator

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_it_runs_on_a_cpu_with_tiny_networks() -> None:
    before = sorted((BENCHMARKS / "results").iterdir())
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    result = json.loads(done.stdout[done.stdout.index("\n{") :])
    check(result)
    assert "random: training, sdpa, compiled" in result
    assert sorted((BENCHMARKS / "results").iterdir()) == before
    refused = subprocess.run(command[:-1], capture_output=True, text=True)
    assert torch.accelerator.is_available() or "this machine has no GPU; --tiny tries" in refused.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast is not pretended
def test_it_runs_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu: Any = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "has_kernel", lambda kernel, device: "compiled" not in kernel)  # these are not pretended
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30)
    with accelerator():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: properties)
        result = gpu.measure(gpu.TINY, torch.device("cuda"), 60.0)
        assert gpu.measure(gpu.TINY, torch.device("cuda"), 0.0)["random: decoding"] == "no time left"
    check(result)
    assert result["hardware"]["name"] == "H100" and result["hardware"]["peak_tflops"] == 989.0


def check(result: dict[str, Any]) -> None:
    assert result["random: agreement"]["lossless_texts_equal_to_the_cpu"] == result["random: agreement"]["texts"] == 4
    assert result["random: agreement"]["lossless_texts_equal_to_ar"]["float32"] == 4
    for model in ("random", "random, adapters"):
        for batch in ("batch 1", "batch 2"):
            ways = result[f"{model}: decoding"][batch]
            assert set(ways) == {"AR, transformers", "lossless", "threshold 0.9"}
            assert all(way["tokens_per_second"] > 0 for way in ways.values())
        training = result[f"{model}: training, sdpa"]
        assert training["share_of_peak"] > 0 and training["planned_gib"] > 0
