"""A saved diffusion model whose tensors are read one by one, with its adapters merged while they are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from diffusify.config import DiffusionConfig
from diffusify.formats.stored_tensors import StoredTensor, empty_network, match_tensors, stored_tensors
from diffusify.models.bundled import resolve_model
from diffusify.models.loading import Base, fetch_base, load_tokenizer, network_class
from diffusify.models.lora import adapter_base
from diffusify.models.mask_adapters import read_adapter_tensors
from diffusify.models.mask_token import ensure_mask_token


@dataclass(frozen=True)
class SavedModel:
    """A diffusion model in a folder: its network without weights, its tokenizer, and its tensors, not yet read.

    The `tensors` have stock names. `diffusion_config` is that of the folder, also where the network is only its base.
    """

    source: str
    folder: Path
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tensors: Mapping[str, StoredTensor]
    diffusion_config: DiffusionConfig

    @property
    def config(self) -> PreTrainedConfig:
        return self.network.config


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A tensor of a base with its adapters: a low-rank term, other rows, or a row more than the base has."""

    low_rank: tuple[Tensor, Tensor, float, bool] | None = None  # A, B, scale, and whether the weight is transposed
    rows: tuple[list[int], Tensor] | None = None
    mean_row: int | None = None  # a new token's row, which begins as the mean of those before it

    def read(self) -> Tensor:
        weight = super().read().float()
        if self.mean_row is not None:
            weight = torch.cat([weight, weight.new_zeros(self.shape[0] - len(weight), *weight.shape[1:])])
            weight[self.mean_row] = weight[: self.mean_row].mean(dim=0)
        if self.low_rank is not None:
            a, b, scale, transposed = self.low_rank
            term = b @ a
            weight += (term.T if transposed else term) * scale
        if self.rows is not None:
            weight[self.rows[0]] = self.rows[1]
        return weight


def open_saved_model(model: Path | str) -> SavedModel:
    """A saved model whose weights stay in their files. Adapters are merged, unless they act on masks only.

    Of a model with such adapters, the network is the base, which is its AR half. ValueError if files do not fit.
    """
    folder = resolve_model(model)
    diffusion_config, source = DiffusionConfig.load(folder), str(model)
    base = adapter_base(folder)
    if base is None:
        return _open_network(source, folder, folder, diffusion_config)
    fetched, _ = fetch_base(base)
    saved = _open_network(source, folder, fetched, diffusion_config)
    return saved if diffusion_config.adapters == "masks" else _with_adapters(saved, base)


def _open_network(source: str, folder: Path, weights: Path, diffusion_config: DiffusionConfig) -> SavedModel:
    """The network and the tokenizer of a folder of full `weights`."""
    _, config = fetch_base(str(weights))
    network_type, _ = network_class(config, source)
    if network_type.__name__ != diffusion_config.architecture:
        raise ValueError(
            f"the diffusion_config.json of {source} is for {diffusion_config.architecture}, but its weights are for "
            f"{network_type.__name__}"
        )
    network = empty_network(network_type, config)
    if (weights / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(weights, local_files_only=True)
    tensors = match_tensors(network, stored_tensors(weights, str(weights)), str(weights))
    return SavedModel(source, folder, network, load_tokenizer(weights, str(weights)), tensors, diffusion_config)


def _with_adapters(saved: SavedModel, base: str) -> SavedModel:
    """A base with the adapters of a folder. ValueError for adapters that cannot be merged tensor by tensor."""
    folder, mask = saved.folder, saved.diffusion_config.mask_token_id
    own = load_tokenizer(folder, str(folder)) if (folder / "tokenizer_config.json").is_file() else None
    chosen = own.mask_token_id if own and saved.tokenizer.mask_token is None else None
    before = len(saved.tokenizer)
    found = ensure_mask_token(Base(saved.network, saved.tokenizer, base, masked=False), chosen)  # pyright: ignore[reportArgumentType]
    if found != mask:
        raise ValueError(f"{folder} holds adapters for a base with mask_token_id={mask}; {base} differs")
    shapes = {name: tuple(weight.shape) for name, weight in saved.network.state_dict().items()}
    is_new = mask >= before or any(shapes[name] != saved.tensors[name].shape for name in saved.tensors)
    config: Any = PeftConfig.from_pretrained(str(folder))
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    adapters = read_adapter_tensors(folder)
    embeddings = [f"{_module_name(saved.network, module)}.weight" for module in _embeddings(saved.network)]
    tensors: dict[str, StoredTensor] = {}
    for name, stored in saved.tensors.items():
        module = name.removesuffix(".weight")
        low_rank = None
        if f"{module}.lora_A.weight" in adapters:
            transposed = isinstance(saved.network.get_submodule(module), Conv1D)
            a, b = (adapters.pop(f"{module}.lora_{half}.weight").float() for half in "AB")
            low_rank = a, b, scale, transposed
        rows = adapters.pop(f"{module}.token_adapter.trainable_tokens_delta", None)
        changed = None if rows is None else (list(config.trainable_token_indices), rows.float())
        mean_row = mask if is_new and name in embeddings else None
        tensors[name] = MergedTensor(stored.file, stored.name, shapes[name], "F32", low_rank, changed, mean_row)
    if adapters:
        raise ValueError(
            f"{saved.source} holds adapters that cannot be merged while they are read, such as {next(iter(adapters))}; "
            f"merge them first: diffusify merge {saved.source} --out DIR"
        )
    return SavedModel(saved.source, folder, saved.network, own or saved.tokenizer, tensors, saved.diffusion_config)


def _embeddings(network: PreTrainedModel) -> list[Any]:
    return [module for module in (network.get_input_embeddings(), network.get_output_embeddings()) if module]


def _module_name(network: PreTrainedModel, module: Any) -> str:
    return next(name for name, each in network.named_modules() if each is module)
