"""Prompts and texts with masked spans to canvases, and canvases back to text."""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, product
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.length_tokens import LengthTokens, SpanLengths
from diffusify.diffusion.span_ends import SpanEnds
from diffusify.text.examples import Template
from diffusify.text.tokenizer import TextTokenizer

_SPAN = re.compile(r"(?P<escape>\\\[\[)|\[\[(?!\[)(?P<length>.*?)(?:\]\]|\Z)", re.DOTALL)
_LENGTH = re.compile(r"\s*0*([1-9][0-9]{0,5})\s*(?:-\s*0*([1-9][0-9]{0,5})\s*)?")
UNKNOWN_LENGTH = range(1, 65)  # of `[[...]]`, in tokens

# Plain text, the allowed lengths of a masked span (tokens), or token ids.
Segment = str | range | list[int]
# A text in which masked spans are written as `[[8]]`, or its segments.
InfillText = str | Sequence[Segment]


def parse_masked_spans(text: str) -> list[Segment]:
    r"""Split a text at its masked spans; each span is the range of its allowed lengths (tokens).

    `[[8]]` is a masked span of eight tokens, `[[3-12]]` one of three to twelve, `[[...]]` one of unknown length, which
    is at most 64, and `\[[` two plain brackets.
    ValueError if a span has neither a whole number from 1 to 999999 nor two such numbers in ascending order.
    """
    segments: list[Segment] = []
    plain, position = "", 0
    for match in _SPAN.finditer(text):
        plain += text[position : match.start()]
        position = match.end()
        if match["escape"]:
            plain += "[["
            continue
        length = _LENGTH.fullmatch(match["length"])
        span = range(int(length[1]), int(length[2] or length[1]) + 1) if length else range(0)
        span = UNKNOWN_LENGTH if match["length"].strip() in ("...", "\N{HORIZONTAL ELLIPSIS}") else span
        if not span or not match[0].endswith("]]"):
            raise ValueError(
                f"the masked span {match[0][:40]} has no valid length; write [[8]] for 8 tokens (1 to 999999), "
                r"[[3-12]] for 3 to 12, [[...]] if it is unknown, or \[[ for two plain brackets"
            )
        segments += [plain, span] if plain else [span]
        plain = ""
    plain += text[position:]
    return [*segments, plain] if plain else segments


def continuation_canvas(
    tokenizer: TextTokenizer,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int | Sequence[int],
    *,
    context: int | None,
) -> Canvas:
    """A canvas of prompts, each followed by `max_new_tokens` open positions (one number for all or one for each).

    A string gets the start token (see `TextTokenizer.add_start`) and may be empty; token ids (see
    `ChatTemplate.prompt`) are used as they are. ValueError if a row is longer than the model's
    `context` (tokens; None is unlimited).
    """
    lengths = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [int(max_new_tokens)] * len(prompts)
    if len(lengths) != len(prompts):
        raise ValueError(
            f"{len(lengths)} values of max_new_tokens for {len(prompts)} prompts; give one, or one for each"
        )
    rows: list[list[int | None]] = []
    for prompt, length in zip(prompts, lengths, strict=True):
        if length < 1:
            raise ValueError(f"max_new_tokens={length} must be at least 1")
        prompt_ids = tokenizer.add_start(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        if not prompt_ids:
            raise ValueError("a prompt of token ids is empty; give at least the start token")
        if context is not None and len(prompt_ids) + length > context:
            left = context - len(prompt_ids)
            advice = f"set max_new_tokens to at most {left} or shorten the prompt" if left > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={length} make {len(prompt_ids) + length} "
                f"tokens, but the model's context is {context}; {advice}"
            )
        rows.append([*prompt_ids, *[None] * length])
    return _masked_canvas(tokenizer, rows)


def few_shot(shots: list[dict[str, Any]], question: dict[str, Any], template: Template) -> str:
    """A few-shot prompt: solved records and the record to solve, separated by blank lines."""
    solved = [template.fill_prompt(shot) + template.fill_target(shot) for shot in shots]
    return "\n\n".join([*solved, template.fill_prompt(question)])


def count_length_candidates(texts: Sequence[InfillText]) -> int:
    """The number of span lengths worth trying for these texts: at most 8, and 1 if every length is fixed."""
    lengths = [len(segment) for text in texts for segment in _segments(text) if isinstance(segment, range)]
    return min(8, max(lengths, default=1))


def infill_canvas(
    tokenizer: TextTokenizer,
    texts: Sequence[InfillText],
    *,
    context: int | None,
    add_end_token: bool = True,
    candidates: int = 1,
) -> Canvas:
    """A canvas of texts whose masked spans are open, between the start and, if `add_end_token`, the end token.

    Each text gets `candidates` rows, from the shortest allowed length of its spans to the longest that fits into the
    model's `context` (tokens; None is unlimited). ValueError if a text has no masked span, or the shortest do not fit.
    """
    rows = []
    for text in texts:
        segments = _framed_segments(tokenizer, text, add_end_token=add_end_token)
        spans = _fitting_spans(text, segments, context)
        for fraction in [n / max(1, candidates - 1) for n in range(candidates)]:
            lengths = [span[round(fraction * (len(span) - 1))] for span in spans]
            rows.append(_infill_row(text, segments, lengths, context))
    return _masked_canvas(tokenizer, rows)


def resizable_canvas(
    tokenizer: TextTokenizer,
    texts: Sequence[InfillText],
    tokens: LengthTokens,
    *,
    context: int | None,
    candidates: int = 1,
) -> tuple[Canvas, SpanLengths]:
    """A canvas as `infill_canvas` makes it, and the spans whose lengths the model chooses with its length tokens.

    A span begins with the geometric mean of its shortest and longest length. Several candidates begin with lengths that
    divide the range between them, by equal factors.
    """
    rows: list[list[int | None]] = []
    number, spare, surplus = [], [], []
    for text, candidate in product(texts, range(candidates)):
        segments, fraction = _framed_segments(tokenizer, text), (candidate + 0.5) / candidates
        spans = [segment for segment in segments if isinstance(segment, range)]
        fitting = _fitting_spans(text, segments, context)
        lengths = [round(span[0] * (span[-1] / span[0]) ** fraction) for span in fitting]
        row = _infill_row(text, segments, lengths, context)
        left = sys.maxsize if context is None else context - len(row)
        added = []
        for span, length in zip(spans, lengths, strict=True):
            added.append(min(span[-1] - length, left))
            left -= added[-1]
        sizes = iter(lengths)
        is_span = [isinstance(segment, range) for segment in segments]
        parts = [next(sizes) if isinstance(segment, range) else len(segment) for segment in segments]
        counts = accumulate(is_span)
        number.append([n * s for n, s, size in zip(counts, is_span, parts, strict=True) for _ in range(size)])
        rows.append(row)
        spare.append([0, *added])
        surplus.append([0, *(length - span[0] for span, length in zip(spans, lengths, strict=True))])
    return _masked_canvas(tokenizer, rows), SpanLengths(tokens, *map(_padded, (number, spare, surplus)))


def open_ended_canvas(
    tokenizer: TextTokenizer,
    texts: Sequence[InfillText],
    sampled: Sequence[bool],
    *,
    context: int | None,
    candidates: int = 1,
) -> tuple[Canvas, SpanEnds]:
    """A canvas as `infill_canvas` makes it, with spans of the greatest length that is allowed and fits.

    The model may end each of them as soon as it has the shortest allowed length, and one more position is for the end
    token. `sampled` says for each text whether the end is sampled (see `SpanEnds`). The `candidates` of a text are
    equal.
    """
    rows: list[list[int | None]] = []
    surplus = []
    for text in texts:
        segments = _framed_segments(tokenizer, text)
        shortest = [segment[0] for segment in segments if isinstance(segment, range)]
        spare = sys.maxsize if context is None else context - len(_infill_row(text, segments, shortest, context))
        lengths, may_lose = [], []
        for segment in segments:
            if not isinstance(segment, range):
                may_lose += [0] * len(segment)
                continue
            added = min(segment[-1] + 1 - segment[0], spare) if len(segment) > 1 else 0
            spare -= added
            lengths.append(segment[0] + added)
            may_lose += [added] * lengths[-1]
        rows += [_infill_row(text, segments, lengths, context)] * candidates
        surplus += [may_lose] * candidates
    of_rows = torch.tensor(sampled).repeat_interleave(candidates)
    return _masked_canvas(tokenizer, rows), SpanEnds.of_spans(_padded(surplus), tokenizer.end_token_id, of_rows)


def _framed_segments(
    tokenizer: TextTokenizer, text: InfillText, *, add_end_token: bool = True
) -> list[list[int] | range]:
    """The segments of a text between the start and the end token. ValueError if it has no masked span."""
    segments = encode_infill_text(tokenizer, text)
    if not any(isinstance(segment, range) for segment in segments):
        raise ValueError(f"{_excerpt(text)} has no masked span; write [[...]] where text is missing")
    return [[tokenizer.start_token_id], *segments, *([[tokenizer.end_token_id]] if add_end_token else [])]


def _fitting_spans(text: InfillText, segments: list[list[int] | range], context: int | None) -> list[range]:
    """The allowed lengths of a text's spans, as far as each fits into its share of the context's room."""
    spans = [segment for segment in segments if isinstance(segment, range)]
    shortest = _infill_row(text, segments, [span[0] for span in spans], context)
    room = sys.maxsize if context is None else context - len(shortest)
    return [span[: room // len(spans) + 1] for span in spans]


def _padded(rows: list[list[int]]) -> Int[Tensor, "rows n"]:
    """Rows of numbers, padded with 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _segments(text: InfillText) -> Sequence[Segment]:
    return parse_masked_spans(text) if isinstance(text, str) else text


def encode_infill_text(tokenizer: TextTokenizer, text: InfillText) -> list[list[int] | range]:
    """The token ids of a text, and the allowed lengths of the masked spans between them (see `parse_masked_spans`).

    Text before a span is tokenized as if a word followed. A space at its end is left to the span, since most
    tokenizers join it to the next word. Two line breaks, or a break and spaces, keep the tokens they have in a text.
    """
    parsed = _segments(text)
    segments: list[list[int] | range] = []
    for n, segment in enumerate(parsed):
        if isinstance(segment, str):
            encode = _encode_before_word if n + 1 < len(parsed) else TextTokenizer.encode
            segment = encode(tokenizer, segment, continues=n > 0)
        segments.append(segment)
    return segments


def _encode_before_word(tokenizer: TextTokenizer, text: str, *, continues: bool) -> list[int]:
    """The ids of a text that a word follows, without the space between the two."""
    plain = text.removesuffix(" ")
    if plain[-1:].isspace():
        ids = tokenizer.encode(text + "x", continues=continues)[:-1]
        if tokenizer.decode(ids, continues=continues) == plain:
            return ids
    return tokenizer.encode(plain, continues=continues)


def _infill_row(
    text: InfillText, segments: list[list[int] | range], lengths: list[int], context: int | None
) -> list[int | None]:
    """A row with None for open positions; `lengths` are those of the spans. ValueError if the row does not fit."""
    tokens = sum(lengths) + sum(len(segment) for segment in segments if not isinstance(segment, range))
    if context is not None and tokens > context:
        raise ValueError(
            f"{_excerpt(text)} with its masked spans needs at least {tokens} tokens, but the model's context is "
            f"{context}; shorten the text or its spans"
        )
    remaining, row = iter(lengths), list[int | None]()
    for segment in segments:
        row += [None] * next(remaining) if isinstance(segment, range) else segment
    return row


def decode_canvas(tokenizer: TextTokenizer, canvas: Canvas, *, placeholder: str = "_") -> list[str]:
    """The text of each row up to its first generated end token, with `placeholder` for each open position."""
    return [_decode(tokenizer, row, placeholder, continues=False) for row, _ in _split_rows(tokenizer, canvas)]


def decode_spans(tokenizer: TextTokenizer, canvas: Canvas, *, placeholder: str = "_") -> list[list[str]]:
    """The text of each run of editable positions, row by row, as in `decode_canvas`.

    Adjacent masked spans are one run. A run after a generated end token is an empty string.
    """
    return [
        [
            _decode(tokenizer, [p for p in run if p.index < len(visible)], placeholder, continues=run[0].index > 0)
            for editable, group in groupby([*visible, *hidden], key=lambda position: position.editable)
            if editable and (run := list(group))
        ]
        for visible, hidden in _split_rows(tokenizer, canvas)
    ]


class _Position(NamedTuple):
    """One position of a row; `index` counts from the first position after the start token."""

    index: int
    token: int
    open: bool
    editable: bool


def _split_rows(tokenizer: TextTokenizer, canvas: Canvas) -> Iterator[tuple[list[_Position], list[_Position]]]:
    """Each row without start token and padding, split at its first generated end token."""
    for tokens, open, editable, real in zip(
        canvas.tokens.tolist(), canvas.open.tolist(), canvas.editable.tolist(), canvas.real.tolist(), strict=True
    ):
        unpadded = [p for p, is_real in zip(zip(tokens, open, editable, strict=True), real, strict=True) if is_real]
        skip = int(bool(unpadded) and unpadded[0][0] == tokenizer.start_token_id and not unpadded[0][1])
        positions = [_Position(index, *position) for index, position in enumerate(unpadded[skip:])]
        ends = (p.index for p in positions if p.editable and not p.open and p.token in tokenizer.end_token_ids)
        end = next(ends, len(positions))
        yield positions[:end], positions[end:]


def _decode(tokenizer: TextTokenizer, positions: list[_Position], placeholder: str, *, continues: bool) -> str:
    """The text of adjacent positions; `continues` says that there is text before them."""
    text = ""
    for is_open, run in groupby(positions, key=lambda position: position.open):
        ids = [position.token for position in run]
        text += placeholder * len(ids) if is_open else tokenizer.decode(ids, continues=continues)
        continues = True
    return text


def _masked_canvas(tokenizer: TextTokenizer, rows: list[list[int | None]]) -> Canvas:
    if not rows:
        raise ValueError("there are no texts to make a canvas of; give at least one, which may be empty")
    return Canvas.from_tokens(rows, noise=tokenizer.mask_token_id, pad=tokenizer.pad_token_id)


def _excerpt(text: InfillText) -> str:
    return repr(text[:40]) if isinstance(text, str) else "the text"
