"""Packing: texts and examples of any length to rows of one length, without losing a token."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int32, Shaped
from torch import Tensor

from diffusify.text.tokenizer import TextTokenizer

BATCH = 128  # texts read at once
MAX_CHARS = 1 << 20  # characters tokenized at once: a tokenizer's output takes far more memory than arrays do
OPEN_ROWS = 256  # rows that may still take examples; when there are more, the fullest is closed


class Leftover(NamedTuple):
    """Tokens that do not fill a row yet, and which of them start a document."""

    tokens: Int32[np.ndarray, "k"] = np.empty(0, np.int32)
    starts: Bool[np.ndarray, "k"] = np.empty(0, bool)


def pack(texts: Dataset, tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False) -> Dataset:
    """Pack the documents of column `text` into rows of `length` tokens, joined end to end and cut where a row is full.

    Each row has `tokens` and `document`, which numbers the row's documents from 1; 0 is padding. The part of a
    document after a cut counts as a document of the next row. The last, unfilled row is dropped unless `keep_tail` is
    set or it is the only one. Everything is held in memory; see `diffusify.text.corpus` for larger data.
    """
    if not len(texts):
        raise ValueError("there are no texts to pack; give a dataset with at least one")
    batches = (batch["text"] for batch in texts.iter(BATCH))  # pyright: ignore  (a batch is a dict of columns)
    tokens, documents = zip(*pack_batches(batches, tokenizer, length, keep_tail=keep_tail), strict=True)
    return Dataset.from_dict({"tokens": np.concatenate(tokens), "document": np.concatenate(documents)})


def pack_batches(
    batches: Iterable[list[str]], tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False
) -> Iterator[tuple[Int32[np.ndarray, "rows n"], Int32[np.ndarray, "rows n"]]]:
    """The packed rows of each batch of texts in turn, as (tokens, document); see `pack`.

    Between batches only an unfilled row is kept.
    """
    leftover, packed = Leftover(), False
    for batch in batches:
        tokens, document, leftover = fill_rows(leftover, batch, tokenizer, length)
        if len(tokens):
            yield tokens, document
            packed = True
    if len(leftover.tokens) and (keep_tail or not packed):
        padding = (0, length - len(leftover.tokens))
        document = np.pad(_number_documents(leftover.starts[None]), ((0, 0), padding))
        yield np.pad(leftover.tokens, padding, constant_values=tokenizer.pad_token_id)[None], document


def fill_rows(
    leftover: Leftover, texts: list[str], tokenizer: TextTokenizer, length: int
) -> tuple[Int32[np.ndarray, "rows n"], Int32[np.ndarray, "rows n"], Leftover]:
    """The full rows (tokens, document) of a leftover and the texts after it, and the new leftover."""
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a single token has nothing to be predicted from")
    documents = [np.array(ids, np.int32) for batch in _char_batches(texts) for ids in tokenizer.documents(batch)]
    sizes = np.array([len(document) for document in documents], int)
    new_starts = np.zeros(sizes.sum(), bool)
    new_starts[np.cumsum(sizes) - sizes] = True
    tokens, starts = np.concatenate([leftover.tokens, *documents]), np.concatenate([leftover.starts, new_starts])
    full = len(tokens) // length * length
    rows = tokens[:full].reshape(-1, length), _number_documents(starts[:full].reshape(-1, length))
    return *rows, Leftover(tokens[full:], starts[full:])


def pack_examples(examples: Dataset, length: int, *, pad_token_id: int) -> Dataset:
    """Pack whole examples (`tokens`, `target`; see `make_examples`) into rows of `length` tokens.

    Each row has `tokens`, `document` (from 1; 0 is padding) and `editable`, which marks the target tokens. An example
    goes into the first open row with enough space (see OPEN_ROWS) and is never cut. ValueError if one is too long.
    """
    if not len(examples):
        raise ValueError("there are no examples to pack; give a dataset with at least one")
    columns = examples.with_format("numpy")
    all_tokens, target = columns["tokens"][:], columns["target"][:]
    sizes = [len(tokens) for tokens in all_tokens]
    if max(sizes) > length:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into length={length}, and none is ever cut")
    rows = _first_fit(sizes, length)
    tokens = np.full((len(rows), length), pad_token_id, np.int32)
    document, editable = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for n, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            span = np.s_[n, start : start + sizes[example]]
            tokens[span], document[span], editable[span] = all_tokens[example], number, target[example]
            start += sizes[example]
    return Dataset.from_dict({"tokens": tokens, "document": document, "editable": editable})


def collate(rows: list[dict[str, Any]]) -> dict[str, Shaped[Tensor, "b n"]]:
    """A batch of packed rows as tensors: `tokens`, `document` and, if the rows have it, `editable`."""
    names = [name for name in ("tokens", "document", "editable") if name in rows[0]]
    batch = {name: torch.from_numpy(np.array([row[name] for row in rows])) for name in names}
    return {name: tensor if tensor.dtype == torch.bool else tensor.long() for name, tensor in batch.items()}


def _first_fit(sizes: list[int], length: int) -> list[list[int]]:
    """The examples of each row: each example goes into the first open row with enough space."""
    rows: list[list[int]] = []
    open: dict[int, int] = {}  # row number -> free tokens
    for example, size in enumerate(sizes):
        row = next((row for row, free in open.items() if free >= size), None)
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


def _char_batches(texts: list[str]) -> Iterator[list[str]]:
    """Batches of texts, each closed once it has MAX_CHARS characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= MAX_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _number_documents(starts: Bool[np.ndarray, "rows n"]) -> Int32[np.ndarray, "rows n"]:
    """Document numbers from 1 in every row, given where documents start; every row starts one."""
    document = starts.astype(np.int32)
    document[:, 0] = 1
    return document.cumsum(1, dtype=np.int32)
