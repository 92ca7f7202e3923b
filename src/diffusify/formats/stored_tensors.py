"""Tensors in safetensors files: their headers are matched with a network, and one file is in memory at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from diffusify.formats.layouts import Layout
from diffusify.models import loading
from diffusify.models.logging import quiet_transformers
from diffusify.models.weight_files import weight_files

MAX_SHARD_BYTES = 4 << 30  # per file of weights, and so in memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The default dtypes of saved weights. float16 overflows where the others do not, and float32 holds all its values.
SAVED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}

# Mixtures of experts have one tensor for all experts in memory, and one for each expert in files.
_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not yet read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(self.name)


def stored_tensors(folder: Path, source: str) -> dict[str, StoredTensor]:
    """All tensors in a folder's files by their names there, from the files' headers alone."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder, source):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                header = opened.get_slice(name)
                if name in tensors:
                    raise ValueError(f"{source} stores {name} twice, in {tensors[name].file.name} and {file.name}")
                tensors[name] = StoredTensor(file, name, tuple(header.get_shape()), header.get_dtype())
    return {name: tensor for name, tensor in tensors.items() if not loading.IGNORED_TENSORS.search(name)}


def empty_network(network_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A network without weights, which knows the names and shapes of its tensors."""
    with torch.device("meta"), quiet_transformers():
        return network_class(config)


def match_tensors(
    network: PreTrainedModel, tensors: Mapping[str, StoredTensor], source: str, layout: Layout | None = None
) -> dict[str, StoredTensor]:
    """The stored tensors of a network by their stock names, where `layout` gives their names in the files.

    ValueError if any tensor is missing, unknown, quantized or of another shape, or if tied tensors differ.
    """
    released = layout.released_name if layout else str
    expected = {key: (released(key), shape) for key, shape in _file_shapes(network)}
    for key, original_key in network.all_tied_weights_keys.items():
        copy, original = tensors.get(expected[key][0]), tensors.get(expected[original_key][0])
        if copy and original and not torch.equal(copy.read(), original.read()):
            raise ValueError(f"{source} ties {copy.name} to {original.name}, but stores different values for it")
        tensors = {name: tensor for name, tensor in tensors.items() if name != expected[key][0]}
        del expected[key]
    names = {name for name, _ in expected.values()}
    wrong = {
        "missing": names - set(tensors),
        "of another shape": [
            f"{name} {tensors[name].shape}, not {shape}"
            for name, shape in expected.values()
            if name in tensors and tensors[name].shape != shape
        ],
        "unknown": set(tensors) - names,
        "quantized": [
            f"{tensor.name} ({tensor.dtype})" for tensor in tensors.values() if tensor.dtype not in SAVED_DTYPES
        ],
    }
    if any(wrong.values()):
        details = "; ".join(f"{problem}: {loading.first_names(keys)}" for problem, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {source} do not fit {type(network).__name__}: {details}")
    return {key: tensors[name] for key, (name, _) in expected.items()}


def saved_dtypes(tensors: Mapping[str, StoredTensor], dtype: str | None) -> dict[str, torch.dtype]:
    """The dtype in which each tensor is saved: `dtype`, or as it is stored."""
    return {key: DTYPES[dtype] if dtype else SAVED_DTYPES[tensor.dtype] for key, tensor in tensors.items()}


def write_weights(tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, torch.dtype], folder: Path) -> None:
    """Write tensors under their keys, one shard in memory at a time. ValueError for one that float16 cannot hold."""
    ends, size = {}, 0
    for key, tensor in tensors.items():
        size += torch.Size(tensor.shape).numel() * dtypes[key].itemsize
        ends[key] = size
    shards = [list(keys) for _, keys in groupby(tensors, key=lambda key: (ends[key] - 1) // MAX_SHARD_BYTES)]
    weight_map = {}
    for i, keys in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        weights = {key: tensors[key].read().to(dtypes[key]) for key in keys}
        for key, weight in weights.items():
            require_finite(weight, tensors[key].name)
        save_file(weights, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def require_finite(weight: Tensor, name: str) -> None:
    """Check that a weight fits into its dtype, if that is float16. ValueError if it does not."""
    if weight.dtype == torch.float16 and not weight.isfinite().all():
        raise ValueError(f"{name} does not fit into float16; use --dtype bfloat16 or float32")


def _file_shapes(network: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a network's tensors in the files that `save_pretrained` writes."""
    for key, weight in network.state_dict().items():
        experts = _EXPERTS.match(key)
        if experts is None:
            yield key, tuple(weight.shape)
            continue
        count, rows, columns = weight.shape
        names = ("gate_proj", "up_proj") if experts[2] == "gate_up_proj" else ("down_proj",)
        for i in range(count):
            for name in names:
                yield f"{experts[1]}.{i}.{name}.weight", (rows // len(names), columns)
