"""Texts and examples of any length to rows of one length, without losing a token."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int32, Shaped
from torch import Tensor

from diffusify.text.tokenizer import TextTokenizer

BATCH = 128  # texts read and tokenized at once
PORTION = 1 << 20  # and letters
OPEN_ROWS = 256  # rows that wait for examples; when there are more, the fullest is closed


class Rest(NamedTuple):
    """Tokens that wait for a row to be full, and where among them documents start."""

    tokens: Int32[np.ndarray, "k"] = np.empty(0, np.int32)
    starts: Bool[np.ndarray, "k"] = np.empty(0, bool)


def pack(texts: Dataset, tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False) -> Dataset:
    """Rows of `length` tokens: the documents of column `text` laid end to end, and cut wherever a row is full.

    Each row has `tokens` and `document`, which counts the row's documents from 1; 0 is padding. What a cut leaves over
    is a document of its own in the next row. The last, unfilled row is dropped unless `keep_tail`, or unless it is the
    only one. All of it is in memory; see `diffusify.text.corpus` for more text than that.
    """
    if not len(texts):
        raise ValueError("there are no texts to pack; give a dataset with at least one")
    batches = (batch["text"] for batch in texts.iter(BATCH))  # pyright: ignore  (a batch is a dict of columns)
    tokens, documents = zip(*pack_batches(batches, tokenizer, length, keep_tail=keep_tail), strict=True)
    return Dataset.from_dict({"tokens": np.concatenate(tokens), "document": np.concatenate(documents)})


def pack_batches(
    batches: Iterable[list[str]], tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False
) -> Iterator[tuple[Int32[np.ndarray, "rows n"], Int32[np.ndarray, "rows n"]]]:
    """The rows of one batch of texts after the other, as (tokens, document); only an unfilled row waits for the next.

    See `pack`.
    """
    rest, packed = Rest(), False
    for batch in batches:
        tokens, document, rest = fill_rows(rest, batch, tokenizer, length)
        if len(tokens):
            yield tokens, document
            packed = True
    if len(rest.tokens) and (keep_tail or not packed):
        room = (0, length - len(rest.tokens))
        document = np.pad(_number(rest.starts[None]), ((0, 0), room))
        yield np.pad(rest.tokens, room, constant_values=tokenizer.pad_token_id)[None], document


def fill_rows(
    rest: Rest, texts: list[str], tokenizer: TextTokenizer, length: int
) -> tuple[Int32[np.ndarray, "rows n"], Int32[np.ndarray, "rows n"], Rest]:
    """The rows that are full when some texts are laid behind what was left over, and what is left over now."""
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a single token has nothing to be predicted from")
    documents = [np.array(ids, np.int32) for some in _portions(texts) for ids in tokenizer.documents(some)]
    sizes = np.array([len(document) for document in documents], int)
    begins = np.zeros(sizes.sum(), bool)
    begins[np.cumsum(sizes) - sizes] = True
    tokens, starts = np.concatenate([rest.tokens, *documents]), np.concatenate([rest.starts, begins])
    full = len(tokens) // length * length
    rows = tokens[:full].reshape(-1, length), _number(starts[:full].reshape(-1, length))
    return *rows, Rest(tokens[full:], starts[full:])


def pack_examples(examples: Dataset, length: int, *, pad_token_id: int) -> Dataset:
    """Rows of `length` tokens: whole examples (`tokens`, `target`; see `make_examples`), as many as fit into each.

    Each row has `tokens`, `document` (from 1; 0 is padding) and `editable`, which is what is to be written. An example
    goes into the first open row that has room for it (see OPEN_ROWS); it is never cut.
    """
    if not len(examples):
        raise ValueError("there are no examples to pack; give a dataset with at least one")
    columns = examples.with_format("numpy")
    written, target = columns["tokens"][:], columns["target"][:]
    sizes = [len(tokens) for tokens in written]
    if max(sizes) > length:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into length={length}, and none is ever cut")
    rows = _fit(sizes, length)
    tokens = np.full((len(rows), length), pad_token_id, np.int32)
    document, editable = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for n, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, 1):
            here = np.s_[n, at : at + sizes[example]]
            tokens[here], document[here], editable[here] = written[example], number, target[example]
            at += sizes[example]
    return Dataset.from_dict({"tokens": tokens, "document": document, "editable": editable})


def collate(rows: list[dict[str, Any]]) -> dict[str, Shaped[Tensor, "b n"]]:
    """Packed rows as the tensors of a batch: `tokens`, `document` and, if the rows have it, `editable`."""
    names = [name for name in ("tokens", "document", "editable") if name in rows[0]]
    batch = {name: torch.from_numpy(np.array([row[name] for row in rows])) for name in names}
    return {name: tensor if tensor.dtype == torch.bool else tensor.long() for name, tensor in batch.items()}


def _fit(sizes: list[int], length: int) -> list[list[int]]:
    """Which examples go into which row: each into the first open row that has room for it."""
    rows: list[list[int]] = []
    open: dict[int, int] = {}  # the room that is left in a row
    for example, size in enumerate(sizes):
        row = next((row for row, room in open.items() if room >= size), None)
        if row is None:
            if len(open) == OPEN_ROWS:
                del open[min(open, key=lambda row: open[row])]
            row = len(rows)
            rows.append([])
            open[row] = length
        rows[row].append(example)
        open[row] -= size
        if not open[row]:
            del open[row]
    return rows


def _portions(texts: list[str]) -> Iterator[list[str]]:
    """Texts in portions of about a million letters: a tokenizer's answers take far more memory than arrays do."""
    portion, size = [], 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    yield portion


def _number(starts: Bool[np.ndarray, "rows n"]) -> Int32[np.ndarray, "rows n"]:
    """Documents counted from 1 in every row, given where they start; every row starts one."""
    document = starts.astype(np.int32)
    document[:, 0] = 1
    return document.cumsum(1, dtype=np.int32)
