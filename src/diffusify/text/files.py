"""What stands in files: texts, or records of named fields."""

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

PART = 64 << 20  # bytes of a file that are read in one go, where it can be entered in the middle
TEXTS = (".txt", ".md", ".jsonl", ".parquet")  # kinds of files that hold texts; each may be gzipped
RECORDS = (".jsonl", ".json", ".parquet")  # and of those that hold records


class Part(NamedTuple):
    """A file, or a part of it: the lines that begin between two bytes, or the row groups between two numbers."""

    path: Path
    start: int = 0
    stop: int | None = None


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


def parts_of(path: Path) -> list[Part]:
    """A file of texts, cut where it can be entered in the middle: lines and row groups that are not gzipped."""
    size = path.stat().st_size
    if size <= PART or _gzipped(path) or _kind(path) not in (".jsonl", ".parquet"):
        return [Part(path)]
    end, step = size, PART
    if _kind(path) == ".parquet":
        with _named(path), parquet.ParquetFile(path) as table:
            end = table.num_row_groups
        step = max(1, end * PART // size)
    return [Part(path, start, min(start + step, end)) for start in range(0, end, step)]


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file, blank ones left out: the whole of it, or the field `text` of each record."""
    for text in try_texts(Part(path)):
        if isinstance(text, ValueError):
            raise text
        yield text


def try_texts(part: Part) -> Iterator[str | ValueError]:
    """The documents of a part of a file, and for every record that cannot be read the reason.

    ValueError if it has records and none of them can be read: that is no damage but the wrong file. A text file is a
    record itself.
    """
    wrong, right = None, False
    whole = _kind(part.path) in (".txt", ".md")
    try:
        with _named(part.path):
            for text in _whole(part.path) if whole else _field_text(part):
                if isinstance(text, ValueError):
                    wrong = wrong or text
                    yield text
                else:
                    right = True
                    if text.strip():
                        yield text
    except ValueError as error:  # the rest of the file is lost
        wrong = wrong or error
        if right or whole:
            yield error
    if wrong and not right and not whole:
        raise wrong


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file: JSON objects by line, a JSON list of them, or the rows of a table."""
    with _named(path):
        for where, record in _records(Part(path)):
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f'{where} is no record but {json.dumps(record)[:40]}; write {{"name": "value", ...}}')
            yield record


def no_text(where: str, fields: list[str]) -> str:
    """What to say of records without texts."""
    return f"{where} has no field text; fields found: {', '.join(map(str, fields)) or 'none'}; rename the one you want"


def _kind(path: Path) -> str:
    """The suffix that says how to read a file: `.jsonl` for a.jsonl.gz."""
    stem, suffix = splitext(path.name.lower())
    return splitext(stem)[1] if suffix == ".gz" else suffix


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors that come up while a file is read name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, error)) from error
    except (gzip.BadGzipFile, zlib.error, EOFError, ArrowException) as error:
        raise ValueError(f"{path} is damaged or not what its name says: {error}") from error


def _not_utf8(where: object, error: UnicodeDecodeError) -> str:
    return f"{where} is not UTF-8 text ({error.reason}); convert it first"


def _open_bytes(path: Path) -> Any:
    return gzip.open(path) if _gzipped(path) else path.open("rb")


def _whole(path: Path) -> Iterator[str]:
    with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig") as file:
        yield file.read()


def _field_text(part: Part) -> Iterator[str | ValueError]:
    for where, record in _records(part, only="text"):
        if isinstance(record, ValueError):
            yield record
        elif not isinstance(record, dict) or "text" not in record:
            yield ValueError(no_text(where, list(record) if isinstance(record, dict) else []))
        elif not isinstance(record["text"], str):
            yield ValueError(f"{where}: the field text is no string but {str(record['text'])[:40]}")
        elif not _is_unicode(record["text"]):
            yield ValueError(f"{where}: the field text has half a surrogate pair, which is no text; convert it first")
        else:
            yield record["text"]


def _is_unicode(text: str) -> bool:
    """JSON can spell half a character, which no tokenizer takes."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _records(part: Part, only: str | None = None) -> Iterator[tuple[str, Any]]:
    """Whatever stands where a record should (ValueError: nothing that reads), and where that is.

    Of a table `only` one field may be read.
    """
    if _kind(part.path) == ".parquet":
        return _rows(part, only)
    return _list(part.path) if _kind(part.path) == ".json" else _lines(part)


def _lines(part: Part) -> Iterator[tuple[str, Any]]:
    path, start, stop = part
    with _open_bytes(path) as file:
        if start:  # the line that begins before belongs to the part before
            file.seek(start - 1)
            at = start - 1 + len(file.readline())
        else:
            at = 0
        for number, line in enumerate(file, 1):
            if stop is not None and at >= stop:
                break
            at += len(line)
            if line.strip():
                where = f"{path} line {number}" + (f" after byte {start}" if start else "")
                yield where, _parse(line, where)


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON list; many a `.json` holds an object a line instead."""
    with _open_bytes(path) as file:
        text = file.read()
    if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _lines(Part(path))
        return
    records = _parse(text, str(path))
    if isinstance(records, ValueError):
        raise records
    for number, record in enumerate(records, 1):
        yield f"{path} record {number}", record


def _parse(line: bytes, where: str) -> Any:
    """What a piece of JSON says, or the ValueError that says why it says nothing."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(_not_utf8(where, error))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where} is not JSON: {error}")


def _rows(part: Part, only: str | None) -> Iterator[tuple[str, Any]]:
    path, start, stop = part
    # Parquet is read from its end, where a gzipped file cannot seek.
    file = io.BytesIO(gzip.decompress(path.read_bytes())) if _gzipped(path) else path
    with parquet.ParquetFile(file, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        if only and only not in names:
            raise ValueError(no_text(str(path), names))
        sizes = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
        for group in range(start, len(sizes) if stop is None else stop):
            row = first = sum(sizes[:group]) + 1
            try:
                for batch in table.iter_batches(1024, row_groups=[group], columns=[only] if only else None):
                    for record in batch.to_pylist():
                        yield f"{path} row {row}", record
                        row += 1
            except (OSError, ArrowException, UnicodeDecodeError) as error:
                for lost in range(row, first + sizes[group]):
                    yield f"{path} row {lost}", ValueError(f"{path} row {lost} cannot be read: {error}")
