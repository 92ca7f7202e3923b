"""4-bit weights for training adapters (QLoRA): a frozen base in NF4, by bitsandbytes."""

import os
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from diffusify.models.accelerator import choose_device, choose_dtype
from diffusify.models.bundled import find_model
from diffusify.models.lora import Lora, adapter_base, default_lora
from diffusify.models.recipe import Recipe


def check_load_in_4bit(model: str, lora: Lora | None, recipe: Recipe) -> None:
    """Check that a model can be trained on a 4-bit base. ValueError without adapters, bitsandbytes, or when sharded."""
    folder = find_model(model)
    if default_lora(lora, recipe.adapters) is None and (folder is None or adapter_base(folder) is None):
        raise ValueError("load_in_4bit=True keeps the 4-bit weights frozen and trains adapters; add --lora 16")
    if not is_bitsandbytes_available():
        raise ValueError("load_in_4bit=True needs bitsandbytes; run: pip install 'diffusify[quant]'")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(f"load_in_4bit=True does not work with {name}; run several processes as DDP, by torchrun")


def load_in_4bit_arguments() -> dict[str, Any]:
    """The arguments of `load_base` for a 4-bit base, on the device that this process trains on.

    Linear layers are quantized; norms, embeddings and the LM head are not. Products are computed in the data type that
    models are opened with on this device.
    """
    device = choose_device()
    if device.type in ("cuda", "xpu"):
        device = choose_device(f"{device.type}:{os.environ.get('LOCAL_RANK', 0)}")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=choose_dtype("auto", device),
    )
    return {"device": device, "quantization": quantization}


def keep_gradients(network: PreTrainedModel) -> None:
    """Keep the 4-bit weights of a network on a CPU in their plain layout.

    bitsandbytes packs them in the first forward pass without gradients, and packed weights pass no gradients on.
    """
    modules: list[Any] = [each for each in network.modules() if hasattr(each, "support_avx512bf16_for_cpu")]
    for module in modules:
        module.support_avx512bf16_for_cpu = False


def is_quantized(network: PreTrainedModel) -> bool:
    """Whether linear layers of a network are quantized."""
    return getattr(network, "is_quantized", False)
