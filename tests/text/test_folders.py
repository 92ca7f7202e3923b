"""Data files as programs leave them: which files of a folder are data, and every type that is read."""

import bz2
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from pyarrow import parquet

from diffusify.text.data_preview import HUB_RECORDS, preview_data
from diffusify.text.sources import load_records, load_texts

LINE = '{"text": "one"}\n'


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def texts(source: object) -> list[str]:
    return [row["text"] for row in load_texts(str(source))]  # pyright: ignore  (a row is a dict)


def test_hidden_and_companion_files_are_not_data(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train.jsonl").write_text(LINE)
    (tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl").write_text(LINE)
    (tmp_path / "._train.jsonl").write_bytes(b"\x00\x05\x16\x07\xff")
    assert texts(tmp_path) == ["one"] and len(load_records(str(tmp_path))) == 1


@pytest.mark.parametrize(("suffix", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_compressed_files(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    packed = compress(LINE.encode())
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    assert texts(tmp_path / f"a.jsonl{suffix}") == ["one"]


def test_tables_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id;text\n1;"one;\ntwo"\n')
    (tmp_path / "a.tsv").write_text("text\tid\none\t1\n")
    assert texts(tmp_path / "a.csv") == ["one;\ntwo"] and texts(tmp_path / "a.tsv") == ["one"]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["one", "two"]


def test_strings_written_as_bytes(tmp_path: Path) -> None:
    message = pa.array([[{"role": b"user", "content": "Sch\u00f6n".encode()}]])
    notes = pa.array([[("in", "Sch\u00f6n".encode())]], pa.map_(pa.string(), pa.binary()))
    table = pa.table({"text": pa.array(["Sch\u00f6n".encode()]), "messages": message, "notes": notes})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["Sch\u00f6n"]
    record = json.loads(load_records(str(tmp_path / "a.parquet"))["record"][0])
    assert record["messages"] == [{"role": "user", "content": "Sch\u00f6n"}]
    assert record["notes"] == [["in", "Sch\u00f6n"]]


def test_a_field_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one"}\n')
    assert texts(f"{path}#content") == ["one"]
    with pytest.raises(ValueError, match="no field text; fields found: content; .*SOURCE#FIELD"):
        load_texts(str(path))
    path.rename(tmp_path / "a#b.jsonl")
    assert texts(f"{tmp_path}/a#b.jsonl#content") == ["one"]


def test_lines_that_end_in_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r{"text": "two"}\r')
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]


def test_chats_as_top_level_lists(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    (tmp_path / "lines.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp_path / "all.json").write_text(json.dumps([chat]))
    for name in ("lines.jsonl", "all.json"):
        assert json.loads(load_records(str(tmp_path / name))["record"][0]) == {"messages": chat}


def test_previews(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "fox", "answer": "dog"}\n{"x": 1}\n')
    preview = preview_data(str(path), each_turn=False, length=100)
    assert (preview.form, preview.records) == ("pairs", 2)
    assert preview.first == [("user: fox\n", False), ("assistant: dog\n", True)]
    assert "1 of 2 records" in preview.notes[0] and "record 2: fields x are neither" in preview.notes[0]
    with pytest.raises(ValueError, match="is not chat but pairs"):
        preview_data(str(path), "chat", each_turn=False, length=100)
    path.write_text(LINE)
    assert preview_data(str(path), each_turn=False, length=100).first == [("one", True)]


def test_a_preview_counts_files_that_are_not_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    assert preview_data(str(tmp_path), each_turn=False, length=100).notes == []
    for name in (".hidden.jsonl", "package.json"):
        (tmp_path / name).write_text("{}")
    preview = preview_data(str(tmp_path), each_turn=False, length=100)
    assert preview.notes == ["2 other files of the folder are not data, such as .hidden.jsonl"]


@pytest.mark.parametrize("record", [{"text": "one"}, {"question": "fox", "answer": "dog"}])
def test_a_preview_does_not_read_all_of_a_hub(monkeypatch: pytest.MonkeyPatch, record: dict[str, str]) -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield record

    def load_dataset(*_: object, streaming: bool, **__: object) -> IterableDataset:
        assert streaming
        return IterableDataset(ExamplesIterable(lambda: enumerate(endless()), {}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    preview = preview_data("hub:org/name", each_turn=False, length=100)
    assert preview.form == ("text" if "text" in record else "pairs") and preview.records == HUB_RECORDS
    assert preview.notes == ["only the first 1,000 records of a hub are read"]
