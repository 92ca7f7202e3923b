"""Rows in memory, on disk or from a stream: the same documents, each once, and none of those held out."""

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
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def opened(source: object, tokenizer: TextTokenizer = BYTES, length: int = DOCUMENT, **more: Any) -> Corpus:
    settings: dict[str, Any] = {"held_out": 5 * DOCUMENT}
    return open_corpus(str(source), tokenizer, length, **(settings | more))


def texts_in(rows: Any) -> list[str]:
    return [BYTES.decode([int(i) for i in row["tokens"]]) for row in rows]


def test_on_disk_as_in_memory_but_for_what_is_held_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = opened(source)
    assert not in_memory.note
    monkeypatch.setattr(corpus, "IN_MEMORY", 0)
    disk = opened(source)
    texts = [text_of(n) for k in range(4) for n in (*range(50 * k, 50 * k + 50), 50 * k)]
    for made in (in_memory, disk):
        assert isinstance(made.rows, Dataset)
        train, held = texts_in(made.rows), texts_in(made.held_out)
        assert len(held) == 5 and not set(train) & set(held)
        assert train == [text for text in texts if text not in held]
    assert isinstance(disk.rows, Dataset)
    assert disk.rows[0]["document"].tolist() == [1] * DOCUMENT and disk.rows.cache_files


def test_a_second_run_finds_the_rows(source: Path, on_disk: None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(source)
    (folder,) = place.iterdir()
    assert first.note == f"packed rows made, and kept for the next run, in {folder}"
    monkeypatch.setattr(row_cache, "_make", None)
    second = opened(source)
    assert second.note == f"packed rows found in {folder}"
    assert texts_in(second.rows) == texts_in(first.rows) and texts_in(second.held_out) == texts_in(first.held_out)


def test_whatever_decides_the_rows_makes_others(source: Path, on_disk: None, place: Path) -> None:
    opened(source)
    others: list[dict[str, Any]] = [{"length": 9}, {"held_out": 20}, {"seed": 1}, {"tokenizer": word_piece()}]
    for change in others:
        opened(source, **change)
    (source / "3.jsonl").write_text((source / "3.jsonl").read_text())  # another time
    opened(source)
    assert len([*place.iterdir()]) == 6
    (source / "4.txt").write_text("more")
    assert len([*place.iterdir()]) == 6 and "made" in opened(source).note
    opened(source, max_corrupt=0.5)
    assert len([*place.iterdir()]) == 7


@pytest.mark.parametrize("make", [byte_level, word_piece, unigram, sentence_bpe])
def test_a_tokenizer_keeps_its_fingerprint(make: Any) -> None:
    tokenizer = make()
    again = replace(tokenizer, tokenizer=copy.deepcopy(tokenizer.tokenizer))
    before = tokenizer.fingerprint
    tokenizer.documents(["the cat", "dog"])
    tokenizer.tokenizer(["the cat", "a"], truncation=True, max_length=4)
    assert tokenizer.fingerprint == before == again.fingerprint
    again.tokenizer.add_tokens(["catdog"])
    assert again.fingerprint != before


def test_a_making_that_dies_leaves_nothing(
    source: Path, on_disk: None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(row_cache, "pack_batches", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(source)
    assert not [*place.iterdir()]
    assert len(texts_in(opened(source).rows)) > 190


def test_other_processes_wait_for_the_first(
    source: Path, on_disk: None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "0")
            assert "made" in opened(source).note

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(row_cache.time, "sleep", wait)
    assert "found" in opened(source).note and len(waits) == 1


def test_a_lone_document_is_cut(tmp_path: Path, on_disk: None) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {n}" for n in range(300)))
    made = opened(path, length=12, held_out=13)
    assert texts_in(made.held_out)[0] in "paragraph 299"
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": path.read_text()}) + "\n")
    (tmp_path / "c.jsonl").write_text((tmp_path / "b.jsonl").read_text() * 3)
    once, thrice = (opened(tmp_path / name, length=12, held_out=13).rows for name in ("b.jsonl", "c.jsonl"))
    assert isinstance(once, Dataset) and isinstance(thrice, Dataset) and abs(len(thrice) - 3 * len(once)) < 3


@pytest.mark.parametrize("tokens", [1, 3 * DOCUMENT - 1, 10**6])
def test_how_much_is_held_out_on_disk(source: Path, on_disk: None, tokens: int) -> None:
    held = texts_in(opened(source, held_out=tokens).held_out)
    assert len(held) == {1: 1, 23: 2}.get(tokens, 20)  # at most a tenth; of rows no more than were asked for, but one


def test_mixtures_hold_their_shares_on_disk(source: Path, tmp_path: Path, on_disk: None) -> None:
    (tmp_path / "b.txt").write_text("yyyyyy")
    train = texts_in(opened(f"3*{source},1*{tmp_path}/b.txt", held_out=DOCUMENT).rows)
    assert 0.15 < train.count("yyyyyy") / len(train) < 0.35


def test_corrupt_records_are_told(source: Path, on_disk: None) -> None:
    with (source / "2.jsonl").open("a") as file:
        file.write("{\n")
    assert opened(source).tally.corrupt == 1
    found = opened(source)
    assert "found" in found.note and "1 of 205 records cannot be read" in str(found.tally)
    with pytest.raises(ValueError, match=r"2.jsonl line 52 is not JSON.*more than max_corrupt=0.001"):
        opened(source, max_corrupt=0.001)
    with pytest.raises(ValueError, match="max_corrupt=1.5 is a share"):
        opened(source, max_corrupt=1.5)


@pytest.mark.parametrize("streaming", [None, True])
def test_what_is_streamed(source: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool | None) -> None:
    if streaming is None:
        monkeypatch.setattr(corpus, "STREAMED", 100)
    made = opened(source, streaming=streaming)
    assert isinstance(made.rows, RowStream) and made.note == "texts are read while they are trained on"
    assert texts_in(made.held_out) == [text_of(n) for n in range(5)] and len(made.rows.left_out) == 5
    monkeypatch.setattr(corpus, "STREAMED", 100)
    assert isinstance(opened(source, streaming=False).rows, Dataset)


def test_gzipped_files_count_for_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [json.dumps({"text": text_of(n)}) for n in range(200)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    monkeypatch.setattr(corpus, "STREAMED", 2 * (tmp_path / "a.jsonl.gz").stat().st_size)
    assert isinstance(opened(tmp_path / "a.jsonl.gz").rows, RowStream)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one document")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(ValueError, match="nothing is left .* this stream of 1 documents"):
        opened(tmp_path / "a.txt", streaming=True)
    with pytest.raises(ValueError, match="held_out=0 must be at least 1"):
        opened(tmp_path / "a.txt", held_out=0)
    with pytest.raises(ValueError, match="is on a hub, which is always streamed"):
        opened("0.5*hub:some/texts,0.5*builtin:pydoc", streaming=False)
    for streaming, size in ((None, 100), (None, 0), (True, 0)):
        monkeypatch.setattr(corpus, "IN_MEMORY", size)
        with pytest.raises(ValueError, match="empty.txt has no documents"):
            opened(tmp_path / "empty.txt", streaming=streaming)
        with pytest.raises(ValueError, match="does not exist; did you mean"):
            opened(tmp_path / "a.tx", streaming=streaming)


def test_rows_on_disk_make_batches(source: Path, on_disk: None) -> None:
    rows = opened(source).rows
    assert isinstance(rows, Dataset)
    batch = collate([rows[0], rows[7]])
    assert batch["tokens"].dtype == torch.int64 and batch["tokens"].tolist()[1] == rows[7]["tokens"].tolist()
