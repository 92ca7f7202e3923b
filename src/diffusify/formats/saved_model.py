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
from diffusify.models.loading import Base, fetch_base, load_tokenizer, network_class, num_embeddings
from diffusify.models.lora import adapter_base
from diffusify.models.mask_adapters import read_adapter_tensors
from diffusify.models.mask_token import ensure_length_tokens, ensure_mask_token


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
    """A tensor of a base with its adapters: a low-rank term, other rows, or more rows than the base has."""

    low_rank: tuple[Tensor, Tensor, float, bool] | None = None  # A, B, scale, and whether the weight is transposed
    rows: tuple[list[int], Tensor] | None = None
    mean_rows: tuple[int, ...] = ()  # the rows of new tokens, which begin as the mean of those before them

    def read(self) -> Tensor:
        weight = super().read().float()
        if self.mean_rows:
            weight = torch.cat([weight, weight.new_zeros(self.shape[0] - len(weight), *weight.shape[1:])])
        for row in self.mean_rows:
            weight[row] = weight[:row].mean(dim=0)
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
    length_tokens = saved.diffusion_config.length_tokens
    own = load_tokenizer(folder, str(folder)) if (folder / "tokenizer_config.json").is_file() else None
    chosen: Any = own.mask_token_id if own and saved.tokenizer.mask_token is None else None
    first_new = min(len(saved.tokenizer), num_embeddings(saved.network))
    opened = Base(saved.network, saved.tokenizer, base, masked=False)  # pyright: ignore[reportArgumentType]
    if ensure_mask_token(opened, chosen) != mask:
        raise ValueError(f"{folder} holds adapters for a base with mask_token_id={mask}; {base} differs")
    if length_tokens is not None and (found := ensure_length_tokens(opened)) != length_tokens:
        raise ValueError(f"{folder} holds adapters for a base with {length_tokens}; {base} has {found}")
    special = [mask, *(length_tokens.ids if length_tokens else ())]
    new = tuple(token for token in special if token >= first_new)
    parameters = dict(saved.network.named_parameters(remove_duplicate=False))
    of_tokens = {id(parameter) for module in _embeddings(saved.network) for parameter in module.parameters()}
    config: Any = PeftConfig.from_pretrained(str(folder))
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    adapters = read_adapter_tensors(folder)
    trained = config.trainable_token_indices
    tensors: dict[str, StoredTensor] = {}
    for name, stored in saved.tensors.items():
        module = name.removesuffix(".weight")
        low_rank = None
        if f"{module}.lora_A.weight" in adapters:
            transposed = isinstance(saved.network.get_submodule(module), Conv1D)
            a, b = (adapters.pop(f"{module}.lora_{half}.weight").float() for half in "AB")
            low_rank = a, b, scale, transposed
        rows = adapters.pop(f"{module}.token_adapter.trainable_tokens_delta", None)
        changed = None
        if rows is not None:
            changed = list(trained[module] if isinstance(trained, dict) else trained), rows.float()
        shape = tuple(parameters[name].shape) if name in parameters else stored.shape  # of one expert
        mean_rows = new if id(parameters.get(name)) in of_tokens else ()
        tensors[name] = MergedTensor(stored.file, stored.name, shape, "F32", low_rank, changed, mean_rows)
    if adapters:
        raise ValueError(
            f"{saved.source} holds adapters that cannot be merged while they are read, such as {next(iter(adapters))}; "
            f"merge them first: diffusify merge {saved.source} --out DIR"
        )
    return SavedModel(saved.source, folder, saved.network, own or saved.tokenizer, tensors, saved.diffusion_config)


def _embeddings(network: PreTrainedModel) -> list[Any]:
    return [module for module in (network.get_input_embeddings(), network.get_output_embeddings()) if module]
