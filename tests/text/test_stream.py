"""Every text is read once an epoch by one reader, and a stream resumes exactly wherever it was stopped."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from diffusify.text import files, stream
from diffusify.text.sources import stream_texts
from diffusify.text.stream import RowStream
from tests.text.makers import byte_level

BYTES = byte_level()
DOCUMENT = 8  # tokens of each text below, its start and end token included


def text_of(kind: str, n: int) -> str:
    return f"{kind}{n:05}"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BLOCK": 20 * DOCUMENT, "BATCH": 3, "SHARDS": 2}.items():
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(files, "PART_BYTES", 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 90 texts, a table of 21, and one file with every tenth record corrupt."""
    path = tmp_path_factory.mktemp("stream")
    (path / "many").mkdir()
    for n in range(9):
        texts = [json.dumps({"text": text_of("a", 10 * n + i)}) for i in range(10)]
        (path / "many" / f"{n}.jsonl").write_text("\n".join(texts) + "\n")
    (path / "one.jsonl").write_text("".join(json.dumps({"text": text_of("b", n)}) + "\n" for n in range(40)))
    parquet.write_table(pa.table({"text": [text_of("c", n) for n in range(21)]}), path / "c.parquet", row_group_size=5)
    bad = [json.dumps({"text": text_of("d", n)}) if n % 10 else "{" for n in range(40)]
    (path / "bad.jsonl").write_text("\n".join(bad) + "\n")
    return path


def rows_of(reader: Any, count: int) -> list[list[int]]:
    return [row["tokens"].tolist() for row, _ in islice(reader, count)]


def texts_in(rows: list[list[int]]) -> list[str]:
    """The texts of rows that hold one document each."""
    assert all(len(row) == DOCUMENT for row in rows)
    return [BYTES.decode(row) for row in rows]


Open = Callable[[Path], IterableDataset]
SOURCES: dict[str, Open] = {
    "folder": lambda path: stream_texts(str(path / "many")),
    "parts": lambda path: stream_texts(str(path / "one.jsonl")),
    "table": lambda path: stream_texts(str(path / "c.parquet")),
    "mixture": lambda path: stream_texts(f"0.7*{path}/many,0.3*{path}/one.jsonl", seed=3),
    "hub": lambda path: hub(path),
}


def hub(path: Path) -> IterableDataset:
    loaded = datasets.load_dataset("parquet", data_files=[str(path / "c.parquet")], split="train", streaming=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *args, **kwargs: loaded)
        return stream_texts("hub:some/texts")


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
@pytest.mark.parametrize(("source", "size"), [("folder", 90), ("parts", 40), ("table", 21), ("hub", 21)])
def test_every_text_once_an_epoch_by_one_reader(folder: Path, source: str, size: int, readers: int) -> None:
    rows = RowStream(SOURCES[source](folder), BYTES, DOCUMENT, seed=5)
    first, second = Counter(), Counter()
    for reader in range(readers):
        epochs: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
        for row, state in rows.read(reader, readers):
            if state["epoch"] > 2:
                break
            epochs[state["epoch"]].append(row["tokens"].tolist())
        first.update(texts_in(epochs[0]))
        second.update(texts_in(epochs[1]))
        assert len(epochs[0]) < 5 or len({str(rows) for rows in epochs.values()}) == 3  # every epoch has its own order
    assert len(first) == size and set(first.values()) == {1} and first == second


@pytest.mark.parametrize("source", SOURCES)
@given(st.integers(0, 80), st.integers(0, 2), st.integers(0, 9), st.sampled_from([5, 8, 13]))
@settings(max_examples=8)
def test_it_resumes_anywhere(folder: Path, source: str, stop: int, reader: int, seed: int, length: int) -> None:
    rows = RowStream(SOURCES[source](folder), BYTES, length, seed, frozenset([text_of("a", 7), text_of("c", 1)]))
    whole = list(islice(rows.read(reader, 3), stop + 12))
    state = json.loads(json.dumps(whole[stop][1]))
    again = RowStream(SOURCES[source](folder), BYTES, length, seed, frozenset([text_of("a", 7), text_of("c", 1)]))
    assert rows_of(again.read(reader, 3, state), 11) == [row["tokens"].tolist() for row, _ in whole[stop + 1 :]]


def test_resuming_tokenizes_only_one_block_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RowStream(stream_texts(str(folder / "many")), BYTES, DOCUMENT)
    *_, (_, state) = islice(rows.read(), 85)
    read = []
    fill_rows = stream.fill_rows
    monkeypatch.setattr(
        stream, "fill_rows", lambda leftover, texts, *args: (read.extend(texts), fill_rows(leftover, texts, *args))[1]
    )
    next(rows.read(state=state))
    assert len(read) <= 24


def test_the_seed_decides_the_order(folder: Path) -> None:
    def order(seed: int) -> list[str]:
        return texts_in(rows_of(RowStream(SOURCES["folder"](folder), BYTES, DOCUMENT, seed).read(), 90))

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2)) == [text_of("a", n) for n in range(90)]


def test_texts_left_out_are_never_used(folder: Path) -> None:
    held = frozenset(text_of("b", n) for n in range(0, 40, 3))
    texts = texts_in(rows_of(RowStream(SOURCES["parts"](folder), BYTES, DOCUMENT, left_out=held).read(), 100))
    assert not held & set(texts) and len(set(texts)) == 40 - len(held)


@pytest.mark.parametrize("stop", [0, 37, 400])
def test_mixture_weights_hold_also_after_resuming(folder: Path, stop: int) -> None:
    rows = RowStream(stream_texts(f"3*{folder}/many,1*{folder}/one.jsonl", seed=1), BYTES, DOCUMENT)
    state = None if stop == 0 else list(islice(rows.read(state=None), stop))[-1][1]
    texts = texts_in(rows_of(rows.read(state=state), 1200))
    assert 0.2 < sum(text[0] == "b" for text in texts) / len(texts) < 0.3


def test_corrupt_records_are_counted_across_a_resume(folder: Path) -> None:
    rows = RowStream(stream_texts(str(folder / "bad.jsonl")), BYTES, DOCUMENT, max_corrupt=0.2)
    whole = [state["read"] for _, state in islice(rows.read(), 100)]
    *_, (_, state) = islice(rows.read(), 50)
    assert [state["read"] for _, state in islice(rows.read(state=state), 50)] == whole[50:]
    assert (
        whole[-1]["corrupt"] == whole[-1]["records"] // 10 > 4 == whole[30]["corrupt"] and len(whole[-1]["first"]) == 3
    )
    with pytest.raises(ValueError, match="4 of 40 records cannot be read .*bad.jsonl line"):
        list(islice(RowStream(rows.texts, BYTES, DOCUMENT, max_corrupt=0.05).read(), 100))


def test_a_reader_with_nothing_to_read_is_an_error(folder: Path) -> None:
    rows = RowStream(SOURCES["table"](folder), BYTES, DOCUMENT)
    with pytest.raises(ValueError, match="reader 30 of 30 has nothing to read; train with fewer processes"):
        next(rows.read(29, 30))
