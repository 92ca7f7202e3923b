"""Models by name: those of a path, bundled ones in the library's own folder, and those on the Hugging Face Hub."""

import re
from pathlib import Path

from diffusify.config import DiffusionConfig
from diffusify.models.downloading import ModelNotFound, download_diffusion_model

BUNDLED_FOLDER = Path(__file__).parents[1] / "adapters"


def bundled_models() -> dict[str, Path]:
    """The name and folder of every bundled model."""
    return {path.parent.name: path.parent for path in sorted(BUNDLED_FOLDER.glob("*/diffusion_config.json"))}


def local_model(model: str | Path) -> Path:
    """The path itself if it exists, else the folder of the bundled model of that name, else the path."""
    folder = Path(model).expanduser()
    return folder if folder.exists() else bundled_models().get(str(model), folder)


def resolve_model(model: str | Path) -> Path:
    """A diffusion model's path: the given one, a bundled model's or, for OWNER/NAME, that of a download from the hub.

    Raises ModelNotFound (a ValueError) if there is none.
    """
    folder = local_model(model)
    if folder.exists():
        return folder
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        return download_diffusion_model(str(model))
    if str(model).startswith("pip:"):
        raise ModelNotFound(f"{model} is not a diffusion model; make one with `diffusify adapt {model} --out DIR`")
    raise ModelNotFound(
        f"{model} is not a folder; make a model with `diffusify adapt BASE --out {model}`, or use a model of the hub "
        f"(OWNER/NAME) or a bundled one: {', '.join(bundled_models()) or 'none'}"
    )


def find_model(model: str | Path) -> Path | None:
    """The path that `resolve_model` returns; None if there is none, as for a base on the hub."""
    try:
        return resolve_model(model)
    except ModelNotFound:
        return None


def find_diffusion_config(model: str) -> DiffusionConfig | None:
    """The diffusion config of a model; None if the model is not a diffusion model."""
    folder = find_model(model)
    if folder is None or not (folder / "diffusion_config.json").is_file():
        return None
    return DiffusionConfig.load(folder)
