"""The frame of documents: the tokens that stood around the documents that a base was pretrained on, by measurement.

A chat model's BOS and EOS are often marks of its chats, while another token parted its documents in pretraining.
"""

import re
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusify.config import DocumentFrame, nearest
from diffusify.diffusion.objectives import cross_entropy
from diffusify.models.loading import Base, num_embeddings
from diffusify.text.tokenizer import TextTokenizer

SENTENCES = (
    "The old harbour lay quiet in the early morning, and only the gulls were awake.",
    "Most plants take in water through their roots and lose it again through their leaves.",
    '"Has it stopped raining?" she asked, and looked up from the book on her knees.',
    "Mix the flour, the water and the salt, then let the dough rest for an hour.",
    "A list is an ordered collection of items, and each item has an index.",
    "The committee will meet again on Tuesday to discuss the budget for the coming year.",
    "Our team lost the first game of the season, but the players were not worried at all.",
    "In the summer of 1912 the family moved to a small town near the coast.",
    "We have found no sign of the error so far, although every test was run twice.",
    "Thank you for your letter, which reached me only yesterday because I was away.",
)
MAX_TOKENS = 8  # of each sentence: a start token matters most for the tokens right after it
# The tokenizer's own start token is replaced only if another one leads by more than this. A smaller lead may be due to
# the choice of the sentences.
STANDARD_ERRORS = 3.0
NO_START = "none"

_ENDS_TEXTS = re.compile(r"end.?of.?(text|document|sentence)", re.IGNORECASE)


def choose_frame(
    base: Base, known: DocumentFrame | None = None, *, start_token: str | None = None, end_token: str | None = None
) -> tuple[DocumentFrame, str]:
    """The frame of documents for a base, and a line that says what was measured or given, else an empty one.

    `start_token` and `end_token` are special tokens. With the start token "none", prompts have none, and documents
    start with their end token. What is not given is that of the `known` frame; without one, the start token is
    measured (see `measure_starts`). The tokenizer's own tokens are kept for a masked LM and without a chat template, as
    they are no marks of chats then. ValueError if a token is not special.
    """
    losses: dict[int | None, Tensor] = {}
    if known is None and (base.masked or not base.tokenizer.chat_template):
        known = DocumentFrame()
    if start_token is None and known is not None:
        frame = known
    else:
        if start_token is None:
            losses = measure_starts(base)
            start = best_start(losses)
        else:
            start = None if start_token == NO_START else _token_id(base, "start_token", start_token)
        frame = DocumentFrame(start, _end_of_documents(base, start), start_prompts=start is not None)
    if end_token is not None:
        frame = replace(frame, end_token_id=_token_id(base, "end_token", end_token))
    if not frame.start_prompts:
        frame = replace(frame, start_token_id=frame.end_token_id)
    is_new = any(map(len, losses.values())) or start_token is not None or end_token is not None
    return frame, _describe(base, frame, losses) if is_new else ""


@torch.inference_mode()
def measure_starts(base: Base) -> dict[int | None, Float[Tensor, " tokens"]]:
    """The losses (nats) of an AR base on the tokens of SENTENCES after each possible start token; None is no token.

    The tokenizer's own start token comes first. All sentences after all start tokens are one forward pass. A sentence's
    first token does not count, since nothing predicts it without a start token. There are no losses if the tokenizer
    lacks the sentences' words.
    """
    starts = _start_candidates(base)
    context = getattr(base.network.config.get_text_config(), "max_position_embeddings", None)
    length = MAX_TOKENS if context is None else min(MAX_TOKENS, context - 1)
    encoded: Any = base.tokenizer(list(SENTENCES), add_special_tokens=False)["input_ids"]
    texts = [ids[:length] for ids in encoded if len(ids) > 1 and base.tokenizer.unk_token_id not in ids]
    if not texts:
        return dict.fromkeys(starts, torch.empty(0))
    heads = [[] if start is None else [start] for start in starts]
    rows = [torch.tensor(head + ids, device=base.network.device) for head in heads for ids in texts]
    tokens = pad_sequence(rows, batch_first=True)
    is_text = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = base.network(input_ids=tokens, attention_mask=is_text).logits
    losses = []
    for n, row in enumerate(rows):
        size = len(texts[n % len(texts)]) - 1
        losses.append(cross_entropy(logits[n, len(row) - 1 - size : len(row) - 1], row[-size:]))
    return dict(zip(starts, torch.cat(losses).view(len(starts), -1), strict=True))


def best_start(losses: dict[int | None, Float[Tensor, " tokens"]]) -> int | None:
    """The start token with the lowest mean loss if its lead is significant, else the first one."""
    own, best = next(iter(losses)), min(losses, key=lambda start: float(losses[start].sum()))
    lead = losses[own] - losses[best]
    return best if len(lead) > 1 and lead.mean() > STANDARD_ERRORS * lead.std() / len(lead) ** 0.5 else own


def _start_candidates(base: Base) -> list[int | None]:
    """The tokenizer's own start token, its other BOS, CLS, EOS and SEP, the tokens that end texts, and no token."""
    tokenizer: Any = base.tokenizer
    own = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
    known = dict.fromkeys((*own, *_text_ends(base)))
    return [*(i for i in known if i is not None and i < num_embeddings(base.network)), None]


def _text_ends(base: Base) -> list[int]:
    """The special tokens that end a text by their name, such as `<|endoftext|>`, and have no role in chats."""
    template = str(base.tokenizer.chat_template)
    return [
        i
        for i, token in sorted(base.tokenizer.added_tokens_decoder.items())
        if token.special and _ENDS_TEXTS.search(token.content) and token.content not in template
    ]


def _end_of_documents(base: Base, start: int | None) -> int | None:
    """The start token if it ends texts; else the tokenizer's own end token, unless that is a mark of its chats."""
    tokenizer: Any = base.tokenizer
    own = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ends = _text_ends(base)
    if start in ends:
        return start
    is_chat_mark = own is None or tokenizer.convert_ids_to_tokens(own) in str(tokenizer.chat_template)
    return ends[0] if ends and is_chat_mark else own


def _token_id(base: Base, option: str, token: str) -> int:
    added = {entry.content: i for i, entry in base.tokenizer.added_tokens_decoder.items() if entry.special}
    special = added | dict(zip(base.tokenizer.all_special_tokens, base.tokenizer.all_special_ids, strict=True))
    if token not in special:
        raise ValueError(f'{option}="{token}" is no special token of {base.source}{nearest(token, special)}')
    return special[token]


def _name(base: Base, token_id: int | None) -> str:
    return NO_START if token_id is None else str(base.tokenizer.convert_ids_to_tokens(token_id))


def _describe(base: Base, frame: DocumentFrame, losses: dict[int | None, Tensor]) -> str:
    tokenizer = TextTokenizer(base.tokenizer, -1, frame)
    line = f"documents start with {_name(base, tokenizer.start_token_id)} and end with "
    line += _name(base, tokenizer.end_token_id) + ("" if frame.start_prompts else ", prompts have no start token")
    means = sorted((float(values.mean()), _name(base, start)) for start, values in losses.items() if len(values))
    return (
        line + ("; nats/token after each start token: " if means else "") + ", ".join(f"{n} {x:.2f}" for x, n in means)
    )
