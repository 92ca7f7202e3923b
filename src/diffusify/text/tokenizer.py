"""Text to token ids and back, so that no text is ever encoded as a special token."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, digits, punctuation
from typing import Any, TypeVar

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffusify.config import DocumentFrame
from diffusify.text.unicode import check_unicode

# Prefixes to encode a continuing text with, and to remove again. A colon rarely merges with the text after it.
_PREFIXES = ":(" + punctuation + ascii_letters + digits

TokenT = TypeVar("TokenT", int, int | None)


@dataclass(frozen=True)
class TextTokenizer:
    """A pretrained tokenizer that encodes text as plain text only.

    A text may contain the name of a special token (`<|im_end|>`, the mask token); it is encoded as those letters. The
    `frame` says which tokens start and end documents.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    frame: DocumentFrame = DocumentFrame()

    @property
    def start_token_id(self) -> int:
        """The first token of every document: the frame's, else BOS, else CLS, else EOS. ValueError if none."""
        own = (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.tokenizer.eos_token_id)
        return _first_id((self.frame.start_token_id, *own), "start", "bos_token, cls_token or eos_token")

    @property
    def end_token_id(self) -> int:
        """The last token of every document: the frame's, else EOS, else SEP. ValueError if there is none."""
        own = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        return _first_id((self.frame.end_token_id, *own), "end", "eos_token or sep_token")

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generated text: the end token, and EOS if the frame has another."""
        eos_token_id = self.tokenizer.eos_token_id
        return tuple(i for i in dict.fromkeys((self.end_token_id, eos_token_id)) if isinstance(i, int))

    @property
    def pad_token_id(self) -> int:
        """The token that fills a row after its text: PAD, else the end token."""
        pad: int | None = self.tokenizer.pad_token_id  # pyright: ignore[reportAssignmentType]  (one token, one id)
        return self.end_token_id if pad is None else pad

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of a text, without special tokens. Set `continues` if it follows other text.

        Then the space that some tokenizers add before a text's first word is left out. ValueError if the tokenizer
        cannot do that, and for a lone surrogate.
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
        head, head_text = self._decoding_prefix
        return self.decode(head + plain).removeprefix(head_text) if plain else ""

    @cached_property
    def _decoding_prefix(self) -> tuple[list[int], str]:
        """Tokens before which the space at a text's start is kept, and their text."""
        head = self._encode([_PREFIXES[0]])[0]
        return head, self.decode(head)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; many tokens are only a part of a character. Special tokens have none.

        ValueError if the tokenizer's tokens do not stand for plain bytes (see `has_plain_bytes`).
        """
        if token_id in self.special_ids:
            return b""
        if token_id in self.tokenizer.added_tokens_decoder:
            return self.tokenizer.added_tokens_decoder[token_id].content.encode()
        token = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if self._byte_of_char:
            return bytes(self._byte_of_char[char] for char in token)
        if not self.has_plain_bytes:
            raise ValueError("the tokenizer's tokens do not stand for plain bytes")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def has_plain_bytes(self) -> bool:
        """Whether tokens stand for bytes, so that texts are joined tokens: byte-level and SentencePiece tokenizers."""
        first_tokens = self.tokenizer.convert_ids_to_tokens(list(range(min(2000, len(self.tokenizer)))))
        return bool(self._byte_of_char) or any(token and "\u2581" in token for token in first_tokens)

    @cached_property
    def _byte_of_char(self) -> dict[str, int]:
        """The byte for which each character of a token stands; empty unless the tokenizer is a byte-level one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        is_byte_level = isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
        return {char: byte for byte, char in bytes_to_unicode().items()} if is_byte_level else {}

    def add_start(self, ids: list[TokenT]) -> list[TokenT]:
        """The ids of a prompt after the start token, if the frame gives prompts one or the prompt is empty."""
        return [self.start_token_id, *ids] if self.frame.start_prompts or not ids else ids  # pyright: ignore[reportReturnType]

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
        texts = [check_unicode(text) for text in texts]
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

    @property
    def token_ids(self) -> frozenset[int]:
        """The ids of all tokens, special ones included."""
        return frozenset(self.tokenizer.get_vocab().values())

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
