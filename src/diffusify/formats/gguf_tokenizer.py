"""The vocabulary of a GGUF file: tokens, merges and the name of the pre-tokenizer, which llama.cpp has itself."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

# Regular expressions of byte-level tokenizers, with their names in llama.cpp (llama-vocab.cpp) and whether a whole word
# of the vocabulary is taken before any merge.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}": ("qwen2", False),
}


def write_tokenizer(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    source: str,
    *,
    start_token_id: int,
    start_prompts: bool,
    mask_token_id: int | None,
) -> None:
    """Write a tokenizer for a network of `rows` embeddings. Prompts begin with the start token if `start_prompts`.

    ValueError for a tokenizer that llama.cpp would not run in the same way.
    """
    model = _tokenizer_json(tokenizer, source)
    is_sentencepiece = bool(model["model"].get("byte_fallback"))
    if is_sentencepiece:
        _write_sentencepiece(writer, model, tokenizer, rows, source)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(model, source))
        writer.add_token_list(_tokens(tokenizer, rows))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    writer.add_token_types(_token_types(tokenizer, rows, is_sentencepiece))
    own: Any = tokenizer
    ids = {
        writer.add_bos_token_id: start_token_id,
        writer.add_eos_token_id: own.eos_token_id,
        writer.add_unk_token_id: own.unk_token_id,
        writer.add_pad_token_id: own.pad_token_id,
        writer.add_mask_token_id: mask_token_id,
    }
    for add, token_id in ids.items():
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(start_prompts)
    if isinstance(own.chat_template, str):
        writer.add_chat_template(own.chat_template)


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase, source: str) -> dict[str, Any]:
    """The contents of a fast tokenizer's tokenizer.json. ValueError unless it is BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    if model["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer of {source} is {model['model']['type']}, and --to gguf writes BPE only")
    return model


def _pre_tokenizer(model: dict[str, Any], source: str) -> str:
    """The name in llama.cpp of a byte-level tokenizer's rule for words. ValueError if it has none."""
    steps = model["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    normalizer = (model["normalizer"] or {}).get("type")
    *before, last = steps
    is_byte_level = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    found: tuple[str, bool] | None = None
    if is_byte_level and not before and last["use_regex"]:
        found = "gpt-2", False
    elif is_byte_level and last["use_regex"] and [step["type"] for step in before] == ["Digits"]:
        found = ("smollm", False) if before[0]["individual_digits"] else None
    elif is_byte_level and not last["use_regex"] and [step["type"] for step in before] == ["Split"]:
        found = _SPLITS.get(before[0]["pattern"].get("Regex"))
    if found is None or found[1] != bool(model["model"].get("ignore_merges")) or normalizer not in (None, "NFC"):
        raise ValueError(
            f"the tokenizer of {source} splits words by a rule that --to gguf has no name for; it "
            f"knows those of gpt-2, smollm and {', '.join(name for name, _ in _SPLITS.values())}"
        )
    return found[0]


def _write_sentencepiece(
    writer: GGUFWriter, model: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int, source: str
) -> None:
    """Write a tokenizer as of Llama 2. llama.cpp merges the pair with the best score first, where Hugging Face's merges
    are in order. ValueError if no scores give that order."""
    merges, vocabulary = _merges(model), model["model"]["vocab"]
    ids = [vocabulary["".join(pair)] for pair in merges]
    first = list(dict.fromkeys(ids))
    if first != sorted(first):
        raise ValueError(
            f"the merges of the tokenizer of {source} are not in the order of its tokens, as llama.cpp needs"
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_tokens(tokenizer, rows))
    writer.add_token_scores([float(-i) for i in range(rows)])
    writer.add_add_space_prefix(_adds_space(model))


def _adds_space(model: dict[str, Any]) -> bool:
    """Whether a tokenizer puts a space before the first word of a text."""
    normalizer = model["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre = model["pre_tokenizer"] or {}
    return any(step.get("type") == "Prepend" for step in steps) or pre.get("prepend_scheme") in ("always", "first")


def _merges(model: dict[str, Any]) -> list[list[str]]:
    """The merges as pairs; earlier versions of the format have them in one string."""
    return [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["model"]["merges"]]


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """The text of every id; embeddings without a token get one of their own."""
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    return [texts.get(i, f"[PAD{i}]") for i in range(rows)]


def _token_types(tokenizer: PreTrainedTokenizerBase, rows: int, is_sentencepiece: bool) -> list[TokenType]:
    """What every id is: text, a byte, a special token, or an embedding without a token."""
    known, added = set(tokenizer.get_vocab().values()), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    types = []
    for i in range(rows):
        text = str(tokenizer.convert_ids_to_tokens(i)) if i in known else ""
        if i not in known:
            types.append(TokenType.UNUSED)
        elif is_sentencepiece and i == tokenizer.unk_token_id:
            types.append(TokenType.UNKNOWN)
        elif i in special or (i in added and added[i].special):
            types.append(TokenType.CONTROL)
        elif i in added:
            types.append(TokenType.USER_DEFINED)
        elif is_sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return types
