"""Bundled models: adapters in the library's own folder, opened by name."""

from pathlib import Path

from diffusify.config import DiffusionConfig

BUNDLED_FOLDER = Path(__file__).parents[1] / "adapters"


def bundled_models() -> dict[str, Path]:
    """The name and folder of every bundled model."""
    return {path.parent.name: path.parent for path in sorted(BUNDLED_FOLDER.glob("*/diffusion_config.json"))}


def resolve_model(model: str | Path) -> Path:
    """The model's folder: the path itself if it exists, else the bundled model of that name, else the path."""
    folder = Path(model).expanduser()
    return folder if folder.exists() else bundled_models().get(str(model), folder)


def find_diffusion_config(model: str) -> DiffusionConfig | None:
    """The diffusion config of a model; None if the model is not a diffusion model."""
    folder = resolve_model(model)
    return DiffusionConfig.load(folder) if (folder / "diffusion_config.json").is_file() else None
