"""Adapters that come with the library, called by name."""

from pathlib import Path

from diffusify.config import DiffusionConfig

SHIPPED = Path(__file__).parents[1] / "adapters"


def bundled_models() -> dict[str, Path]:
    """Name and folder of every model that comes with the library."""
    return {card.parent.name: card.parent for card in sorted(SHIPPED.glob("*/diffusion_config.json"))}


def resolve_model(model: str | Path) -> Path:
    """A model's folder; where there is none of that name, that of the model that comes with the library, if any."""
    folder = Path(model).expanduser()
    return folder if folder.exists() else bundled_models().get(str(model), folder)


def config_of(model: str) -> DiffusionConfig | None:
    """A diffusion model's card; None for what is no diffusion model yet."""
    folder = resolve_model(model)
    return DiffusionConfig.load(folder) if (folder / "diffusion_config.json").is_file() else None
