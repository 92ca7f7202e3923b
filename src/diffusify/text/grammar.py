"""Regular expressions and JSON schemas as automata over a tokenizer's tokens."""

import json
import subprocess
import sys
from array import array
from importlib.util import find_spec
from typing import Any

from diffusify.diffusion.constraints import Automaton
from diffusify.text import regex_worker
from diffusify.text.json_schema import SchemaReader
from diffusify.text.regex_syntax import strip_anchors
from diffusify.text.tokenizer import TextTokenizer


def compile_regex(tokenizer: TextTokenizer, regex: str) -> Automaton:
    """Compile a regular expression to the automaton of all texts that match it as a whole.

    Anchors at its ends have no effect. It runs in a process of its own with limits on time and memory (see
    `regex_worker`). ValueError if the expression is invalid, has other anchors or exceeds the limits, or if the
    tokenizer's tokens do not stand for plain bytes.
    """
    if find_spec("outlines_core") is None:
        raise ValueError("constraining texts by a regular expression needs `pip install 'diffusify[serve]'`")
    try:
        plain_regex = strip_anchors(regex)
    except ValueError as error:
        raise ValueError(f"regex={regex[:80]!r} cannot be compiled: {error}") from error
    vocabulary = [[token.hex(), ids] for token, ids in _vocabulary(tokenizer).items()]
    request = json.dumps({"regex": plain_regex, "end": tokenizer.end_token_id, "vocabulary": vocabulary})
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
    """A regular expression for JSON of a given schema, in the syntax of `regex`.

    Every text that matches it follows the schema. ValueError for a keyword that no regular expression can follow.
    """
    try:
        from outlines_core.json_schema import build_regex_from_schema  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("constraining texts by a JSON schema needs `pip install 'diffusify[serve]'`") from error
    reader = SchemaReader()
    try:
        regex = build_regex_from_schema(json.dumps(reader.rewrite(schema)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the JSON schema cannot be compiled: {error}") from error
    for placeholder, pattern in reader.patterns.items():
        regex = regex.replace(placeholder, pattern)
    return regex


def _vocabulary(tokenizer: TextTokenizer) -> dict[bytes, list[int]]:
    """The ids of the tokens that stand for each string of bytes."""
    if not tokenizer.has_plain_bytes:
        pretrained: Any = tokenizer.tokenizer
        raise ValueError(
            "regular expressions and JSON schemas need a byte-level or SentencePiece tokenizer; this one has a "
            f"{type(pretrained.backend_tokenizer.decoder).__name__} decoder"
        )
    vocabulary: dict[bytes, list[int]] = {}
    for i in sorted(tokenizer.token_ids):
        vocabulary.setdefault(tokenizer.token_bytes(i), []).append(i)
    vocabulary.pop(b"", None)
    return vocabulary
