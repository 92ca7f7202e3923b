"""Texts and records are loaded from files, folders, hubs and mixtures."""

import gzip
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from diffusify.text.packing import pack
from diffusify.text.sources import load_records, load_texts, split_off, stream_texts
from tests.text.makers import byte_level

BYTES = byte_level()


def texts_of(dataset: Dataset | IterableDataset) -> list[str]:
    assert dataset.column_names == ["text"]
    return [row["text"] for row in dataset]  # pyright: ignore  (a row is a dict)


def lines(*texts: str) -> str:
    return "".join(json.dumps({"title": "t", "text": text}) + "\n" for text in texts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("caf\u00e9\n\nsecond paragraph\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(lines("one", "two", " ") + "\n" + lines("three"))
    (tmp_path / "empty.md").write_text("\n")
    (tmp_path / "ignored.log").write_text("text\nnot me\n")
    (tmp_path / "b" / "x.MD.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf# packed"))
    parquet.write_table(pa.table({"text": ["four", "five"], "n": [1, 2]}), tmp_path / "b" / "y.parquet")
    (tmp_path / "b" / "z.parquet.gz").write_bytes(gzip.compress((tmp_path / "b" / "y.parquet").read_bytes()))
    return tmp_path


def stream_of(source: object, seed: int = 0) -> list[str]:
    """The texts of a streamed source without corrupt records."""
    records = [dict(record) for record in stream_texts(str(source), seed=seed)]
    assert not any(record.get("fault") for record in records)
    return [record["text"] for record in records]


@pytest.mark.parametrize("streaming", [False, True])
def test_files(folder: Path, streaming: bool) -> None:
    def load(name: str) -> list[str]:
        return stream_of(folder / name) if streaming else texts_of(load_texts(str(folder / name)))

    assert load("c.txt") == ["caf\u00e9\n\nsecond paragraph\n"]
    assert load("a.jsonl") == ["one", "two", "three"]
    assert load("b/x.MD.gz") == ["# packed"]
    assert load("b/y.parquet") == load("b/z.parquet.gz") == ["four", "five"]
    assert load(".") == ["one", "two", "three", "# packed", "four", "five", "four", "five", load("c.txt")[0]]
    with pytest.raises(ValueError, match="empty.md has no documents"):
        load_texts(str(folder / "empty.md"))
    assert stream_of(folder / "empty.md") == []


def test_an_existing_path_is_a_path_whatever_its_name(folder: Path) -> None:
    for name in ("1*a.txt,2*b.txt", "builtin:pydoc.txt"):
        (folder / name).write_text(name)
        assert texts_of(load_texts(str(folder / name))) == [name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"text": "a"}\n{"body": "b", "title": "t"}\n',
            "line 2 has no field text; fields found: body, title",
        ),
        ("x.jsonl", b'["a"]\n', "line 1 has no field text; fields found: none"),
        ("x.jsonl", b'{"text": 3}\n', "line 1: the field text is not a string but 3"),
        ("x.jsonl", b"{\n", "line 1 is not JSON"),
        ("x.txt", b"\xff\xfe", "x.txt is not UTF-8 text"),
        ("x.txt.gz", b"plain", "x.txt.gz is damaged"),
        ("x.parquet", b"plain", "x.parquet is damaged"),
        ("x.log", b"text\na\n", "unknown file type; known: .txt, .md, .jsonl, .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / name))


def test_parquet_without_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["four"]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="y.parquet has no field text; fields found: body"):
        load_texts(str(tmp_path / "y.parquet"))


def test_missing_sources(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a.jsonlx does not exist; did you mean .*/a.jsonl\? Otherwise give a file"):
        load_texts(str(folder / "a.jsonlx"))
    with pytest.raises(ValueError, match="does not exist; give a file, a folder, hub:NAME or builtin:pydoc"):
        load_texts(str(folder / "nowhere" / "a.txt"))
    with pytest.raises(ValueError, match="a weight for each source"):
        load_texts(f"{folder}/a.jsonl,{folder}/c.txt")
    with pytest.raises(ValueError, match="does not exist"):
        load_texts("")
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match="none has no file of a known type"):
        load_texts(str(folder / "none"))


def test_builtin() -> None:
    texts = texts_of(load_texts("builtin:pydoc"))
    assert stream_of("builtin:pydoc") == texts
    assert len(texts) > 50 and any('The "with" statement' in text for text in texts)
    with pytest.raises(ValueError, match='no built-in data "pydocs"; did you mean "pydoc"'):
        load_texts("builtin:pydocs")


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("hub:org/name", ("org/name", None, "train")),
        ("hub:name@test", ("name", None, "test")),
        ("hub:org/name:a-config@validation", ("org/name", "a-config", "validation")),
        ("hub:org/name:a-config@test#text", ("org/name", "a-config", "test")),
    ],
)
def test_hub(source: str, arguments: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> IterableDataset:
        calls.append((path, name, split, streaming))
        rows = Dataset.from_dict({"n": [1, 2, 3], "text": ["a", None, "b"]})
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of(load_texts(source)) == ["a", "b"]
    assert calls == [(*arguments, True)]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> IterableDataset:
        return Dataset.from_dict({"body": ["a"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="hub:org/name has no field text; fields found: body"):
        load_texts("hub:org/name")
    assert texts_of(load_texts("hub:org/name#body")) == ["a"]
    with pytest.raises(ValueError, match="hub:org/name#code has no field code; fields found: body"):
        load_texts("hub:org/name#code")
    with pytest.raises(ValueError, match="write hub:NAME"):
        load_texts("hub:")

    def run_script(*args: Any, **kwargs: Any) -> IterableDataset:
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", run_script)
    with pytest.raises(ValueError, match=r"cannot be loaded \(Dataset scripts .* x.py\); download its files"):
        load_texts("hub:org/name")


def test_bytes_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ["caf\u00e9".encode(), b"b"]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": values}).to_iterable_dataset()
    )
    assert texts_of(load_texts("hub:org/name")) == ["caf\u00e9", "b"]
    values.append(b"\xff")
    with pytest.raises(ValueError, match="hub:org/name: the field that holds the text has bytes that are not UTF-8"):
        texts_of(load_texts("hub:org/name"))


def test_compressed_files_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself needs the package zstandard for them."""
    path, load_dataset = tmp_path / "a.jsonl.zst", datasets.load_dataset
    path.write_bytes(pa.Codec("zstd").compress(lines("one", "two").encode(), asbytes=True))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: load_dataset("json", data_files=str(path), split="train", streaming=True),
    )
    assert texts_of(load_texts("hub:org/name")) == ["one", "two"]


@pytest.mark.parametrize("load", [lambda source, seed: texts_of(load_texts(source, seed=seed)), stream_of])
def test_mixture(tmp_path: Path, load: Callable[[str, int], list[str]]) -> None:
    many = [f"a{n}" for n in range(200)]
    (tmp_path / "a,1.jsonl").write_text(lines(*many))
    (tmp_path / "b.txt").write_text("b")
    source = f"3*{tmp_path}/a,1.jsonl, 1.0*{tmp_path}/b.txt"
    texts = load(source, 1)
    assert [text for text in texts if text != "b"][:200] == many  # all of them, in order
    assert 0.15 < texts.count("b") / len(texts) < 0.35
    assert texts == load(source, 1) != load(source, 2)


def test_mixture_of_files_and_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": ["hub"] * 5})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    (tmp_path / "b.txt").write_text("b")
    mixture = load_texts(f"0.5*{tmp_path}/b.txt,0.5*hub:org/name")
    assert isinstance(mixture, IterableDataset) and set(texts_of(mixture)) == {"hub", "b"}
    assert set(stream_of(f"0.5*{tmp_path}/b.txt,0.5*hub:org/name")) == {"hub", "b"}


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "lots"])
def test_bad_weights(tmp_path: Path, weight: str) -> None:
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=f"weight {weight} of .*b.txt must be a number above 0"):
        load_texts(f"1*{tmp_path}/b.txt,{weight}*{tmp_path}/b.txt")


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_split_off(tokens: int) -> None:
    texts = [f"document {n} " * 3 for n in range(100)]
    dataset = Dataset.from_dict({"text": texts})
    train, held = split_off(dataset, tokens, BYTES, seed=3)
    kept, out = texts_of(train), texts_of(held)
    assert sorted(kept + out) == sorted(texts) and kept == [text for text in texts if text not in out]
    assert 1 <= len(out) <= 10
    sizes = [len(BYTES.document(text)) for text in out]
    assert len(out) == 10 or sum(sizes) >= tokens
    assert sum(sizes[:-1]) < tokens
    assert texts_of(split_off(dataset, tokens, BYTES, seed=3)[1]) == out
    assert any(texts_of(split_off(dataset, tokens, BYTES, seed=seed)[1]) != out for seed in range(9))


def test_split_off_takes_all_copies() -> None:
    dataset = Dataset.from_dict({"text": ["a", "b"] * 20})
    train, held = split_off(dataset, 10**6, BYTES)
    assert {*texts_of(train), *texts_of(held)} == {"a", "b"} and not {*texts_of(train)} & {*texts_of(held)}
    dataset = Dataset.from_dict({"text": ["one two three"] * 3})
    train, held = split_off(dataset, 10**6, BYTES)
    assert texts_of(train) == ["one two "] * 3 and texts_of(held) == ["three"]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("\n\n".join(f"paragraph {n}" for n in range(30)), "paragraph 29"),
        ("\n\n".join(["long words\nand lines " * 30] * 2), "and lines"),
        ("word " * 10 + "last", "last"),
        ("a verylongword" + "x" * 60, "verylongword" + "x" * 60),
        ("x" * 60 + " b", "b"),
    ],
)
def test_a_single_document_is_cut(text: str, held: str) -> None:
    train, out = split_off(Dataset.from_dict({"text": [text]}), 10**6, BYTES)
    (kept,), (end,) = texts_of(train), texts_of(out)
    assert kept + end == text.strip() and kept.strip()
    assert end.endswith(held) and len(end) <= max(0.2 * len(text), len(held))


def test_no_more_of_a_single_document_is_held_out_than_requested() -> None:
    text = "\n\n".join(f"paragraph {n}" for n in range(300))
    _, held = split_off(Dataset.from_dict({"text": [text]}), 5, BYTES)
    assert texts_of(held) == ["paragraph 299"]


def test_split_off_errors() -> None:
    with pytest.raises(ValueError, match="no documents"):
        split_off(Dataset.from_dict({"text": []}), 5, BYTES)
    with pytest.raises(ValueError, match="single word 'word', .* held_out=0"):
        split_off(Dataset.from_dict({"text": ["word"]}), 5, BYTES)


def test_no_cache_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    cache = folder / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    texts = load_texts(str(folder))
    assert isinstance(texts, Dataset) and stream_of(folder)
    train, held = split_off(texts, 3, BYTES)
    assert list(pack(train, BYTES, 8)) and list(pack(held, BYTES, 8)) and not train.cache_files
    assert not cache.exists()
    assert capfd.readouterr() == ("", "")


PAIR = {"de": "Hund", "en": "dog"}
CHAT = {"messages": [{"role": "user", "content": "caf\u00e9"}], "n": 1, "tags": None}


def records_of(source: object, **settings: Any) -> list[Any]:
    loaded = load_records(str(source), **settings)
    assert loaded.column_names == ["record", "fault"] and not any(loaded["fault"])
    return [json.loads(record) for record in loaded["record"]]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(CHAT, ensure_ascii=False)}\n", "utf-8")
    (tmp_path / "b" / "list.json.gz").write_bytes(gzip.compress(json.dumps([CHAT, PAIR], indent=1).encode()))
    (tmp_path / "b" / "lines.json").write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n")
    table = pa.table({"messages": [CHAT["messages"], None], "day": [date(2020, 1, 2), None]})
    parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "ignored.txt").write_text("text")
    return tmp_path


def test_records(records: Path) -> None:
    rows = [{"messages": CHAT["messages"], "day": "2020-01-02"}, {"messages": None, "day": None}]
    assert records_of(records / "a.jsonl") == [PAIR, CHAT]
    assert records_of(records / "b" / "list.json.gz") == [CHAT, PAIR]
    assert records_of(records / "c.parquet") == rows
    assert records_of(records) == [PAIR, CHAT, PAIR, PAIR, CHAT, PAIR, *rows]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=4))
@settings(max_examples=40)
def test_records_of_any_structure_survive(given_records: list[dict[str, Any]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in given_records))
        assert records_of(path) == given_records
        path = path.rename(Path(folder) / "x.json")
        path.write_text(json.dumps(given_records))
        assert records_of(path) == given_records


def test_records_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Dataset:
        calls.append((path, name, split, streaming))
        return Dataset.from_list([CHAT, CHAT])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert records_of("hub:org/name:main@test") == [CHAT, CHAT]
    assert calls == [("org/name", "main", "test", False)]


def test_records_of_a_mixture(tmp_path: Path) -> None:
    many = [{"n": n} for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in many))
    (tmp_path / "b.json").write_text(json.dumps([PAIR]))
    source = f"0.75*{tmp_path}/a.jsonl,0.25*{tmp_path}/b.json"
    sampled = records_of(source, seed=1)
    assert [record for record in sampled if record != PAIR][:200] == many
    assert 0.15 < sampled.count(PAIR) / len(sampled) < 0.35
    assert sampled == records_of(source, seed=1) != records_of(source, seed=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "[1]\n", r'x.jsonl line 1 is not a record but \[1\]; write {"name"'),
        ("x.json", '["a"]', 'x.json record 1 is not a record but "a"'),
        ("x.json", "[{},", "x.json is not JSON"),
        ("x.json", '{"a":\n1}', "x.json line 1 is not JSON"),
        ("x.json", "[]", "x.json has no records"),
        ("x.jsonl", "\n", "x.jsonl has no records"),
        ("x.txt", "text", "unknown file type; known: .jsonl, .json, .parquet"),
    ],
)
def test_records_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(tmp_path / name))


def test_a_record_that_cannot_be_read_does_not_lose_the_others(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n[1]\n{\n{"n": 2}\n')
    loaded = load_records(str(tmp_path / "x.jsonl"))
    assert loaded["record"][:] == ['{"n": 1}', None, None, '{"n": 2}']
    faults = loaded["fault"][:]
    assert faults[0] is None and "line 2 is not a record but [1]" in faults[1] and "line 3 is not JSON" in faults[2]


def test_bytes_that_are_no_text_are_missing(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [b"caf\xc3\xa9", b"\xff"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert records_of(tmp_path / "a.parquet") == [{"text": "caf\u00e9", "n": 1}, {"text": None, "n": 2}]
    streamed = [dict(record) for record in stream_texts(str(tmp_path / "a.parquet"))]
    assert streamed[0]["text"] == "caf\u00e9" and "not a string but bytes that are not UTF-8" in streamed[1]["fault"]


def test_missing_records(records: Path) -> None:
    with pytest.raises(
        ValueError, match=r"does not exist; did you mean .*/a.jsonl\? Otherwise give a file, a folder or hub:"
    ):
        load_records(str(records / "a.jsonlx"))
    with pytest.raises(ValueError, match="builtin:pydoc does not exist"):
        load_records("builtin:pydoc")
    with pytest.raises(ValueError, match="weight 0 of"):
        load_records(f"1*{records}/a.jsonl,0*{records}/a.jsonl")
