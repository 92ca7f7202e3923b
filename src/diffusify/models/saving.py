"""A diffusion model on disk: a standard `transformers` folder (or a PEFT one that names its base) plus the card."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from diffusify.config import DiffusionConfig
from diffusify.models.bundled import resolve_model
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import Base, embedding_rows, ensure_mask_token, load_base, load_tokenizer
from diffusify.models.logging import quiet_transformers
from diffusify.models.lora import bake_lora, base_of, has_lora, load_lora, merge_lora, open_lora, save_lora

_LENGTH_HEAD = "length_head.safetensors"


def save_denoiser(
    folder: Path | str,
    denoiser: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write network (or only its adapters), tokenizer and card into a folder.

    Everything is written aside first and then moved, the card last: a folder with a card is a whole model. `weights`
    are the denoiser's own where it has but a share of them.
    """
    weights = denoiser.state_dict() if weights is None else weights
    network, head = (
        {name.removeprefix(part): w for name, w in weights.items() if name.startswith(part)}
        for part in ("network.", "length_head.")
    )
    with drafted(Path(folder)) as draft:
        with quiet_transformers():
            if has_lora(denoiser.network):
                save_lora(denoiser.network, draft, network)
            else:
                denoiser.network.save_pretrained(draft, state_dict=network)
            tokenizer.save_pretrained(draft)
        if denoiser.length_head is not None:
            save_file(head, draft / _LENGTH_HEAD)
        denoiser.diffusion_config.save(draft)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A place to write a model's files; they move into `folder` when all are there, the card last."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        yield Path(aside)
        sync(Path(aside))
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == "diffusion_config.json"):
            os.replace(path, folder / path.name)
        sync(folder, deep=False)


def sync(folder: Path, *, deep: bool = True) -> None:
    """Wait until a folder (or file), and all that is in it if `deep`, would outlast a power cut."""
    for path in (*(folder.rglob("*") if deep else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_occupied(out: Path) -> None:
    """ValueError unless `out` is an empty folder or nothing yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is a file or holds other files; give an empty or new folder")


def load_denoiser(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Denoiser, PreTrainedTokenizerBase]:
    """A denoiser and its tokenizer from a folder that `save_denoiser` wrote, weights loaded strictly.

    A folder of adapters opens on the base it names, with the adapters merged. ValueError when there is no card, the
    card tells of another architecture, or tensors are missing or left over.
    """
    folder = resolve_model(folder)
    card = DiffusionConfig.load(folder)
    base = open_adapted(folder, dtype=dtype) if base_of(folder) else _whole(folder, card, dtype)
    merge_lora(base.network)
    denoiser = Denoiser(base.network, card)
    _load_length_head(denoiser, folder)
    return denoiser.to(device).eval(), base.tokenizer


def open_base(model: str, *, dtype: torch.dtype = torch.float32) -> Base:
    """What training begins with: any base that `load_base` takes, or one with the adapters that a folder holds."""
    folder = resolve_model(model)
    return load_base(model, dtype=dtype) if base_of(folder) is None else open_adapted(folder, dtype=dtype)


def open_adapted(folder: Path, *, dtype: torch.dtype = torch.float32) -> Base:
    """The base that a folder of adapters stands on, with these in it; ValueError when the two do not fit."""
    card, source = DiffusionConfig.load(folder), base_of(folder)
    assert source is not None, "a folder of adapters"
    try:
        base = load_base(source, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{folder} holds adapters for the base {source}, which does not open: {error}") from error
    _check_architecture(folder, card, [type(base.network).__name__])
    if ensure_mask_token(base) != card.mask_token_id:
        raise ValueError(
            f"{folder} holds adapters for a base with mask_token_id={card.mask_token_id}; {source} differs"
        )
    open_lora(base.network, folder)
    has_own = (folder / "tokenizer_config.json").is_file()  # else the base's will do
    return replace(base, tokenizer=load_tokenizer(folder, str(folder))) if has_own else base


def load_weights(denoiser: Denoiser, folder: Path | str) -> None:
    """Set a denoiser's weights to those of a folder that `save_denoiser` wrote of it."""
    folder = Path(folder)
    if has_lora(denoiser.network):
        load_lora(denoiser.network, folder)
        _load_length_head(denoiser, folder)
    else:
        denoiser.load_state_dict(load_denoiser(folder)[0].state_dict())


def checksum(module: nn.Module) -> int:
    """A checksum of the first numbers of every weight: another training, other weights."""
    parts = (weight.detach().flatten()[:64].float().cpu().numpy().tobytes() for weight in module.parameters())
    return zlib.crc32(b"".join(parts))


def merge_adapters(adapters: Path | str, out: Path | str) -> Path:
    """Write base and adapters as one folder of whole weights. ValueError when `adapters` is no folder of adapters."""
    adapters, out = resolve_model(adapters), Path(out)
    if not base_of(adapters):
        raise ValueError(f"{adapters} holds no adapters; `diffusify tune --lora 16` makes them")
    refuse_occupied(out)
    denoiser, tokenizer = load_denoiser(adapters)
    bake_lora(denoiser.network)
    save_denoiser(out, denoiser, tokenizer)
    return out


def _whole(folder: Path, card: DiffusionConfig, dtype: torch.dtype) -> Base:
    _check_architecture(folder, card, AutoConfig.from_pretrained(folder).architectures or [])
    base = load_base(str(folder), dtype=dtype)
    rows = embedding_rows(base.network)
    if not 0 <= card.mask_token_id < rows:
        raise ValueError(f"the card in {folder} has mask_token_id={card.mask_token_id}, beyond the {rows} embeddings")
    return base


def _check_architecture(folder: Path, card: DiffusionConfig, found: list[str]) -> None:
    if card.architecture not in found:
        raise ValueError(
            f"the card in {folder} is for {card.architecture}, but config.json names {', '.join(found) or 'nothing'}; "
            "the two files do not belong together"
        )


def _load_length_head(denoiser: Denoiser, folder: Path) -> None:
    if denoiser.length_head is None:
        return
    if not (folder / _LENGTH_HEAD).is_file():
        raise ValueError(f"the card in {folder} speaks of a length head, but {_LENGTH_HEAD} is missing")
    denoiser.length_head.load_state_dict(load_file(folder / _LENGTH_HEAD))
