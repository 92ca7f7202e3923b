"""Packed rows have every token of the documents once, in order."""

from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.text import packing
from diffusify.text.packing import collate, pack, pack_examples
from diffusify.text.tokenizer import TextTokenizer
from tests.text.makers import byte_level, word_piece

BYTES, PIECES = byte_level(), word_piece()


def rows_of(dataset: Dataset) -> list[dict[str, list[int]]]:
    return [dict(row) for row in dataset]  # pyright: ignore  (a row is a dict)


TEXTS = st.lists(st.text("the lazy dog<|mask|>\n", max_size=30), min_size=1, max_size=12)


@given(TEXTS, st.integers(2, 40), st.booleans(), st.integers(1, 5), st.sampled_from([BYTES, PIECES]))
@settings(max_examples=60)
def test_every_token_once_in_order(
    texts: list[str], length: int, keep_tail: bool, batch: int, tokenizer: TextTokenizer
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH", batch)
        texts_set = Dataset.from_dict({"text": texts})
        rows = rows_of(pack(texts_set, tokenizer, length, keep_tail=keep_tail))
    documents = [tokenizer.document(text) for text in texts]
    flat = list(chain(*documents))
    assert all(len(row["tokens"]) == len(row["document"]) == length for row in rows)
    packed = [token for row in rows for token, n in zip(row["tokens"], row["document"], strict=True) if n]
    whole = len(flat) // length * length
    assert packed == (flat if keep_tail or not whole else flat[:whole])
    # A document number changes only where a document or a row starts.
    starts = {sum(map(len, documents[:n])) for n in range(len(documents))} | set(range(0, len(flat), length))
    numbers = [[n for n in row["document"] if n] for row in rows]
    found = {r * length + i for r, ns in enumerate(numbers) for i in range(len(ns)) if i == 0 or ns[i] != ns[i - 1]}
    assert found == {start for start in starts if start < len(packed)}
    for row, ns in zip(rows, numbers, strict=True):
        assert ns[0] == 1 and all(b - a in (0, 1) for a, b in zip(ns, ns[1:], strict=False))
        padding = row["tokens"][len(ns) :]
        assert padding == [tokenizer.pad_token_id] * len(padding) and row["document"][len(ns) :] == [0] * len(padding)


def test_a_single_unfilled_row_is_kept() -> None:
    texts = Dataset.from_dict({"text": ["the dog"]})
    (row,) = rows_of(pack(texts, PIECES, 64))
    document = PIECES.document("the dog")
    assert row["tokens"] == document + [PIECES.pad_token_id] * (64 - len(document))


def test_collate_makes_a_batch() -> None:
    rows = pack(Dataset.from_dict({"text": ["the lazy dog"] * 9}), BYTES, 16)
    batch = collate([rows[0], rows[1]])
    assert batch["tokens"].dtype == batch["document"].dtype == torch.int64
    canvas = Canvas.clean(batch["tokens"], batch["document"])
    assert canvas.tokens.shape == (2, 16) and canvas.position_ids[0, 0] == 0
    assert [rows[0]["tokens"], rows[1]["tokens"]] == canvas.tokens.tolist()


def test_errors() -> None:
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        pack(Dataset.from_dict({"text": ["a"]}), BYTES, 1)
    with pytest.raises(ValueError, match="no texts to pack"):
        pack(Dataset.from_dict({"text": []}), BYTES, 8)


def test_the_end_token_is_a_target_and_padding_never_is() -> None:
    tokenizer = byte_level()
    rows = pack(Dataset.from_dict({"text": ["ab", "cd"]}), tokenizer, 16, keep_tail=True)
    batch = collate([rows[0]])
    clean = Canvas.clean(batch["tokens"], batch["document"])
    ends = clean.tokens == tokenizer.end_token_id
    assert clean.editable[ends & clean.real].all() and (ends & clean.editable).sum() >= 2
    assert not clean.editable[~clean.real].any() and (~clean.real).any()


def examples_of(sizes: list[int]) -> Dataset:
    """Examples of these sizes: each with tokens of its own, the second half of them target."""
    tokens = [[100 * n + i for i in range(size)] for n, size in enumerate(sizes, 1)]
    return Dataset.from_dict({"tokens": tokens, "target": [[2 * i >= size for i in range(size)] for size in sizes]})


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50), st.integers(1, 4))
@settings(max_examples=60)
def test_whole_examples_once(sizes: list[int], length: int, open_rows: int) -> None:
    examples = examples_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        packed = rows_of(pack_examples(examples, length, pad_token_id=7))
        assert packed == rows_of(pack_examples(examples, length, pad_token_id=7))
    found = []
    for row in packed:
        assert len(row["tokens"]) == len(row["document"]) == len(row["editable"]) == length
        cells = list(zip(row["tokens"], row["document"], row["editable"], strict=True))
        last = max(row["document"])
        assert row["document"] == sorted(row["document"], key=lambda n: n or last + 1)  # in order, padding last
        assert all(cell == (7, 0, False) for cell in cells if not cell[1])
        for number in range(1, last + 1):
            document = [cell for cell in cells if cell[1] == number]
            found.append({"tokens": [t for t, _, _ in document], "target": [e for _, _, e in document]})
    assert sorted(found, key=lambda example: example["tokens"]) == rows_of(examples)


@pytest.mark.parametrize(("mean", "length"), [(4.5, 512), (5.0, 1024), (3.5, 256)])
def test_rows_are_well_filled(mean: float, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OPEN_ROWS", 4)
    sizes = np.random.default_rng(0).lognormal(mean, 0.7, 2000).astype(int).clip(2, length).tolist()
    packed = pack_examples(examples_of(sizes), length, pad_token_id=0)
    assert sum(sizes) / (len(packed) * length) > 0.96


def test_packed_examples_make_a_batch() -> None:
    packed = pack_examples(examples_of([4, 3, 2, 5]), 8, pad_token_id=0)
    batch = collate([packed[0], packed[1]])
    assert batch["tokens"].dtype == batch["document"].dtype == torch.int64 and batch["editable"].dtype == torch.bool
    assert batch["document"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 0]]
    assert batch["editable"].int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1, 1, 0]]
    assert set(collate([{"tokens": [1], "document": [1]}])) == {"tokens", "document"}


def test_example_errors() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit into length=8"):
        pack_examples(examples_of([3, 9, 2]), 8, pad_token_id=0)
    with pytest.raises(ValueError, match="no examples to pack"):
        pack_examples(Dataset.from_dict({"tokens": [], "target": []}), 8, pad_token_id=0)
