"""Reading data files: texts, or records of named fields."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import splitext
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import ArrowException, parquet

PART_BYTES = 64 << 20  # size of the parts of a file that can be read from the middle
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")  # files of texts; each may be gzipped
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")  # files of records; each may be gzipped


class FilePart(NamedTuple):
    """A file or a part of it: the lines that begin in a range of bytes, or a range of row groups."""

    path: Path
    start: int = 0
    stop: int | None = None


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or all files with one of these suffixes in a folder and below it, sorted by path.

    ValueError if the file has another suffix, or there is no such file.
    """
    if path.is_file():
        if _suffix(path) not in suffixes:
            raise ValueError(
                f"data source {path} has an unknown file type; known: {', '.join(suffixes)}, each also as .gz"
            )
        return [path]
    paths = sorted(p for p in path.rglob("*") if _suffix(p) in suffixes and p.is_file())
    if not paths:
        raise ValueError(f"folder {path} has no file of a known type: {', '.join(suffixes)}, each also as .gz")
    return paths


def split_file(path: Path) -> list[FilePart]:
    """The parts of a file of texts, of about PART_BYTES each. Only `.jsonl` and `.parquet`, not gzipped, are split."""
    size = path.stat().st_size
    if size <= PART_BYTES or _gzipped(path) or _suffix(path) not in (".jsonl", ".parquet"):
        return [FilePart(path)]
    end, step = size, PART_BYTES
    if _suffix(path) == ".parquet":
        with _naming(path), parquet.ParquetFile(path) as table:
            end = table.num_row_groups
        step = max(1, end * PART_BYTES // size)
    return [FilePart(path, start, min(start + step, end)) for start in range(0, end, step)]


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file: the whole file, or the field `text` of each record. Blank documents are skipped.

    ValueError for the first record that cannot be read.
    """
    for text in try_texts(FilePart(path)):
        if isinstance(text, ValueError):
            raise text
        yield text


def try_texts(part: FilePart) -> Iterator[str | ValueError]:
    """The documents of a part of a file, and a ValueError for every record that cannot be read.

    A `.txt` or `.md` file is one record. For other files a ValueError is raised if not a single record can be read,
    since that is not damage but the wrong file.
    """
    first_error, any_good = None, False
    whole = _suffix(part.path) in (".txt", ".md")
    try:
        with _naming(part.path):
            for text in _file_text(part.path) if whole else _record_texts(part):
                if isinstance(text, ValueError):
                    first_error = first_error or text
                    yield text
                else:
                    any_good = True
                    if text.strip():
                        yield text
    except ValueError as error:  # the rest of the file is lost
        first_error = first_error or error
        if any_good or whole:
            yield error
    if first_error and not any_good and not whole:
        raise first_error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file: one JSON object per line, a JSON list of objects, or the rows of a table.

    ValueError for the first record that cannot be read or is not an object.
    """
    with _naming(path):
        for where, record in _records(FilePart(path)):
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f'{where} is not a record but {json.dumps(record)[:40]}; write {{"name": "value"}}')
            yield record


def no_text_message(where: str, fields: list[str]) -> str:
    """The error message for records without a field `text`."""
    found = ", ".join(map(str, fields)) or "none"
    return f"{where} has no field text; fields found: {found}; rename the field that holds the text"


def _suffix(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `a.jsonl.gz`."""
    stem, suffix = splitext(path.name.lower())
    return splitext(stem)[1] if suffix == ".gz" else suffix


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A context in which read errors become a ValueError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, error)) from error
    except (gzip.BadGzipFile, zlib.error, EOFError, ArrowException) as error:
        raise ValueError(f"{path} is damaged, or is not of the type that its name says: {error}") from error


def _not_utf8(where: object, error: UnicodeDecodeError) -> str:
    return f"{where} is not UTF-8 text ({error.reason}); convert it first"


def _open_bytes(path: Path) -> Any:
    return gzip.open(path) if _gzipped(path) else path.open("rb")


def _file_text(path: Path) -> Iterator[str]:
    with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig") as file:
        yield file.read()


def _record_texts(part: FilePart) -> Iterator[str | ValueError]:
    for where, record in _records(part, only="text"):
        if isinstance(record, ValueError):
            yield record
        elif not isinstance(record, dict) or "text" not in record:
            yield ValueError(no_text_message(where, list(record) if isinstance(record, dict) else []))
        elif not isinstance(record["text"], str):
            yield ValueError(f"{where}: the field text is not a string but {str(record['text'])[:40]}")
        elif not _is_unicode(record["text"]):
            yield ValueError(
                f"{where}: the field text has an unpaired surrogate, which is not valid Unicode; convert it first"
            )
        else:
            yield record["text"]


def _is_unicode(text: str) -> bool:
    """False for a text with an unpaired surrogate: JSON can contain one, but tokenizers refuse it."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _records(part: FilePart, only: str | None = None) -> Iterator[tuple[str, Any]]:
    """Each record, or the ValueError of one that cannot be read, after its place in the file.

    `only` reads a single column of a table.
    """
    if _suffix(part.path) == ".parquet":
        return _table_records(part, only)
    return _json_records(part.path) if _suffix(part.path) == ".json" else _line_records(part)


def _line_records(part: FilePart) -> Iterator[tuple[str, Any]]:
    path, start, stop = part
    with _open_bytes(path) as file:
        if start:  # the line that begins before `start` belongs to the previous part
            file.seek(start - 1)
            position = start - 1 + len(file.readline())
        else:
            position = 0
        for number, line in enumerate(file, 1):
            if stop is not None and position >= stop:
                break
            position += len(line)
            if line.strip():
                where = f"{path} line {number}" + (f" after byte {start}" if start else "")
                yield where, _parse_json(line, where)


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list; some `.json` files hold one object per line instead."""
    with _open_bytes(path) as file:
        text = file.read()
    if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _line_records(FilePart(path))
        return
    records = _parse_json(text, str(path))
    if isinstance(records, ValueError):
        raise records
    for number, record in enumerate(records, 1):
        yield f"{path} record {number}", record


def _parse_json(line: bytes, where: str) -> Any:
    """The parsed JSON, or a ValueError that says why it cannot be parsed."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(_not_utf8(where, error))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where} is not JSON: {error}")


def _table_records(part: FilePart, only: str | None) -> Iterator[tuple[str, Any]]:
    path, start, stop = part
    # A Parquet file is read from its end, and a gzipped file cannot seek there.
    file = io.BytesIO(gzip.decompress(path.read_bytes())) if _gzipped(path) else path
    with parquet.ParquetFile(file, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        if only and only not in names:
            raise ValueError(no_text_message(str(path), names))
        sizes = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
        for group in range(start, len(sizes) if stop is None else stop):
            row = first = sum(sizes[:group]) + 1
            try:
                for batch in table.iter_batches(1024, row_groups=[group], columns=[only] if only else None):
                    for record in batch.to_pylist():
                        yield f"{path} row {row}", record
                        row += 1
            except (OSError, ArrowException, UnicodeDecodeError) as error:
                for unread in range(row, first + sizes[group]):
                    yield f"{path} row {unread}", ValueError(f"{path} row {unread} cannot be read: {error}")
