"""The devices and the data type that a model is opened with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from transformers import PreTrainedConfig, PreTrainedModel

from diffusify.models.weight_files import count_numbers

_WEIGHTS_SHARE = 0.9  # of an accelerator's free memory; the rest is for activations and keys and values

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_device(device: torch.device | str = "auto") -> torch.device:
    """The device of that name; `auto` is the accelerator (CUDA, XPU or MPS) if there is one, else the CPU.

    A name without a number, and `auto`, stand for all accelerators of the kind (see `device_map`). ValueError if this
    machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return accelerator or torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator else 0
    available = ["cpu", *([f"{accelerator}:{index}" for index in range(count)])]
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    is_cpu = chosen is not None and chosen.type == "cpu"
    is_accelerator = chosen is not None and accelerator is not None and chosen.type == accelerator.type
    if chosen is None or not (is_cpu or (is_accelerator and (chosen.index or 0) < count)):
        raise ValueError(f'device "{device}" is not on this machine, which has {", ".join(available)}; or give auto')
    return chosen


def choose_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The data type of that name; `auto` is float32 on a CPU, where lossless decoding is then exact.

    On an accelerator `auto` is bfloat16, or float16 for a GPU that computes bfloat16 only by emulation. ValueError for
    another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    names = get_args(DtypeName)
    if dtype not in names:
        raise ValueError(f'dtype "{dtype}" is not known; give {", ".join(names[:-1])} or {names[-1]}')
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    if device.type == "cpu":
        return torch.float32
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulated else torch.bfloat16


def device_map(
    files: Sequence[Path],
    network_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.device] | None:
    """The device of each part of a network whose weights are in safetensors files; None for the CPU.

    A device without a number is the first of its kind, or all of them if the weights do not fit into its free memory.
    ValueError if they do not fit into all.
    """
    if device.type == "cpu":
        return None
    if device.index is not None or torch.accelerator.device_count() == 1:
        return {"": device}
    free = {i: int(_WEIGHTS_SHARE * free) for i, free in get_max_memory().items() if isinstance(i, int)}
    size = dtype.itemsize * count_numbers(files)
    if size <= free[0]:
        return {"": torch.device(device.type, 0)}
    with torch.device("meta"):
        network = network_class(config)
    network.tie_weights()
    whole = list(network._no_split_modules or ())
    limits = get_balanced_memory(network, free, no_split_module_classes=whole, dtype=dtype)
    parts = infer_auto_device_map(network, limits, no_split_module_classes=whole, dtype=dtype)
    if not free.keys() >= set(parts.values()):
        raise ValueError(
            f"the weights take {size / 2**30:.1f} GiB in {dtype}, and the {len(free)} accelerators have "
            f"{sum(free.values()) / 2**30:.1f} GiB for them; free some memory, or give device=cpu or a smaller dtype"
        )
    return {name: torch.device(device.type, i) for name, i in parts.items()}
