"""Text to token ids and back. Only what was written as text becomes text: nobody can smuggle in a special token."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, digits, punctuation
from typing import Any

from transformers import PreTrainedTokenizerBase

# Stand before a text that goes on, and are cut off again. A colon rarely melts into what follows it.
_MARKERS = ":(" + punctuation + ascii_letters + digits


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back: a pretrained tokenizer that reads text as nothing but text.

    A text may spell a special token (`<|im_end|>`, the mask token); it stays those letters.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int

    @property
    def start_token_id(self) -> int:
        """What every document begins with: BOS, else CLS, else EOS. ValueError if there is none."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.tokenizer.eos_token_id)
        return _first(known, "start", "bos_token, cls_token or eos_token")

    @property
    def end_token_id(self) -> int:
        """What every document ends with: EOS, else SEP. ValueError if there is none."""
        return _first((self.tokenizer.eos_token_id, self.tokenizer.sep_token_id), "end", "eos_token or sep_token")

    @property
    def pad_token_id(self) -> int:
        """What fills a row behind its text: PAD, else the end token."""
        pad: int | None = self.tokenizer.pad_token_id  # pyright: ignore[reportAssignmentType]  (one token, one id)
        return self.end_token_id if pad is None else pad

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of a text, without special tokens; `continues`: of a piece that stands behind other text.

        The difference is the space that some tokenizers put before a text's first word.
        """
        if not continues or not self._leads_with_space:
            return self._encode([text])[0]
        for marker in _MARKERS:
            head = self._encode([marker])[0]
            ids = self._encode([marker + text])[0]
            if head and ids[: len(head)] == head and self.tokenizer.unk_token_id not in head:
                return ids[len(head) :]
        raise ValueError(f"the tokenizer melts {text[:40]!r} into any sign before it; it cannot encode text in pieces")

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of some ids, special tokens left out; `continues`: with the space it may have at its start."""
        plain = [int(i) for i in ids if int(i) not in self.special]
        if not continues:
            return str(self.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        head = self._encode([_MARKERS[0]])[0]
        return self.decode(head + plain).removeprefix(self.decode(head)) if plain else ""

    def document(self, text: str) -> list[int]:
        """A whole text between its start and end token."""
        return self.documents([text])[0]

    def documents(self, texts: list[str]) -> list[list[int]]:
        """`document` for many texts at once, much faster."""
        start, end = self.start_token_id, self.end_token_id
        return [[start, *ids, end] for ids in self._encode(texts)]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids of a text."""
        tokenizer: Any = self.tokenizer
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
        rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}  # of a call
        ends = (self.start_token_id, self.end_token_id, self.pad_token_id, sorted(self.special))
        told = json.dumps([type(tokenizer).__name__, rules, ends], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        # Unigram models have special tokens among their words, and find them in plain text all the same.
        clean = self._foreign.isdisjoint
        return [ids if clean(ids) else self._cut(text) for text, ids in zip(texts, rows, strict=True)]

    def _cut(self, text: str) -> list[int]:
        """The ids of a text that spells special tokens: cut inside each of them, then encoded in pieces."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False, return_offsets_mapping=True
        )
        spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        cuts = [(a + b) // 2 for i, (a, b) in spans if i in self._foreign and b - a > 1]
        if not cuts:
            return [i for i in encoding["input_ids"] if i not in self._foreign]
        edges = [0, *cuts, len(text)]
        pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        return [i for n, piece in enumerate(pieces) for i in self.encode(piece, continues=n > 0)]

    @cached_property
    def longest(self) -> int:
        """How many letters a token has at most."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids that are no text."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset({*self.tokenizer.all_special_ids, self.mask_token_id, *(i for i in added if added[i].special)})

    @cached_property
    def _foreign(self) -> frozenset[int]:
        """The ids that no text may have. An unknown word is text still."""
        return frozenset(i for i in self.special if i != self.tokenizer.unk_token_id)

    @cached_property
    def _leads_with_space(self) -> bool:
        """Whether a space is put before a text's first word."""
        signs = self.tokenizer.convert_ids_to_tokens(self._encode(["x"])[0])
        return "".join(signs).startswith(("\u2581", "\u0120"))


def _first(ids: tuple[object, ...], name: str, where: str) -> int:
    for i in ids:
        if isinstance(i, int):
            return i
    raise ValueError(f"the tokenizer has no {name} token; set its {where}")
