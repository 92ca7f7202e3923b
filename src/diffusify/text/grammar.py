"""Regular expressions and JSON schemas, as automata over a tokenizer's tokens."""

import json
import subprocess
import sys
from array import array
from importlib.util import find_spec
from typing import Any

from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffusify.diffusion.constraints import Automaton
from diffusify.text import regex_worker
from diffusify.text.tokenizer import TextTokenizer


def automaton(tokenizer: TextTokenizer, regex: str) -> Automaton:
    """The automaton that allows the texts which match `regex` whole.

    ValueError for an expression that does not read or is too much, or a tokenizer whose tokens are no plain bytes.
    """
    if find_spec("outlines_core") is None:
        raise ValueError("texts of a given form need `pip install 'diffusify[serve]'`")
    words = [[word.hex(), ids] for word, ids in _spellings(tokenizer).items()]
    asked = json.dumps({"regex": regex, "end": tokenizer.end_token_id, "words": words})
    command = [sys.executable, "-m", regex_worker.__name__]
    try:
        made = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=3 * regex_worker.SECONDS)
    except subprocess.TimeoutExpired:
        made = None
    if made is None or made.returncode != 0:
        told = made.stderr.decode(errors="replace").strip() if made is not None and made.returncode == 1 else ""
        plain = told if told and "Traceback" not in told else "it takes too much time or memory"
        raise ValueError(f"regex={regex[:80]!r} cannot be followed: {plain}")
    head, _, numbers = made.stdout.partition(b"\n")
    told = json.loads(head)
    count = sum(edges for _, edges in told["states"])
    tokens, targets = array("i", numbers[: 4 * count]), array("q", numbers[4 * count :])
    edges, done = {}, 0
    for state, size in told["states"]:
        edges[state] = (tokens[done : done + size], targets[done : done + size])
        done += size
    return Automaton(edges, told["start"], set(told["final"]))


def schema_regex(schema: dict[str, Any]) -> str:
    """A regular expression for JSON that a schema allows. ValueError for a schema that none can express."""
    try:
        from outlines_core.json_schema import build_regex_from_schema  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("JSON of a given schema needs `pip install 'diffusify[serve]'`") from error
    try:
        return build_regex_from_schema(json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the JSON schema cannot be followed: {error}") from error


def _spellings(tokenizer: TextTokenizer) -> dict[bytes, list[int]]:
    """Which tokens write which bytes."""
    inner: Any = tokenizer.tokenizer
    kind = getattr(inner.backend_tokenizer, "decoder", None)
    if isinstance(kind, decoders.ByteLevel):
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}

        def spell(token: str) -> bytes:
            return bytes(letters[letter] for letter in token)

    elif "\u2581" in "".join(inner.convert_ids_to_tokens(list(range(min(2000, len(inner)))))):
        spell = _piece
    else:
        raise ValueError(
            f"a text's form can be given for byte-level and sentence-piece tokenizers, not for {type(kind).__name__}"
        )
    found: dict[bytes, list[int]] = {}
    for token, i in inner.get_vocab().items():
        if i not in tokenizer.special and i not in inner.added_tokens_decoder:
            found.setdefault(spell(token), []).append(i)
    found.pop(b"", None)
    return found


def _piece(token: str) -> bytes:
    """The bytes of a sentence piece: `▁` is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
