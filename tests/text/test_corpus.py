"""Rows in memory, on disk or streamed have the same documents, each once, and no held-out ones."""

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from diffusify.text import corpus, row_cache
from diffusify.text.corpus import Corpus, open_corpus
from diffusify.text.packing import collate
from diffusify.text.stream import RowStream
from diffusify.text.tokenizer import TextTokenizer
from tests.text.makers import byte_level, sentence_bpe, unigram, word_piece

BYTES = byte_level()
DOCUMENT = 8  # tokens of each text below


def text_of(n: int) -> str:
    return f"x{n:05}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "IN_MEMORY", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for n in range(4):
        texts = [json.dumps({"text": text_of(50 * n + i)}) for i in range(50)]
        (tmp_path / "data" / f"{n}.jsonl").write_text("\n".join([*texts, texts[0], ""]))
    return tmp_path / "data"


def open_rows(source: object, tokenizer: TextTokenizer = BYTES, length: int = DOCUMENT, **options: Any) -> Corpus:
    settings: dict[str, Any] = {"held_out": 5 * DOCUMENT}
    return open_corpus(str(source), tokenizer, length, **(settings | options))


def texts_in(rows: Any) -> list[str]:
    return [BYTES.decode([int(i) for i in row["tokens"]]) for row in rows]


def test_rows_on_disk_equal_those_in_memory_except_for_the_held_out_documents(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = open_rows(source)
    assert not in_memory.note
    monkeypatch.setattr(corpus, "IN_MEMORY", 0)
    disk = open_rows(source)
    texts = [text_of(n) for k in range(4) for n in (*range(50 * k, 50 * k + 50), 50 * k)]
    for opened in (in_memory, disk):
        assert isinstance(opened.rows, Dataset)
        train, held = texts_in(opened.rows), texts_in(opened.held_out)
        assert len(held) == 5 and not set(train) & set(held)
        assert train == [text for text in texts if text not in held]
    assert isinstance(disk.rows, Dataset)
    assert disk.rows[0]["document"].tolist() == [1] * DOCUMENT and disk.rows.cache_files


def test_a_second_run_reuses_the_rows(
    source: Path, on_disk: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_rows(source)
    (folder,) = cache.iterdir()
    assert first.note == f"packed rows written to {folder}"
    monkeypatch.setattr(row_cache, "_write_rows", None)
    second = open_rows(source)
    assert second.note == f"packed rows reused from {folder}"
    assert texts_in(second.rows) == texts_in(first.rows) and texts_in(second.held_out) == texts_in(first.held_out)


def test_whatever_determines_the_rows_changes_the_cache_folder(source: Path, on_disk: None, cache: Path) -> None:
    open_rows(source)
    changes: list[dict[str, Any]] = [{"length": 9}, {"held_out": 20}, {"seed": 1}, {"tokenizer": word_piece()}]
    for change in changes:
        open_rows(source, **change)
    (source / "3.jsonl").write_text((source / "3.jsonl").read_text())  # another modification time
    open_rows(source)
    assert len([*cache.iterdir()]) == 6
    (source / "4.txt").write_text("more")
    assert len([*cache.iterdir()]) == 6 and "written" in open_rows(source).note
    open_rows(source, max_corrupt=0.5)
    assert len([*cache.iterdir()]) == 7


@pytest.mark.parametrize("make", [byte_level, word_piece, unigram, sentence_bpe])
def test_a_fingerprint_depends_on_the_vocabulary_and_not_on_calls(make: Any) -> None:
    tokenizer = make()
    again = replace(tokenizer, tokenizer=copy.deepcopy(tokenizer.tokenizer))
    before = tokenizer.fingerprint
    tokenizer.documents(["the cat", "dog"])
    tokenizer.tokenizer(["the cat", "a"], truncation=True, max_length=4)
    assert tokenizer.fingerprint == before == again.fingerprint
    again.tokenizer.add_tokens(["catdog"])
    assert again.fingerprint != before


def test_an_interrupted_write_leaves_no_folder(
    source: Path, on_disk: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(row_cache, "pack_batches", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_rows(source)
    assert not [*cache.iterdir()]
    assert len(texts_in(open_rows(source).rows)) > 190


def test_other_processes_wait_for_the_first(
    source: Path, on_disk: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "0")
            assert "written" in open_rows(source).note

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(row_cache.time, "sleep", wait)
    assert "reused" in open_rows(source).note and len(waits) == 1


def test_a_single_document_is_cut(tmp_path: Path, on_disk: None) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {n}" for n in range(300)))
    opened = open_rows(path, length=12, held_out=13)
    assert texts_in(opened.held_out)[0] in "paragraph 299"
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": path.read_text()}) + "\n")
    (tmp_path / "c.jsonl").write_text((tmp_path / "b.jsonl").read_text() * 3)
    once, thrice = (open_rows(tmp_path / name, length=12, held_out=13).rows for name in ("b.jsonl", "c.jsonl"))
    assert isinstance(once, Dataset) and isinstance(thrice, Dataset) and abs(len(thrice) - 3 * len(once)) < 3


@pytest.mark.parametrize("tokens", [1, 3 * DOCUMENT - 1, 10**6])
def test_how_much_is_held_out_on_disk(source: Path, on_disk: None, tokens: int) -> None:
    held = texts_in(open_rows(source, held_out=tokens).held_out)
    assert len(held) == {1: 1, 23: 2}.get(tokens, 20)  # at most a tenth of the documents, and at least one row


@pytest.mark.parametrize(("in_memory", "streaming"), [(1 << 20, None), (0, None), (0, True)])
def test_nothing_is_held_out(
    source: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int, streaming: bool | None
) -> None:
    monkeypatch.setattr(corpus, "IN_MEMORY", in_memory)
    for _ in range(2):  # the second time, rows on disk are reused
        opened = open_rows(source, held_out=0, streaming=streaming)
        assert len(opened.held_out) == 0
        if isinstance(opened.rows, RowStream):
            assert not opened.rows.left_out
        else:
            assert set(texts_in(opened.rows)) == {text_of(n) for n in range(200)} and len(opened.rows) == 204


def test_mixtures_keep_their_shares_on_disk(source: Path, tmp_path: Path, on_disk: None) -> None:
    (tmp_path / "b.txt").write_text("yyyyyy")
    train = texts_in(open_rows(f"3*{source},1*{tmp_path}/b.txt", held_out=DOCUMENT).rows)
    assert 0.15 < train.count("yyyyyy") / len(train) < 0.35


def test_corrupt_records_are_reported(source: Path, on_disk: None) -> None:
    with (source / "2.jsonl").open("a") as file:
        file.write("{\n")
    assert open_rows(source).bad_records.corrupt == 1
    again = open_rows(source)
    assert "reused" in again.note and "1 of 205 records cannot be read" in str(again.bad_records)
    with pytest.raises(ValueError, match=r"2.jsonl line 52 is not JSON.*more than max_corrupt=0.001"):
        open_rows(source, max_corrupt=0.001)
    with pytest.raises(ValueError, match="max_corrupt=1.5 must be a share"):
        open_rows(source, max_corrupt=1.5)


@pytest.mark.parametrize("streaming", [None, True])
def test_large_sources_are_streamed(source: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool | None) -> None:
    if streaming is None:
        monkeypatch.setattr(corpus, "STREAMED", 100)
    opened = open_rows(source, streaming=streaming)
    assert isinstance(opened.rows, RowStream) and opened.note == "texts are streamed during training"
    assert texts_in(opened.held_out) == [text_of(n) for n in range(5)] and len(opened.rows.left_out) == 5
    monkeypatch.setattr(corpus, "STREAMED", 100)
    assert isinstance(open_rows(source, streaming=False).rows, Dataset)


def test_gzipped_files_count_with_their_unpacked_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [json.dumps({"text": text_of(n)}) for n in range(200)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    monkeypatch.setattr(corpus, "STREAMED", 2 * (tmp_path / "a.jsonl.gz").stat().st_size)
    assert isinstance(open_rows(tmp_path / "a.jsonl.gz").rows, RowStream)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one document")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(ValueError, match="nothing is left .* this stream of 1 documents"):
        open_rows(tmp_path / "a.txt", streaming=True)
    with pytest.raises(ValueError, match="is on a hub, which is always streamed"):
        open_rows("0.5*hub:some/texts,0.5*builtin:pydoc", streaming=False)
    for streaming, size in ((None, 100), (None, 0), (True, 0)):
        monkeypatch.setattr(corpus, "IN_MEMORY", size)
        with pytest.raises(ValueError, match="empty.txt has no documents"):
            open_rows(tmp_path / "empty.txt", streaming=streaming)
        with pytest.raises(ValueError, match="does not exist; did you mean"):
            open_rows(tmp_path / "a.tx", streaming=streaming)


def test_rows_on_disk_make_batches(source: Path, on_disk: None) -> None:
    rows = open_rows(source).rows
    assert isinstance(rows, Dataset)
    batch = collate([rows[0], rows[7]])
    assert batch["tokens"].dtype == torch.int64 and batch["tokens"].tolist()[1] == rows[7]["tokens"].tolist()
