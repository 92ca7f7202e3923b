"""Text to token ids and back, so that no text is ever encoded as a special token."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, digits, punctuation
from typing import Any

from transformers import PreTrainedTokenizerBase

# Prefixes to encode a continuing text with, and to remove again. A colon rarely merges with the text after it.
_PREFIXES = ":(" + punctuation + ascii_letters + digits


@dataclass(frozen=True)
class TextTokenizer:
    """A pretrained tokenizer that encodes text as plain text only.

    A text may contain the name of a special token (`<|im_end|>`, the mask token); it is encoded as those letters.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int

    @property
    def start_token_id(self) -> int:
        """The first token of every document: BOS, else CLS, else EOS. ValueError if there is none."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.tokenizer.eos_token_id)
        return _first_id(known, "start", "bos_token, cls_token or eos_token")

    @property
    def end_token_id(self) -> int:
        """The last token of every document: EOS, else SEP. ValueError if there is none."""
        return _first_id((self.tokenizer.eos_token_id, self.tokenizer.sep_token_id), "end", "eos_token or sep_token")

    @property
    def pad_token_id(self) -> int:
        """The token that fills a row after its text: PAD, else the end token."""
        pad: int | None = self.tokenizer.pad_token_id  # pyright: ignore[reportAssignmentType]  (one token, one id)
        return self.end_token_id if pad is None else pad

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of a text, without special tokens. Set `continues` if it follows other text.

        Then the space that some tokenizers add before a text's first word is left out. ValueError if the tokenizer
        cannot do that.
        """
        if not continues or not self._adds_prefix_space:
            return self._encode([text])[0]
        for prefix in _PREFIXES:
            head = self._encode([prefix])[0]
            ids = self._encode([prefix + text])[0]
            if head and ids[: len(head)] == head and self.tokenizer.unk_token_id not in head:
                return ids[len(head) :]
        raise ValueError(f"the tokenizer merges {text[:40]!r} with any prefix, so it cannot encode text in parts")

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of ids, without special tokens. With `continues` a space at its start is kept."""
        plain = [int(i) for i in ids if int(i) not in self.special_ids]
        if not continues:
            return str(self.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        head = self._encode([_PREFIXES[0]])[0]
        return self.decode(head + plain).removeprefix(self.decode(head)) if plain else ""

    def document(self, text: str) -> list[int]:
        """The ids of a whole text between the start and end token."""
        return self.documents([text])[0]

    def documents(self, texts: list[str]) -> list[list[int]]:
        """The ids of many documents (see `document`) in one call, which is much faster."""
        start, end = self.start_token_id, self.end_token_id
        return [[start, *ids, end] for ids in self._encode(texts)]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the ids of a text."""
        tokenizer: Any = self.tokenizer
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
        rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}  # set by calls
        ends = (self.start_token_id, self.end_token_id, self.pad_token_id, sorted(self.special_ids))
        state = json.dumps([type(tokenizer).__name__, rules, ends], sort_keys=True)
        return hashlib.sha256(state.encode()).hexdigest()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        # Unigram models have special tokens in their vocabulary and find them in plain text despite the option.
        is_plain = self._non_text_ids.isdisjoint
        return [ids if is_plain(ids) else self._encode_split(text) for text, ids in zip(texts, rows, strict=True)]

    def _encode_split(self, text: str) -> list[int]:
        """The ids of a text that contains special tokens: it is cut inside each of them and encoded in parts."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False, return_offsets_mapping=True
        )
        spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        cuts = [(a + b) // 2 for i, (a, b) in spans if i in self._non_text_ids and b - a > 1]
        if not cuts:
            return [i for i in encoding["input_ids"] if i not in self._non_text_ids]
        edges = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        return [i for n, part in enumerate(parts) for i in self.encode(part, continues=n > 0)]

    @cached_property
    def max_token_length(self) -> int:
        """The length of the longest token in characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that are not text."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset({*self.tokenizer.all_special_ids, self.mask_token_id, *(i for i in added if added[i].special)})

    @cached_property
    def _non_text_ids(self) -> frozenset[int]:
        """The ids that no text may be encoded to: all special ids but the unknown token's."""
        return frozenset(i for i in self.special_ids if i != self.tokenizer.unk_token_id)

    @cached_property
    def _adds_prefix_space(self) -> bool:
        """Whether the tokenizer adds a space before a text's first word."""
        tokens = self.tokenizer.convert_ids_to_tokens(self._encode(["x"])[0])
        return "".join(tokens).startswith(("\u2581", "\u0120"))


def _first_id(ids: tuple[object, ...], name: str, attributes: str) -> int:
    for i in ids:
        if isinstance(i, int):
            return i
    raise ValueError(f"the tokenizer has no {name} token; set its {attributes}")
