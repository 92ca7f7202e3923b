"""The machine and the versions of a measurement, which are part of every result."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def save(name: str, command: str, seed: int, result: dict[str, Any]) -> Path:
    """Write `results/NAME.json`: the command, the machine, the versions, the seed, and the numbers."""
    record = {
        "command": command,
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("diffusify", "torch", "transformers")},
        "seed": seed,
        "result": result,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def earlier(name: str) -> dict[str, Any]:
    """The numbers that `results/NAME.json` has so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.is_file() else {}


def cpu_name() -> str:
    """The name of the processor."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return cpu or platform.processor()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
