"""The safetensors files of a network's weights."""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open


def weight_files(folder: Path, source: str) -> list[Path]:
    """The files with a network's weights. ValueError if they are missing, truncated or not safetensors."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    elif index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        raise ValueError(
            f"base {source} has no model.safetensors; if its weights are .bin files that you trust, convert them: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    files = sorted(folder / name for name in names)
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is missing, truncated or not safetensors ({error}); download it again") from error
    return files


def count_numbers(files: Iterable[Path]) -> int:
    """The number of numbers in safetensors files, from their headers."""
    count = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            count += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count
