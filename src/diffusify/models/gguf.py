"""GGUF files, dequantized once into a safetensors folder in the cache."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig

from diffusify.config import cache_folder

_MEGABYTE = 1 << 20


def unpack_gguf(path: Path, check: Callable[[PreTrainedConfig], object]) -> Path:
    """The float32 safetensors folder of a GGUF file, with its tokenizer; later calls reuse the cached folder.

    `check` receives the network's config before its weights are read, and may raise. ValueError if the file cannot be
    read or lacks tensors of its network.
    """
    folder = cache_folder() / f"{path.stem}-{_fingerprint(path)}"
    if folder.is_dir():
        return folder
    check(read_gguf_config(path))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A crash must not leave an incomplete folder under the final name.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as parent:
        draft = Path(parent) / folder.name
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            # A network that stays quantized can be neither saved nor trained.
            network, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        except Exception as error:
            raise _unreadable(path, error) from error
        if missing := sorted(report["missing_keys"]):  # else they would be saved with random values
            raise ValueError(f"{path} lacks {len(missing)} tensors of its network, such as {missing[0]}")
        network.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        try:
            os.replace(draft, folder)
        except OSError:
            if not folder.is_dir():  # else another process has made the same folder
                raise
    return folder


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The config of the network in a GGUF file. ValueError if the file cannot be read."""
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader validates nothing, so corrupt bytes may raise anything
        raise _unreadable(path, error) from error


def _fingerprint(path: Path) -> str:
    """A hash of a file's size, first and last megabyte: enough to tell models apart without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_MEGABYTE))
        file.seek(max(0, size - _MEGABYTE))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"cannot read {path} as GGUF ({error}); download the file again or give a safetensors folder")
