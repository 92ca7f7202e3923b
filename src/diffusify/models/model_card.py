"""The README.md of a saved model: what it is and how to use it, with the metadata that the Hugging Face Hub reads."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, Prefix
from diffusify.models.bundled import local_model
from diffusify.models.downloading import cached_file
from diffusify.models.lora import adapter_base
from diffusify.models.stock_attention import is_causal_class, stock_arguments

_HUB_DATASET = re.compile(r"\bhub:([\w.-]+(?:/[\w.-]+)?)")
INHERITED = ("license", "license_name", "license_link", "language")


def write_model_card(folder: Path, target: Path) -> None:
    """Write the README.md of a saved model whose files are in `folder`, and which will be at `target`.

    Nothing is written if `target` has a README.md, which its owner may have edited. The data that the model was trained
    on are read from the run.json in `target`.
    """
    if (target / "README.md").exists():
        return
    config, is_adapter = DiffusionConfig.load(folder), adapter_base(folder) is not None
    run = target / "run.json"
    data = str(json.loads(run.read_text(encoding="utf-8")).get("data", "")) if run.is_file() else ""
    metadata = hub_metadata(config, data, is_adapter=is_adapter).to_yaml()
    arguments = {} if is_adapter else stock_arguments(folder, config)
    text = _text(target.absolute().name, config, data, arguments, is_adapter=is_adapter)
    ModelCard(f"---\n{metadata}\n---\n\n{text}").save(folder / "README.md")


def hub_metadata(config: DiffusionConfig, data: str, *, is_adapter: bool) -> ModelCardData:
    """The metadata of a model. Its licence and languages are its base's, and so is the name of the base on the hub."""
    base = _base_metadata(config.base_model)
    datasets = dict.fromkeys([*_as_list(base.get("datasets")), *_HUB_DATASET.findall(data)])
    kind = "masked-diffusion" if config.block_size is None else "block-diffusion"
    return ModelCardData(
        base_model=base.get("base_model"),
        datasets=list(datasets) or None,
        library_name="diffusify",
        pipeline_tag="text-generation",
        tags=["diffusify", "diffusion-language-model", kind, *(["lora"] if is_adapter else [])],
        **{name: base[name] for name in INHERITED if name in base},
    )


def _base_metadata(base: str) -> dict[str, Any]:
    """The metadata in the README.md of a base; `base_model` is the base itself if it is on the hub."""
    folder = local_model(base)
    readme = folder / "README.md" if folder.is_dir() else cached_file(base, "README.md")
    metadata: dict[str, Any] = {}
    if readme is not None and readme.is_file():
        try:
            metadata = metadata_load(readme) or {}
        except (ValueError, yaml.YAMLError):  # someone else's file
            metadata = {}
    if not folder.is_dir() and cached_file(base, "config.json") is not None:
        metadata["base_model"] = base
    return metadata


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _text(name: str, config: DiffusionConfig, data: str, arguments: dict[str, Any], *, is_adapter: bool) -> str:
    """What a model is and how to use it."""
    made_from = f" from `{config.base_model}`" if config.base_model else ""
    rows = ", act on masks only and leave its own text as it is" if config.adapters == "masks" else ""
    adapters = f" This folder holds LoRA adapters, which open on that base{rows}." if is_adapter else ""
    shift = "the token after it" if config.shift else "the token at its own position"
    rows = {
        "recipe": config.recipe,
        "network": config.architecture,
        "attention": config.attention,
        "attention for infilling": config.infilling,
        "prediction at a position": f"{shift} (`shift` {config.shift})",
        "mask token id": config.mask_token_id,
        "start token id of a document": config.frame.start_token_id,
        "end token id of a document": config.frame.end_token_id,
        "default policy": config.policy,
        "training data": data,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value not in (None, ""))
    infill = '\nprint(model.infill("The cat[[3]] on the mat.").text)' if config.sees_right_context else ""
    return f"""# {name}

A diffusion language model, made by diffusify{made_from} with the recipe `{config.recipe}`.{adapters}

| | |
| :-- | :-- |
{table}

`diffusion_config.json` holds these settings. Below, FOLDER is the path of this folder, or its name on the hub.

## In diffusify

```sh
diffusify generate FOLDER "Once upon a time" --watch
```

```python
import diffusify

model = diffusify.load("FOLDER")
print(model.generate("Once upon a time", max_new_tokens=16).text){infill}
```

## In transformers alone

{_transformers_text(config, arguments, is_adapter=is_adapter)}
"""


def _transformers_text(config: DiffusionConfig, arguments: dict[str, Any], *, is_adapter: bool) -> str:
    """How a model is used in transformers without diffusify; `arguments` are those of `from_pretrained`."""
    if config.adapters == "masks":
        return f"The adapters act on masks only: without diffusify, the model is its base, `{config.base_model}`."
    if is_adapter:
        return "`diffusify merge FOLDER --out DIR` writes a folder of full weights that transformers opens."
    if config.keeps_ar_model:
        return f"""The class `{config.architecture}` opens the AR half of the model. Decoding in blocks needs diffusify.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
network = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(network.generate(**inputs, max_new_tokens=16)[0]))
```"""
    if not isinstance(config.attention, Bidirectional | Prefix):
        return (
            f"The class `{config.architecture}` opens the network, but its predictions are those of the model only "
            f"under the attention mask {config.attention}, which diffusify makes."
        )
    causal = is_causal_class(config.architecture)
    auto = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    notes = []
    if causal:
        notes.append(
            "`is_causal` is false in config.json, so the network attends in both directions. The method `generate` of "
            "transformers decodes causally and does not fit this model."
        )
    if "attn_implementation" in arguments:
        notes.append(
            f"The class `{config.architecture}` ignores `is_causal` under its default attention kernel and would be "
            "causal, so the kernel has to be `eager`."
        )
    if "sliding_window" in arguments:
        notes.append(
            "A bidirectional sliding window of transformers does not count the token itself, so `sliding_window` is "
            "one less than in config.json."
        )
    if isinstance(config.attention, Prefix):
        notes.append("In diffusify, prompts do not attend to the text after them; without its mask they do.")
    index = "mask - 1" if config.shift else "mask"
    given = "".join(f", {name}={json.dumps(value)}" for name, value in arguments.items())
    notes.append(
        f"The prediction for a masked position is read {'one position before it' if config.shift else 'there'}."
    )
    return (
        "\n".join(notes)
        + f"""

```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
network = {auto}.from_pretrained("FOLDER"{given})
inputs = tokenizer(f"The cat sat on{{tokenizer.mask_token}} mat.", return_tensors="pt")
mask = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)
logits = network(**inputs).logits[0, {index}]
logits[tokenizer.mask_token_id] = float("-inf")  # never predicted
print(tokenizer.decode(logits.argmax()))
```"""
    )
