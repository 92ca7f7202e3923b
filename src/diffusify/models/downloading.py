"""Downloads from the Hugging Face Hub: base models, diffusion models and model cards, through its local cache."""

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

SOURCE_HINT = "give a hub name, a transformers folder, a .gguf file or pip:PACKAGE"

# The files to download: first those that show whether a network can be used, then all.
CONFIG_FILES = ["*.json"]
ALL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
IGNORED_FILES = ["*/*", "consolidated*"]  # the same weights in other formats


class ModelNotFound(ValueError):
    """There is no diffusion model of that name."""


def download_snapshot(name: str, patterns: list[str]) -> Path:
    """The folder of a hub repository's files, downloaded unless cached. ValueError if they cannot be downloaded."""
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=IGNORED_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"base {name} is no local file or folder and could not be downloaded from the hub ({reason}); {SOURCE_HINT}"
        ) from error


def download_diffusion_model(name: str) -> Path:
    """The folder of a diffusion model on the hub, downloaded unless cached.

    Raises ModelNotFound if the hub has no diffusion model of that name, or if it cannot be reached and the model is not
    cached. ValueError if the download fails.
    """
    try:
        with disable_progress_bars():
            folder = Path(snapshot_download(name, allow_patterns=CONFIG_FILES, ignore_patterns=IGNORED_FILES))
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{name} is neither a folder nor a repository of the hub that you can read; check the name, or log in with "
            "`hf auth login` if the repository is private or gated"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{name} is neither a folder nor in the cache of the hub, and the hub cannot be reached; check the "
            "network connection and that HF_HUB_OFFLINE is not set, or give the path of a folder"
        ) from error
    except OSError as error:
        raise ValueError(f"{name} could not be downloaded from the hub: {error}") from error
    if not (folder / "diffusion_config.json").is_file():
        raise ModelNotFound(
            f"{name} on the hub has no diffusion_config.json, so it is not a diffusion model; make one of it with "
            f"`diffusify adapt {name} --out DIR`, or if it is one of another library, with `diffusify import {name} "
            "--out DIR`"
        )
    download_card(name)
    return download_snapshot(name, ALL_FILES)


def download_card(name: str) -> None:
    """Download the README.md of a hub repository to the cache, if there is one and the hub can be reached."""
    try:
        with disable_progress_bars():
            snapshot_download(name, allow_patterns=[*CONFIG_FILES, "README.md"], ignore_patterns=IGNORED_FILES)
    except (OSError, ValueError):
        return


def cached_file(name: str, file: str) -> Path | None:
    """The cached copy of a file of a hub repository; None if it is not cached, or if there is no such repository."""
    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # no valid name
        return None
    return Path(found) if isinstance(found, str) else None
