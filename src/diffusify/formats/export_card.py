"""The README.md of an exported model: its metadata for the Hugging Face Hub, and how other programs run it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load, metadata_save

from diffusify.formats.saved_model import SavedModel
from diffusify.models.model_card import INHERITED, hub_metadata, write_model_card

_DIFFUSION_GGUF = """```sh
llama-diffusion-cli -m FOLDER/{name}.gguf -p "Once upon a time" -ub 512 --diffusion-steps 128 --diffusion-eps 0.001
```"""

_AR_GGUF = """This is the AR half of the model, for llama.cpp and Ollama. Decoding in blocks needs diffusify.

```sh
llama-cli -m FOLDER/{name}.gguf -p "Once upon a time"
cd FOLDER && ollama create {name} -f Modelfile && ollama run {name} "Once upon a time"
```"""

_REMOTE_CODE = """The class `{architecture}` is not part of transformers. `auto_map` in config.json names the repository
that has its code, which `trust_remote_code` downloads and runs.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
network = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
```"""

_OWN_CODE = "The class `{architecture}` is not part of transformers; programs for this format bring it."


def write_export_card(saved: SavedModel, folder: Path, target: Path, to: str, released: dict[str, Any]) -> None:
    """Write the README.md of a model exported to `to`, whose files are in `folder` and which will be at `target`.

    `released` is its config.json, or for `gguf` the keys of its file. The metadata are those of the model's own
    README.md, such as licence and base, else made anew.
    """
    config, readme = saved.diffusion_config, saved.folder / "README.md"
    own = (metadata_load(readme) if readme.is_file() else None) or {}
    inherited = {key: own[key] for key in (*INHERITED, "base_model", "datasets") if key in own}
    if to == "hf":
        write_model_card(folder, target)
        metadata_save(folder / "README.md", inherited)
        return
    metadata: ModelCardData = hub_metadata(config, "", is_adapter=False)
    fields = metadata.to_dict() | inherited
    fields |= {"library_name": "gguf" if to == "gguf" else "transformers", "tags": [*metadata.tags, to]}  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    name = target.absolute().name
    rows = {
        "format": to,
        "network": released["architectures"][0],
        "base": config.base_model,
        "mask token id": config.mask_token_id,
        "prediction at a position": "the token after it" if config.shift else "the token at its own position",
        "block size": config.block_size,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value not in (None, ""))
    text = _usage(to, config.block_size, released).format(name=name, architecture=released["architectures"][0])
    ModelCard(f"""---
{ModelCardData(**fields).to_yaml()}
---

# {name}

A diffusion language model, made by diffusify and exported with `diffusify export --to {to}`.

| | |
| :-- | :-- |
{table}

Below, FOLDER is the path of this folder.

{text}
""").save(folder / "README.md")


def _usage(to: str, block_size: int | None, released: dict[str, Any]) -> str:
    """How a program runs an exported model."""
    if to == "gguf":
        return _DIFFUSION_GGUF if released["diffusion"] else _AR_GGUF
    again = f"diffusify import FOLDER --layout {to} --out DIR"
    return (
        f"{_REMOTE_CODE if 'auto_map' in released else _OWN_CODE}\n\n`{again}` makes a model for diffusify of it again."
    )
