"""Texts and examples of any length to rows of one length, without losing a token."""

from collections.abc import Iterator
from typing import overload

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from jaxtyping import Shaped
from torch import Tensor

from diffusify.text.tokens import TextTokenizer

BATCH = 128  # texts tokenized at once
OPEN_ROWS = 256  # rows that wait for examples; when there are more, the fullest is closed


@overload
def pack(texts: Dataset, tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False) -> Dataset: ...
@overload
def pack(
    texts: IterableDataset, tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False
) -> IterableDataset: ...
def pack(
    texts: Dataset | IterableDataset, tokenizer: TextTokenizer, length: int, *, keep_tail: bool = False
) -> Dataset | IterableDataset:
    """Rows of `length` tokens: the documents of column `text` laid end to end, and cut wherever a row is full.

    Each row has `tokens` and `document`, which counts the row's documents from 1; 0 is padding. What a cut leaves over
    is a document of its own in the next row. The last, unfilled row is dropped unless `keep_tail`, or unless it is the
    only one. An IterableDataset is packed while it is read, again in every epoch; a Dataset is packed in memory, now.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a single token has nothing to be predicted from")
    if isinstance(texts, IterableDataset):
        given = {"texts": texts, "tokenizer": tokenizer, "length": length, "keep_tail": keep_tail}
        # IterableDataset.from_generator would pickle texts and tokenizer, only to name a cache that it never fills.
        return IterableDataset(ExamplesIterable(_examples, given))
    if not len(texts):
        raise ValueError("there are no texts to pack; give a dataset with at least one")
    tokens, documents = zip(*_rows(texts, tokenizer, length, keep_tail), strict=True)
    return Dataset.from_dict({"tokens": np.concatenate(tokens), "document": np.concatenate(documents)})


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


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Shaped[Tensor, "b n"]]:
    """Packed rows as the tensors of a batch: `tokens`, `document` and, if the rows have it, `editable`."""
    names = [name for name in ("tokens", "document", "editable") if name in rows[0]]
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


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


def _rows(
    texts: Dataset | IterableDataset, tokenizer: TextTokenizer, length: int, keep_tail: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of a batch of texts after the other, as (tokens, document); only an unfilled row waits for the next."""
    tokens, starts = np.empty(0, np.int32), np.empty(0, bool)
    packed = False
    for batch in texts.iter(BATCH):
        documents = tokenizer.documents(batch["text"])  # pyright: ignore  (a batch is a dict of columns)
        sizes = np.array([len(document) for document in documents])
        begins = np.zeros(sizes.sum(), bool)
        begins[np.cumsum(sizes) - sizes] = True
        tokens = np.concatenate([tokens, *(np.array(document, np.int32) for document in documents)])
        starts = np.concatenate([starts, begins])
        full = len(tokens) // length * length
        if full:
            yield tokens[:full].reshape(-1, length), _number(starts[:full].reshape(-1, length))
            packed = True
        tokens, starts = tokens[full:], starts[full:]
    if len(tokens) and (keep_tail or not packed):
        room = (0, length - len(tokens))
        document = np.pad(_number(starts[None]), ((0, 0), room))
        yield np.pad(tokens, room, constant_values=tokenizer.pad_token_id)[None], document


def _number(starts: np.ndarray) -> np.ndarray:
    """Documents counted from 1 in every row, given where they start; every row starts one."""
    document = starts.astype(np.int32)
    document[:, 0] = 1
    return document.cumsum(1, dtype=np.int32)


def _examples(
    texts: IterableDataset, tokenizer: TextTokenizer, length: int, keep_tail: bool
) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """Single rows under their numbers, as the datasets library wants them."""
    number = 0
    for tokens, document in _rows(texts, tokenizer, length, keep_tail):
        for row in zip(tokens.tolist(), document.tolist(), strict=True):
            yield number, dict(zip(("tokens", "document"), row, strict=True))
            number += 1
