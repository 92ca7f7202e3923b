"""Rows of tables as records: Parquet, Arrow and CSV files."""

import csv
import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffusify.text.compression import file_type, is_compressed, open_bytes, report_damage

# Each record, or the ValueError of one that cannot be read, after its place in the file.
Records = Iterator[tuple[str, Any]]


def count_parts(path: Path) -> int:
    """The number of row groups of a Parquet file or of record batches of an Arrow file: where it may be entered."""
    with report_damage(path):
        if file_type(path) == ".parquet":
            with parquet.ParquetFile(path) as table:
                return table.num_row_groups
        return sum(1 for _ in _arrow_batches(path))


def parquet_records(path: Path, start: int, stop: int | None, field: str | None) -> Records:
    """The rows of some row groups; of one column only if `field` is given."""
    # A Parquet file is read from its end, and a compressed file cannot seek there.
    with parquet.ParquetFile(_seekable(path), page_checksum_verification=True) as table:
        columns = _columns(path, table.schema_arrow.names, field)
        sizes = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
        for group in range(start, len(sizes) if stop is None else stop):
            row = first = sum(sizes[:group]) + 1
            try:
                for batch in table.iter_batches(1024, row_groups=[group], columns=columns):
                    for record in batch.to_pylist():
                        yield f"{path} row {row}", decode_bytes(record)
                        row += 1
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                for unread in range(row, first + sizes[group]):
                    yield f"{path} row {unread}", ValueError(f"{path} row {unread} cannot be read: {error}")


def arrow_records(path: Path, start: int, stop: int | None, field: str | None) -> Records:
    """The rows of some record batches, as `datasets` and Feather store them; of one column only if `field` is given."""
    row = 1
    for n, batch in enumerate(_arrow_batches(path)):
        if n >= start and (stop is None or n < stop):
            columns = _columns(path, batch.schema.names, field)
            for offset, record in enumerate((batch.select(columns) if columns else batch).to_pylist()):
                yield f"{path} row {row + offset}", decode_bytes(record)
        row += batch.num_rows


def csv_records(path: Path) -> Records:
    """The rows of a CSV file by the names in its first row, all values as they are written.

    The delimiter of a `.csv` file is the one of comma, semicolon and tab that its first row has most of.
    """
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB, less than a long document has
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        delimiter = "\t" if file_type(path) == ".tsv" else max(",;\t", key=header.count)
        reader = csv.reader(chain([header], file), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{path} has two columns named {', '.join(sorted(doubled))!r}; rename one of them")
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                where = f"{path} line {reader.line_num}"
                yield where, ValueError(f"{where} is not CSV: {error}")
                continue
            where = f"{path} line {reader.line_num}"
            if row is None:
                return
            if row and len(row) != len(names):
                yield where, ValueError(f"{where} has {len(row)} fields, but the first row names {len(names)}")
            elif row:
                yield where, dict(zip(names, row, strict=True))


def decode_bytes(value: Any) -> Any:
    """A value with all bytes in it as text: some programs write the strings of a table so. Other bytes are kept."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {name: decode_bytes(item) for name, item in value.items()}
    return [decode_bytes(item) for item in value] if isinstance(value, list | tuple) else value  # a map has tuples


def missing_field_message(where: str, field: str, found: list[str]) -> str:
    """The error message for records without the field that holds the text."""
    names = ", ".join(map(str, found)) or "none"
    return f"{where} has no field {field}; fields found: {names}; name the one that holds the text: SOURCE#FIELD"


def _columns(path: Path, names: list[str], field: str | None) -> list[str] | None:
    if field is not None and field not in names:
        raise ValueError(missing_field_message(str(path), field, names))
    return None if field is None else [field]


def _seekable(path: Path) -> Path | io.BytesIO:
    if not is_compressed(path):
        return path
    with open_bytes(path) as file:
        return io.BytesIO(file.read())


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, in its stream format or its file format. They are memory-mapped."""
    seekable = _seekable(path)
    with pa.memory_map(str(path)) if isinstance(seekable, Path) else pa.PythonFile(seekable, "r") as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if is_stream:
            yield from pa.ipc.open_stream(file)
            return
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
