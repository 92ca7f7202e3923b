"""Regular expressions and JSON schemas as automata over a tokenizer's tokens."""

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


def compile_regex(tokenizer: TextTokenizer, regex: str) -> Automaton:
    """Compile a regular expression to the automaton of all texts that match it as a whole.

    It runs in a process of its own with limits on time and memory (see `regex_worker`). ValueError if the expression
    is invalid or exceeds the limits, or if the tokenizer's tokens do not stand for plain bytes.
    """
    if find_spec("outlines_core") is None:
        raise ValueError("constraining texts by a regular expression needs `pip install 'diffusify[serve]'`")
    vocabulary = [[token.hex(), ids] for token, ids in _vocabulary(tokenizer).items()]
    request = json.dumps({"regex": regex, "end": tokenizer.end_token_id, "vocabulary": vocabulary})
    command = [sys.executable, "-m", regex_worker.__name__, str(regex_worker.MAX_SECONDS)]
    try:
        worker = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=3 * regex_worker.MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        worker = None
    if worker is None or worker.returncode != 0:
        message = worker.stderr.decode(errors="replace").strip() if worker and worker.returncode == 1 else ""
        reason = message if message and "Traceback" not in message else "it takes too much time or memory"
        raise ValueError(f"regex={regex[:80]!r} cannot be compiled: {reason}")
    head, _, edge_bytes = worker.stdout.partition(b"\n")
    header = json.loads(head)
    count = sum(edges for _, edges in header["states"])
    tokens, targets = array("i", edge_bytes[: 4 * count]), array("q", edge_bytes[4 * count :])
    edges, start = {}, 0
    for state, size in header["states"]:
        edges[state] = (tokens[start : start + size], targets[start : start + size])
        start += size
    return Automaton(edges, header["start"], set(header["final"]))


def schema_regex(schema: dict[str, Any]) -> str:
    """A regular expression for JSON of a given schema. ValueError for a schema that has no regular expression."""
    try:
        from outlines_core.json_schema import build_regex_from_schema  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("constraining texts by a JSON schema needs `pip install 'diffusify[serve]'`") from error
    try:
        return build_regex_from_schema(json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the JSON schema cannot be compiled: {error}") from error


def _vocabulary(tokenizer: TextTokenizer) -> dict[bytes, list[int]]:
    """The ids of the tokens that stand for each string of bytes."""
    pretrained: Any = tokenizer.tokenizer
    decoder = getattr(pretrained.backend_tokenizer, "decoder", None)
    if isinstance(decoder, decoders.ByteLevel):
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

        def token_bytes(token: str) -> bytes:
            return bytes(byte_of[char] for char in token)

    elif "\u2581" in "".join(pretrained.convert_ids_to_tokens(list(range(min(2000, len(pretrained)))))):
        token_bytes = _sentencepiece_bytes
    else:
        raise ValueError(
            "regular expressions and JSON schemas need a byte-level or SentencePiece tokenizer; this one has a "
            f"{type(decoder).__name__} decoder"
        )
    vocabulary: dict[bytes, list[int]] = {}
    for token, i in pretrained.get_vocab().items():
        if i not in tokenizer.special_ids and i not in pretrained.added_tokens_decoder:
            vocabulary.setdefault(token_bytes(token), []).append(i)
    vocabulary.pop(b"", None)
    return vocabulary


def _sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token: `▁` is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
