"""Strings to canvases and back, so that nobody has to count tokens."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from diffusify.canvas import Canvas
from diffusify.text.examples import Template
from diffusify.text.tokenizer import TextTokenizer

_HOLE = re.compile(r"(?P<escape>\\\[\[)|\[\[(?!\[)(?P<size>.*?)(?:\]\]|\Z)", re.DOTALL)
_SIZE = re.compile(r"\s*0*([1-9][0-9]{0,5})\s*(?:-\s*0*([1-9][0-9]{0,5})\s*)?")

# A text with holes in it; or already cut at them: texts or token ids, and the sizes that a hole may have (tokens).
Holed = str | Sequence[str | range | list[int]]


def parse_holes(text: str) -> list[str | range | list[int]]:
    r"""A text cut at its holes, each the sizes that it may have (tokens).

    `[[8]]` is a hole of eight tokens, `[[3-12]]` of three to twelve, `\[[` are two plain brackets. ValueError for a
    hole without a whole number from 1 to 999999, or two in order.
    """
    pieces: list[str | range | list[int]] = []
    plain, at = "", 0
    for found in _HOLE.finditer(text):
        plain += text[at : found.start()]
        at = found.end()
        if found["escape"]:
            plain += "[["
            continue
        size = _SIZE.fullmatch(found["size"])
        least, most = (int(size[1]), int(size[2] or size[1])) if size else (1, 0)
        if least > most or not found[0].endswith("]]"):
            raise ValueError(
                f"the hole {found[0][:40]} has no size; write [[8]] for a hole of 8 tokens (1 to 999999), [[3-12]] for "
                r"3 to 12, or \[[ for two plain brackets"
            )
        pieces += [plain, range(least, most + 1)] if plain else [range(least, most + 1)]
        plain = ""
    plain += text[at:]
    return [*pieces, plain] if plain else pieces


def continuation_canvas(
    tokenizer: TextTokenizer,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int | Sequence[int],
    *,
    context: int | None,
) -> Canvas:
    """Each prompt behind the start token, then room for `max_new_tokens`, one number for all or one for each.

    An empty prompt leaves all to the model. A prompt of token ids (`Dialogue.prompt`) is taken as it is, without
    another start token. ValueError if a row is longer than the `context` tokens that the model can see.
    """
    rooms = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(rooms) != len(prompts):
        raise ValueError(f"{len(rooms)} values of max_new_tokens for {len(prompts)} prompts; give one, or one for each")
    rows: list[list[int | None]] = []
    for prompt, room in zip(prompts, rooms, strict=True):
        if room < 1:
            raise ValueError(f"max_new_tokens={room} must be at least 1")
        head = [tokenizer.start_token_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        if not head:
            raise ValueError("a prompt of token ids has none; give at least the start token")
        if context is not None and len(head) + room > context:
            left = context - len(head)
            way = f"ask for at most {left} new tokens or shorten the prompt" if left > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {len(head)} tokens and max_new_tokens={room} make {len(head) + room}, "
                f"but the model can see {context}; {way}"
            )
        rows.append([*head, *[None] * room])
    return _room(tokenizer, rows)


def few_shot(shots: list[dict[str, Any]], question: dict[str, Any], template: Template) -> str:
    """A prompt that shows how it is done: solved records, then the one to be solved, a blank line between them."""
    solved = [template.fill_prompt(shot) + template.fill_target(shot) for shot in shots]
    return "\n\n".join([*solved, template.fill_prompt(question)])


def hole_choices(texts: Sequence[Holed]) -> int:
    """In how many sizes the holes of these texts are worth trying: 8 at most, 1 if all sizes are given."""
    sizes = [len(piece) for text in texts for piece in _cut(text) if isinstance(piece, range)]
    return min(8, max(sizes, default=1))


def infill_canvas(
    tokenizer: TextTokenizer, texts: Sequence[Holed], *, context: int | None, close: bool = True, choices: int = 1
) -> Canvas:
    """Texts with their holes (see `encode_holed`) open, between start and, if `close`, end token.

    Each text fills `choices` rows, from the smallest size of its holes to the largest. ValueError if a text has no
    hole, or a row is longer than the `context` tokens that the model can see.
    """
    rows = []
    for text in texts:
        pieces = encode_holed(tokenizer, text)
        if not any(isinstance(piece, range) for piece in pieces):
            raise ValueError(f"{_begin(text)} has no hole; write [[8]] where 8 tokens are to be filled in")
        ends = [[tokenizer.end_token_id]] if close else []
        pieces = [[tokenizer.start_token_id], *pieces, *ends]
        rows += [_infill_row(text, pieces, choice / max(1, choices - 1), context) for choice in range(choices)]
    return _room(tokenizer, rows)


def _cut(text: Holed) -> Sequence[str | range | list[int]]:
    return parse_holes(text) if isinstance(text, str) else text


def encode_holed(tokenizer: TextTokenizer, text: Holed) -> list[list[int] | range]:
    """The token ids of a text, and the sizes of the holes between them (see `parse_holes`).

    A piece before a hole is cut as it is before a word. A space at its end is left to the hole, since most tokenizers
    keep it at the start of a word; and two line breaks there, or a break and spaces, are the tokens that a text has.
    """
    parsed = _cut(text)
    pieces: list[list[int] | range] = []
    for n, piece in enumerate(parsed):
        if isinstance(piece, str):
            encode = _before_word if n + 1 < len(parsed) else TextTokenizer.encode
            piece = encode(tokenizer, piece, continues=n > 0)
        pieces.append(piece)
    return pieces


def _before_word(tokenizer: TextTokenizer, text: str, *, continues: bool) -> list[int]:
    """The ids of a text that a word is to follow, without the space between them."""
    plain = text.removesuffix(" ")
    if plain[-1:].isspace():
        ids = tokenizer.encode(text + "x", continues=continues)[:-1]
        if tokenizer.decode(ids, continues=continues) == plain:
            return ids
    return tokenizer.encode(plain, continues=continues)


def _infill_row(text: Holed, pieces: list[list[int] | range], share: float, context: int | None) -> list[int | None]:
    """Holes of one size each, by its share of the way from the smallest to the largest."""
    row: list[int | None] = []
    for piece in pieces:
        if not isinstance(piece, range):
            row += piece
            continue
        size = piece[round(share * (len(piece) - 1))]
        if context is not None and len(row) + size > context:
            raise ValueError(_too_long(text, len(row) + size, context))
        row += [None] * size
    if context is not None and len(row) > context:
        raise ValueError(_too_long(text, len(row), context))
    return row


def read(tokenizer: TextTokenizer, canvas: Canvas, *, hole: str = "_") -> list[str]:
    """The text of each row up to the first end token that was written into it, with a `hole` for each open position."""
    return [_text(tokenizer, cells, hole, continues=False) for cells, _ in _rows(tokenizer, canvas)]


def read_spans(tokenizer: TextTokenizer, canvas: Canvas, *, hole: str = "_") -> list[list[str]]:
    """What was written into each run of editable positions, row by row, as `read` shows it.

    Holes that touch are one run. A run behind an end token that was written is an empty string.
    """
    return [
        [
            _text(tokenizer, [cell for cell in run if cell.place < len(shown)], hole, continues=run[0].place > 0)
            for editable, cells in groupby([*shown, *hidden], key=lambda cell: cell.editable)
            if editable and (run := list(cells))
        ]
        for shown, hidden in _rows(tokenizer, canvas)
    ]


class _Cell(NamedTuple):
    """One position of a row; `place` counts from the first after the start token."""

    place: int
    token: int
    open: bool
    editable: bool


def _rows(tokenizer: TextTokenizer, canvas: Canvas) -> Iterator[tuple[list[_Cell], list[_Cell]]]:
    """The positions of each row without start token and padding: those before a written end token, the rest."""
    for tokens, open, editable, real in zip(
        canvas.tokens.tolist(), canvas.open.tolist(), canvas.editable.tolist(), canvas.real.tolist(), strict=True
    ):
        given = [c for c, is_real in zip(zip(tokens, open, editable, strict=True), real, strict=True) if is_real]
        skip = int(bool(given) and given[0][0] == tokenizer.start_token_id and not given[0][1])
        cells = [_Cell(place, *cell) for place, cell in enumerate(given[skip:])]
        ends = (c.place for c in cells if c.editable and not c.open and c.token == tokenizer.end_token_id)
        end = next(ends, len(cells))
        yield cells[:end], cells[end:]


def _text(tokenizer: TextTokenizer, cells: list[_Cell], hole: str, *, continues: bool) -> str:
    """The text of neighbours; `continues`: there is text before them."""
    text = ""
    for is_open, run in groupby(cells, key=lambda cell: cell.open):
        ids = [cell.token for cell in run]
        text += hole * len(ids) if is_open else tokenizer.decode(ids, continues=continues)
        continues = True
    return text


def _room(tokenizer: TextTokenizer, rows: list[list[int | None]]) -> Canvas:
    if not rows:
        raise ValueError("there is no text to make a canvas from; give at least one, the empty text if need be")
    return Canvas.from_tokens(rows, noise=tokenizer.mask_token_id, pad=tokenizer.pad_token_id)


def _begin(text: Holed) -> str:
    return repr(text[:40]) if isinstance(text, str) else "the text"


def _too_long(text: Holed, tokens: int, context: int) -> str:
    return (
        f"{_begin(text)} with its holes needs {tokens} tokens or more, but the model can see {context}; "
        "shorten the text or its holes"
    )
