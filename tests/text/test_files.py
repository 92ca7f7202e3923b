"""Every unreadable record is reported, and no other record is lost with it."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from diffusify.text import files
from diffusify.text.bad_records import BadRecords
from diffusify.text.files import FilePart, split_file, try_texts


def texts_and_errors(path: Path) -> tuple[list[str], list[str]]:
    """The texts of a file, part by part, and the errors of its unreadable records."""
    found = [text for part in split_file(path) for text in try_texts(part)]
    return [t for t in found if isinstance(t, str)], [str(t) for t in found if isinstance(t, ValueError)]


def test_corrupt_lines_are_reported_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}',
        b"{",
        b'{"text": "caf\xe9"}',
        b'{"body": "b"}',
        b'{"text": null}',
        b'{"text": "\\ud800"}',
    ]
    path.write_bytes(b"\n".join([*lines, b"[" * 100_000, b"", b'{"text": "two"}']))
    texts, faults = texts_and_errors(path)
    assert texts == ["one", "two"]
    assert [fault.removeprefix(f"{path} line ")[:22] for fault in faults] == [
        "2 is not JSON: Expecti", "3 is not UTF-8 text (i", "4 has no field text; f", "5: the field text is n",
        "6: the field text has ", "7 is not JSON: maximum",
    ]  # fmt: skip


def test_the_end_of_a_truncated_gzip_file_is_one_corrupt_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": f"{n} {hash(n * 7919)}"}) + "\n" for n in range(3000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    texts, faults = texts_and_errors(path)
    assert len(texts) > 500 and texts[:2] == ["0 0", "1 7919"]
    assert len(faults) == 1 and "a.jsonl.gz is damaged" in faults[0]
    path.write_bytes(whole[:-6] + b"000000")  # a wrong checksum
    texts, faults = texts_and_errors(path)
    assert len(texts) == 3000 and len(faults) == 1


def test_a_damaged_row_group_loses_only_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text {n} {n * 7919}" for n in range(40)]})
    parquet.write_table(table, path, row_group_size=10, write_page_checksum=True, use_dictionary=False)
    chunk = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    at = chunk.data_page_offset + chunk.total_compressed_size * 2 // 3
    raw[at : at + 4] = b"XXXX"
    path.write_bytes(raw)
    texts, faults = texts_and_errors(path)
    assert texts == [f"text {n} {n * 7919}" for n in range(40) if n // 10 != 1]
    assert len(faults) == 10 and "a.parquet row 11 cannot be read" in faults[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"body": "b"}\n{"body": "c"}\n'), ("a.jsonl.gz", b"plain"), ("a.parquet", b"plain")],
)
def test_a_wrong_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.(jsonl line 1 has no field text; fields found: body|.* is damaged)"):
        list(try_texts(FilePart(tmp_path / name)))


def test_a_text_file_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert texts_and_errors(tmp_path / "a.txt") == (
        [],
        [f"{tmp_path}/a.txt is not UTF-8 text (invalid start byte); convert it first"],
    )


@given(st.lists(st.text("ab\u20ac\n", max_size=8), max_size=30), st.integers(1, 60), st.booleans())
@settings(max_examples=60)
def test_parts_together_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, raw: bool
) -> None:
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=raw) + "\n" for text in texts), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART_BYTES", size)
        parts = split_file(path)
        assert len(parts) == max(1, -(-path.stat().st_size // size))
        found = [text for part in parts for text in try_texts(part)]
    assert found == [text for text in texts if text.strip()]


def test_parts_of_a_table_are_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"text {n}" for n in range(35)]}), path, row_group_size=10)
    monkeypatch.setattr(files, "PART_BYTES", path.stat().st_size // 3)
    assert [part[1:] for part in split_file(path)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert texts_and_errors(path) == ([f"text {n}" for n in range(35)], [])


def records(good: int, bad: int) -> dict[str, list]:
    return {"text": ["t"] * good + [None] * bad, "fault": [None] * good + [f"line {n}" for n in range(bad)]}


def test_the_limit_is_a_share() -> None:
    bad_records = BadRecords()
    assert bad_records.filter_batch(records(990, 10), 0.01) == ["t"] * 990
    bad_records.check(0.01)
    assert str(bad_records) == "10 of 1,000 records cannot be read (line 0; line 1; line 2; ...)"
    with pytest.raises(ValueError, match="11 of 1,001 records cannot be read .*more than max_corrupt=0.01"):
        bad_records.filter_batch(records(0, 1), 0.01)
    few = BadRecords()
    assert few.filter_batch(records(3, 1), 0.01) == ["t"] * 3  # too few records to judge by
    with pytest.raises(ValueError, match=r"1 of 4 records cannot be read \(line 0\)"):
        few.check(0.01)
    few.check(0.25)
    with pytest.raises(ValueError, match="max_corrupt=0 "):
        BadRecords().filter_batch(records(5, 1), 0.0)
    assert str(bad_records + few).startswith("12 of 1,005")
