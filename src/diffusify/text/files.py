"""What stands in files: texts, or records of named fields."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid, parquet

TEXTS = (".txt", ".md", ".jsonl", ".parquet")  # kinds of files that hold texts; each may be gzipped
RECORDS = (".jsonl", ".json", ".parquet")  # and of those that hold records


def find_files(path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """The files to read: the one, or all of the known kinds in a folder."""
    if path.is_file():
        if _kind(path) not in kinds:
            raise ValueError(f"data source {path} is of an unknown kind; known: {', '.join(kinds)}, each also as .gz")
        return [path]
    paths = sorted(p for p in path.rglob("*") if _kind(p) in kinds and p.is_file())
    if not paths:
        raise ValueError(f"folder {path} has no file of a known kind: {', '.join(kinds)}, each also as .gz")
    return paths


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file, blank ones left out: the whole of it, or the field `text` of each record."""
    with _named(path):
        for text in _whole(path) if _kind(path) in (".txt", ".md") else _field_text(path):
            if text.strip():
                yield text


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file: JSON objects by line, a JSON list of them, or the rows of a table."""
    with _named(path):
        for where, record in _records(path):
            if not isinstance(record, dict):
                raise ValueError(f'{where} is no record but {json.dumps(record)[:40]}; write {{"name": "value", ...}}')
            yield record


def no_text(where: str, fields: list[str]) -> str:
    """What to say of records without texts."""
    return f"{where} has no field text; fields found: {', '.join(map(str, fields)) or 'none'}; rename the one you want"


def _kind(path: Path) -> str:
    """The suffix that says how to read a file: `.jsonl` for a.jsonl.gz."""
    return (path.with_suffix("") if _gzipped(path) else path).suffix.lower()


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors that come up while a file is read name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, ArrowInvalid) as error:
        raise ValueError(f"{path} is damaged or not what its name says: {error}") from error


def _open(path: Path) -> io.TextIOWrapper:
    if _gzipped(path):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _whole(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield file.read()


def _field_text(path: Path) -> Iterator[str]:
    for where, record in _records(path, only="text"):
        if not isinstance(record, dict) or "text" not in record:
            raise ValueError(no_text(where, list(record) if isinstance(record, dict) else []))
        if not isinstance(record["text"], str):
            raise ValueError(f"{where}: the field text is no string but {str(record['text'])[:40]}")
        yield record["text"]


def _records(path: Path, only: str | None = None) -> Iterator[tuple[str, Any]]:
    """Whatever stands where a record should, and where that is. Of a table `only` one field may be read."""
    if _kind(path) == ".parquet":
        return _rows(path, only)
    return _list(path) if _kind(path) == ".json" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", _parse(line, f"{path} line {number}")


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON list; many a `.json` holds an object a line instead."""
    with _open(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _lines(path)
        return
    for number, record in enumerate(_parse(text, str(path)), 1):
        yield f"{path} record {number}", record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _rows(path: Path, only: str | None) -> Iterator[tuple[str, Any]]:
    # Parquet is read from its end, where a gzipped file cannot seek.
    with parquet.ParquetFile(io.BytesIO(gzip.decompress(path.read_bytes())) if _gzipped(path) else path) as table:
        names = table.schema_arrow.names
        if only and only not in names:
            raise ValueError(no_text(str(path), names))
        for batch in table.iter_batches(batch_size=1024, columns=[only] if only else None):
            for record in batch.to_pylist():
                yield str(path), record
