"""The README.md of an exported model: its metadata for the Hugging Face Hub, and how other programs run it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load, metadata_save

from diffusify.formats.saved_model import SavedModel
from diffusify.models.model_card import INHERITED, hub_metadata, write_model_card

# How programs run an exported model, for `write_export_card`.
DIFFUSION_GGUF = """```sh
llama-diffusion-cli -m FOLDER/{name}.gguf -p "Once upon a time" -ub 512 --diffusion-steps 128 --diffusion-eps 0.001
```"""
AR_GGUF = """This is the AR half of the model, for llama.cpp and Ollama. Decoding in blocks needs diffusify.

```sh
llama-cli -m FOLDER/{name}.gguf -p "Once upon a time"
cd FOLDER && ollama create {name} -f Modelfile && ollama run {name} "Once upon a time"
```"""
RELEASED = """Programs for this format open the folder. Where config.json has an `auto_map`, it names the repository
with the code of `{network}`, which `trust_remote_code=True` in transformers downloads and runs.

`diffusify import FOLDER --layout {to} --out DIR` makes a model for diffusify of it again."""


def write_export_card(saved: SavedModel, folder: Path, target: Path, to: str, network: str, usage: str) -> None:
    """Write the README.md of a model exported to `to`, whose files are in `folder` and which will be at `target`.

    The metadata are those of the model's own README.md, such as licence and base, else made anew. `network` is the name
    of the network in the exported files, and `usage` one of the texts of this file.
    """
    config = saved.diffusion_config
    metadata = hub_metadata(config, "", is_adapter=False).to_dict()
    metadata |= {"library_name": "gguf" if to == "gguf" else "transformers", "tags": [*metadata["tags"], to]}
    name = target.absolute().name
    rows = {
        "format": to,
        "network": network,
        "base": config.base_model,
        "mask token id": config.mask_token_id,
        "prediction at a position": "the token after it" if config.shift else "the token at its own position",
        "block size": config.block_size,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value not in (None, ""))
    ModelCard(f"""---
{ModelCardData(**(metadata | _inherited(saved))).to_yaml()}
---

# {name}

A diffusion language model, made by diffusify and exported with `diffusify export --to {to}`.

| | |
| :-- | :-- |
{table}

Below, FOLDER is the path of this folder.

{usage.format(name=name, network=network, to=to)}
""").save(folder / "README.md")


def write_merged_card(saved: SavedModel, folder: Path, target: Path) -> None:
    """Write the README.md of a model exported as a `transformers` folder, with the metadata of the model's own."""
    write_model_card(folder, target)
    card = folder / "README.md"
    metadata_save(card, (metadata_load(card) or {}) | _inherited(saved))


def _inherited(saved: SavedModel) -> dict[str, Any]:
    """The metadata that stay the same: licence, languages, base and data."""
    readme = saved.folder / "README.md"
    own = (metadata_load(readme) if readme.is_file() else None) or {}
    return {key: own[key] for key in (*INHERITED, "base_model", "datasets") if key in own}
