"""Saved diffusion models: a `transformers` folder, or a PEFT folder that names its base, with a diffusion config."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from diffusify.config import DiffusionConfig
from diffusify.models.bundled import find_diffusion_config, find_model, resolve_model
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import Base, diffusion_folder, load_base, load_tokenizer, num_embeddings
from diffusify.models.logging import quiet_transformers
from diffusify.models.lora import (
    adapter_base,
    has_lora,
    load_lora,
    load_lora_weights,
    merge_lora,
    save_lora,
)
from diffusify.models.mask_token import ensure_length_tokens, ensure_mask_token
from diffusify.models.model_card import write_model_card
from diffusify.models.quantization import keep_gradients, load_in_4bit_arguments
from diffusify.models.stock_attention import write_is_causal

LENGTH_HEAD = "length_head.safetensors"
DRAFT_HEAD = "draft_head.safetensors"


def save_denoiser(
    folder: Path | str,
    denoiser: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the network (or only its adapters), the tokenizer, the diffusion config and a README.md into a folder.

    All files are written to a temporary folder and then moved, the diffusion config last, so a folder that has one is a
    complete model. `weights` replace the denoiser's own state dict, for a denoiser that holds only a shard of it.
    """
    weights = denoiser.state_dict() if weights is None else weights
    network, length_head, draft_head = (
        {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        for prefix in ("network.", "length_head.", "draft_head.")
    )
    with staging_folder(Path(folder)) as draft:
        with quiet_transformers():
            if has_lora(denoiser.network):
                save_lora(denoiser.network, draft, network)
            else:
                denoiser.network.save_pretrained(draft, state_dict=network)
                write_is_causal(draft, denoiser.diffusion_config)
            tokenizer.save_pretrained(draft)
        for name, head in ((LENGTH_HEAD, length_head), (DRAFT_HEAD, draft_head)):
            if head:
                save_file(head, draft / name)
        denoiser.diffusion_config.save(draft)
        write_model_card(draft, Path(folder))


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` on success, the diffusion config last."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        yield Path(staging)
        fsync_path(Path(staging))
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == "diffusion_config.json"):
            os.replace(path, folder / path.name)
        fsync_path(folder, recursive=False)


def fsync_path(path: Path, *, recursive: bool = True) -> None:
    """Flush a folder or file to disk, and all that a folder contains if `recursive`."""
    for each in (*(path.rglob("*") if recursive else ()), path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_empty_folder(out: Path) -> None:
    """Check that `out` is an empty folder or does not exist. ValueError if it is anything else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is a file or holds other files; give an empty or new folder")


def load_denoiser(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Denoiser, PreTrainedTokenizerBase]:
    """Load a denoiser and its tokenizer from a folder that `save_denoiser` wrote.

    An adapter folder is loaded on the base that it names, and its adapters are merged in memory, unless they act on
    masks only. ValueError if there is no diffusion config, if it names another architecture, or if tensors are missing
    or unexpected.
    """
    folder = resolve_model(folder)
    config = DiffusionConfig.load(folder)
    if adapter_base(folder):
        base = open_base_with_adapters(folder, dtype=dtype, device=device)
    else:
        base = _full_model(folder, config, dtype, device)
    merge_lora(base.network)
    denoiser = Denoiser(base.network, config)
    load_heads(denoiser, folder)
    return denoiser.eval(), base.tokenizer


def load_ar_half(
    model: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The AR half of a block model as `transformers` opens it: a base itself, also if adapters act on masks only."""
    folder = diffusion_folder(model)
    if folder and DiffusionConfig.load(folder).adapters == "all":
        return load_denoiser(folder, dtype=dtype, device=device)[0].network
    base = adapter_base(folder) if folder else model
    return load_base(str(base), dtype=dtype, device=device).network.eval()


def open_base(model: str, *, load_in_4bit: bool = False) -> Base:
    """The model that training starts from: a base that `load_base` takes, or an adapter folder's base and adapters.

    It is on the CPU in float32. With `load_in_4bit`, linear layers have 4 bits, on the device that it is trained on.
    """
    arguments = load_in_4bit_arguments() if load_in_4bit else {}
    folder = find_model(model)
    if folder is not None and adapter_base(folder) is not None:
        base = open_base_with_adapters(folder, **arguments)
    else:
        base = load_base(model, **arguments)
    keep_gradients(base.network)
    return base if find_diffusion_config(model) is None else replace(base, folder=folder)


def open_base_with_adapters(folder: Path, **arguments: Any) -> Base:
    """The base that an adapter folder names, with the adapters attached; `arguments` are those of `load_base`.

    ValueError if the two do not fit.
    """
    config, source = DiffusionConfig.load(folder), adapter_base(folder)
    assert source is not None, "not an adapter folder"
    try:
        base = load_base(source, **arguments)
    except ValueError as error:
        raise ValueError(f"{folder} holds adapters for the base {source}, which cannot be loaded: {error}") from error
    _check_architecture(folder, config, [type(base.network).__name__])
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder, str(folder)) if has_tokenizer else base.tokenizer
    text = base.tokenizer.convert_ids_to_tokens(config.mask_token_id)
    is_chosen = base.tokenizer.mask_token is None and has_tokenizer and text in (None, tokenizer.mask_token)
    if ensure_mask_token(base, config.mask_token_id if is_chosen else None) != config.mask_token_id:
        raise ValueError(
            f"{folder} holds adapters for a base with mask_token_id={config.mask_token_id}; {source} differs"
        )
    if config.length_tokens is not None and (found := ensure_length_tokens(base)) != config.length_tokens:
        raise ValueError(f"{folder} holds adapters for a base with {config.length_tokens}; {source} has {found}")
    load_lora(base.network, folder, config.mask_token_id, config.adapters)
    return replace(base, tokenizer=tokenizer)


def load_weights(denoiser: Denoiser, folder: Path | str) -> None:
    """Set a denoiser's weights to those that `save_denoiser` wrote of the same model into a folder."""
    folder = Path(folder)
    if has_lora(denoiser.network):
        load_lora_weights(denoiser.network, folder)
        load_heads(denoiser, folder)
    else:
        denoiser.load_state_dict(load_denoiser(folder)[0].state_dict())


def checksum(module: nn.Module) -> int:
    """A checksum of the first 64 numbers of every weight, which differs after any training."""
    chunks = (weight.detach().flatten()[:64].float().cpu().numpy().tobytes() for weight in module.parameters())
    return zlib.crc32(b"".join(chunks))


def merge_adapters(adapters: Path | str, out: Path | str) -> Path:
    """Merge a folder of adapters into its base and save the full weights.

    ValueError if it holds no adapters, or adapters that act on masks only.
    """
    adapters, out = resolve_model(adapters), Path(out)
    if not adapter_base(adapters):
        raise ValueError(f"{adapters} holds no adapters; `diffusify tune --lora 16` trains some")
    if DiffusionConfig.load(adapters).adapters == "masks":
        raise ValueError(
            f"the adapters in {adapters} act on masks only, so they cannot become part of weights that run all tokens; "
            f"use the folder as it is, with its base {adapter_base(adapters)}"
        )
    require_empty_folder(out)
    denoiser, tokenizer = load_denoiser(adapters)
    save_denoiser(out, denoiser, tokenizer)
    return out


def _full_model(folder: Path, config: DiffusionConfig, dtype: torch.dtype, device: torch.device | str) -> Base:
    _check_architecture(folder, config, AutoConfig.from_pretrained(folder).architectures or [])
    base = load_base(str(folder), dtype=dtype, device=device)
    rows = num_embeddings(base.network)
    for token in config.added_token_ids:
        if not 0 <= token < rows:
            raise ValueError(
                f"the diffusion_config.json in {folder} has mask_token_id={config.mask_token_id} and "
                f"length_tokens={config.length_tokens}, of which {token} is beyond the {rows} embeddings"
            )
    return base


def _check_architecture(folder: Path, config: DiffusionConfig, architectures: list[str]) -> None:
    if config.architecture not in architectures:
        raise ValueError(
            f"the diffusion_config.json in {folder} is for {config.architecture}, but config.json names "
            f"{', '.join(architectures) or 'nothing'}; the two files do not belong together"
        )


def load_heads(denoiser: Denoiser, folder: Path) -> None:
    """Set the weights of a denoiser's length head and draft head, if it has them, to those of a folder."""
    for name, head in ((LENGTH_HEAD, denoiser.length_head), (DRAFT_HEAD, denoiser.draft_head)):
        if head is None:
            continue
        if not (folder / name).is_file():
            raise ValueError(f"the diffusion_config.json in {folder} names a head whose file {name} is missing")
        head.load_state_dict(load_file(folder / name))
