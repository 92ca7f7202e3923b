"""Reading data files: texts, or records of named fields."""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusify.text.compression import file_type, is_compressed, not_utf8_message, open_bytes, report_damage
from diffusify.text.messages import is_chat
from diffusify.text.tables import (
    Records,
    arrow_records,
    count_parts,
    csv_records,
    missing_field_message,
    parquet_records,
)
from diffusify.text.unicode import check_unicode

PART_BYTES = 64 << 20  # size of the parts of a file that can be read from the middle
_DOCUMENT_TYPES = (".txt", ".md")  # a file is one document


class FilePart(NamedTuple):
    """A file or a part of it: the lines that begin in a range of bytes, or a range of row groups or batches."""

    path: Path
    start: int = 0
    stop: int | None = None


def split_file(path: Path) -> list[FilePart]:
    """The parts of a file, of about PART_BYTES each. Only plain `.jsonl`, `.parquet` and `.arrow` files are split."""
    size = path.stat().st_size
    if size <= PART_BYTES or is_compressed(path) or file_type(path) not in (".jsonl", ".parquet", ".arrow"):
        return [FilePart(path)]
    end, step = size, PART_BYTES
    if file_type(path) != ".jsonl":
        end = count_parts(path)
        step = max(1, end * PART_BYTES // size)
    return [FilePart(path, start, min(start + step, end)) for start in range(0, end, step)]


def read_texts(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of a file: the whole file, or one field of each record. Blank documents are skipped.

    ValueError for the first record that cannot be read.
    """
    for text in try_texts(FilePart(path), field):
        if isinstance(text, ValueError):
            raise text
        yield text


def try_texts(part: FilePart, field: str = "text") -> Iterator[str | ValueError]:
    """The documents of a part of a file, and a ValueError for every record that cannot be read.

    A `.txt` or `.md` file is one record. For other files a ValueError is raised if not a single record can be read,
    since that is not damage but the wrong file.
    """
    if file_type(part.path) not in _DOCUMENT_TYPES:
        records = _try(_record_texts(part, field), part.path)
        yield from (text for text in records if isinstance(text, ValueError) or text.strip())
        return
    try:
        with report_damage(part.path), io.TextIOWrapper(open_bytes(part.path), encoding="utf-8-sig") as file:
            text = file.read()
    except ValueError as error:
        yield error
    else:
        if text.strip():
            yield text


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file: one JSON object per line, a JSON list of objects, or the rows of a table.

    ValueError for the first record that cannot be read or is not an object.
    """
    for record in try_records(path):
        if isinstance(record, ValueError):
            raise record
        yield record


def try_records(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """The records of a file, and a ValueError for every one that cannot be read.

    A list of messages in place of an object is a chat: a record with the field `messages`. ValueError if not a single
    record can be read.
    """
    return _try(_objects(path), path)


def _try(records: Iterator[Any], path: Path) -> Iterator[Any]:
    """The same records. A file that ends early is one more error; a ValueError is raised if all are errors."""
    first_error, any_good = None, False
    try:
        with report_damage(path):
            for record in records:
                if isinstance(record, ValueError):
                    first_error = first_error or record
                else:
                    any_good = True
                yield record
    except ValueError as error:  # the rest of the file is lost
        first_error = first_error or error
        if any_good:
            yield error
    if first_error and not any_good:
        raise first_error


def _objects(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    records = _records(FilePart(path))
    if file_type(path) == ".json":
        records = list(records)
        if is_chat([record for _, record in records]):
            records = [(str(path), [record for _, record in records])]
    for where, record in records:
        if isinstance(record, dict | ValueError):
            yield record
        elif is_chat(record):
            yield {"messages": record}
        else:
            yield ValueError(f'{where} is not a record but {json.dumps(record)[:40]}; write {{"name": "value"}}')


def _record_texts(part: FilePart, field: str) -> Iterator[str | ValueError]:
    for where, record in _records(part, field):
        text = record.get(field) if isinstance(record, dict) else record
        if isinstance(text, ValueError):
            yield text
        elif field not in record if isinstance(record, dict) else not isinstance(record, str):
            yield ValueError(missing_field_message(where, field, list(record) if isinstance(record, dict) else []))
        elif not isinstance(text, str):
            kind = "bytes that are not UTF-8" if isinstance(text, bytes) else str(text)[:40]
            yield ValueError(f"{where}: the field {field} is not a string but {kind}")
        else:
            try:
                yield check_unicode(text)
            except ValueError as error:
                yield ValueError(f"{where}: the field {field} has a {error}")


def _records(part: FilePart, field: str | None = None) -> Records:
    """Each record, or the ValueError of one that cannot be read, after its place in the file.

    With a `field`, only that column of a table is read.
    """
    match file_type(part.path):
        case ".parquet":
            return parquet_records(*part, field)
        case ".arrow":
            return arrow_records(*part, field)
        case ".csv" | ".tsv":
            return csv_records(part.path)
        case ".json":
            return _json_records(part.path)
    return _line_records(part)


def _line_records(part: FilePart) -> Records:
    path, start, stop = part
    with open_bytes(path) as file:
        if start:  # the line that begins before `start` belongs to the previous part
            file.seek(start - 1)
            position = start - 1 + len(file.readline())
        else:
            position = 0
        number = 0
        for line in file:
            if stop is not None and position >= stop:
                break
            position += len(line)
            for record in line.rstrip(b"\r\n").split(b"\r"):  # old Mac programs end lines so; JSON has no plain CR
                number += 1
                if record.strip():
                    where = f"{path} line {number}" + (f" after byte {start}" if start else "")
                    yield where, _parse_json(record, where)


def _json_records(path: Path) -> Records:
    """The items of a JSON list; some `.json` files hold one object per line instead."""
    with open_bytes(path) as file:
        text = file.read()
    if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _line_records(FilePart(path))
        return
    records = _parse_json(text, str(path))
    if isinstance(records, ValueError):
        if isinstance(_parse_json(text.partition(b"\n")[0], str(path)), ValueError):
            raise records
        yield from _line_records(FilePart(path))  # a list in each line
        return
    for number, record in enumerate(records, 1):
        yield f"{path} record {number}", record


def _parse_json(line: bytes, where: str) -> Any:
    """The parsed JSON, or a ValueError that says why it cannot be parsed."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(not_utf8_message(where, error))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where} is not JSON: {error}")
