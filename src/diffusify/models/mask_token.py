"""The special tokens of a diffusion model: its mask token, found in the vocabulary or added, and length tokens."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.models.loading import Base, num_embeddings

NEW_MASK_TOKEN = "<|mask|>"
EXPAND_TOKEN, DELETE_TOKEN = "<|expand|>", "<|delete|>"

# The texts of bracketed added tokens that are reserved or unused, and of special tokens that have a role.
_RESERVED = re.compile(r"[<\[].*(mask|reserved|unused|empty).*[>\]]", re.IGNORECASE)
_HAS_ROLE = re.compile(
    r"fim|tool|think|image|img|vision|audio|video|im_|start|end|eot|eom|turn|header|inst|user|assistant|system|"
    r"bos|eos|pad|unk|cls|^</?s>$",
    re.IGNORECASE,
)


def ensure_mask_token(base: Base, chosen: int | None = None) -> int:
    """The id of the mask token, which becomes the tokenizer's `mask_token`. Changes `base`.

    It is the mask token of an MLM, else the `chosen` one, else a reserved token of the vocabulary, else a special token
    without a role, else a new `<|mask|>`, whose embedding (a spare row, or one row more) becomes the mean of the
    others. ValueError if the base has another mask token than `chosen`, or cannot have that one.
    """
    tokenizer, is_new = base.tokenizer, False
    if chosen is not None and tokenizer.mask_token_id is None:
        is_new = assign_mask_token(tokenizer, chosen)
    elif chosen not in (None, tokenizer.mask_token_id):
        raise ValueError(
            f"mask_token_id={chosen}: {base.source} has the mask token {tokenizer.mask_token} "
            f"({tokenizer.mask_token_id}) already; leave mask_token_id out"
        )
    elif tokenizer.mask_token_id is None:
        unused = _unused_token(base.network, tokenizer)
        tokenizer.add_special_tokens({"mask_token": unused or NEW_MASK_TOKEN})
        is_new = unused is None
    mask_token_id: int = tokenizer.mask_token_id  # pyright: ignore[reportAssignmentType]  (one token, one id)
    _ensure_embedding(base.network, mask_token_id, is_new=is_new)
    return mask_token_id


def ensure_length_tokens(base: Base) -> LengthTokens:
    """The ids of `<|expand|>` and `<|delete|>`, which become special tokens of the tokenizer. Changes `base`.

    The embeddings of new ones become the mean of the others.
    """
    new = [name for name in (EXPAND_TOKEN, DELETE_TOKEN) if name not in base.tokenizer.get_vocab()]
    base.tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    found = find_length_tokens(base.tokenizer)
    assert found is not None, "both tokens were added"
    for name, token in zip((EXPAND_TOKEN, DELETE_TOKEN), found.ids, strict=True):
        _ensure_embedding(base.network, token, is_new=name in new)
    return found


def find_length_tokens(tokenizer: PreTrainedTokenizerBase) -> LengthTokens | None:
    """The ids of `<|expand|>` and `<|delete|>`; None unless the tokenizer has both."""
    ids = [tokenizer.get_vocab().get(name) for name in (EXPAND_TOKEN, DELETE_TOKEN)]
    return None if None in ids else LengthTokens(*ids)  # pyright: ignore[reportArgumentType]


def assign_mask_token(tokenizer: Any, mask_token_id: int) -> bool:
    """Make a token the tokenizer's mask token, and return whether it is new to the vocabulary.

    ValueError if the tokenizer has no such id and cannot get it by adding one token.
    """
    text = tokenizer.convert_ids_to_tokens(mask_token_id) if mask_token_id >= 0 else None
    is_new = text is None and mask_token_id == len(tokenizer)
    if text is not None or is_new:
        token = tokenizer.added_tokens_decoder.get(mask_token_id, text or NEW_MASK_TOKEN)
        tokenizer.add_special_tokens({"mask_token": token})
    if tokenizer.mask_token_id != mask_token_id:
        raise ValueError(
            f"mask_token_id={mask_token_id} is no token of a tokenizer of {len(tokenizer)} tokens; give one of these, "
            f"or {len(tokenizer)} for a new one"
        )
    return is_new


def _unused_token(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of an added token that has no role: a reserved one if there is one, best with "mask" in its name."""
    names = [f"{role}_token_id" for role in ("bos", "eos", "pad", "unk", "sep", "cls")]
    holders = [tokenizer, network.config, network.generation_config]
    roles = [getattr(holder, name, None) for holder in holders for name in names]
    used = {i for role in roles for i in (role if isinstance(role, list) else [role])}  # eos may be a list
    template = str(tokenizer.chat_template)
    unused = [
        token
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if i not in used and i < num_embeddings(network) and token.content not in template
    ]
    reserved = sorted(
        (t.content for t in unused if _RESERVED.fullmatch(t.content)), key=lambda t: "mask" not in t.lower()
    )
    special = [t.content for t in unused if t.special and not _HAS_ROLE.search(t.content)]
    return next(iter(reserved + special), None)


def _ensure_embedding(network: PreTrainedModel, token: int, *, is_new: bool) -> None:
    """Give a token an embedding if it has none; that of a new token becomes the mean of those before it."""
    if token >= num_embeddings(network):
        network.resize_token_embeddings(token + 1, mean_resizing=False)
        is_new = True
    if is_new:
        _set_to_mean(network, token)


@torch.no_grad()
def _set_to_mean(network: PreTrainedModel, row: int) -> None:
    """Set an embedding and its output weights to the mean of the rows before it; rows after it are unused."""
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        for parameter in module.parameters() if module else ():
            parameter[row] = parameter[:row].mean(dim=0)
