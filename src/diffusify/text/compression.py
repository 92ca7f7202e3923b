"""Compressed files: their names, and reading them like plain ones."""

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import splitext
from pathlib import Path
from typing import Any

import fsspec.compression
import pyarrow as pa


def _open_zstd(file: Any, mode: str = "rb", **_: Any) -> io.BufferedReader:
    """A path or binary file, decompressed by pyarrow, which needs no package of its own for it."""
    source = pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file, "r")
    raw: Any = pa.CompressedInputStream(source, "zstd")
    return io.BufferedReader(raw)


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
COMPRESSED_AS = f"each also as {', '.join(_OPENERS)}"  # ends a list of file types


def file_type(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `a.jsonl.gz`."""
    stem, suffix = splitext(path.name.lower())
    return splitext(stem)[1] if suffix in _OPENERS else suffix


def is_compressed(path: Path) -> bool:
    """Whether a file's name ends as that of a compressed file."""
    return path.suffix.lower() in _OPENERS


def open_bytes(path: Path) -> Any:
    """A file opened for reading bytes, decompressed if its name says so."""
    return _OPENERS[path.suffix.lower()](path) if is_compressed(path) else path.open("rb")


@contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """A context in which errors of reading become a ValueError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8_message(path, error)) from error
    except (OSError, zlib.error, lzma.LZMAError, EOFError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # no damage: a missing file, no permission
            raise
        raise ValueError(f"{path} is damaged, or is not of the type that its name says: {error}") from error


def not_utf8_message(where: object, error: UnicodeDecodeError) -> str:
    """The error message for bytes that are not UTF-8."""
    return f"{where} is not UTF-8 text ({error.reason}); convert it first"


def read_zstd_of_hubs() -> None:
    """Let `datasets` read `.zst` files of hubs, which it opens through fsspec, without the package zstandard."""
    if "zstd" not in fsspec.compression.compr:
        fsspec.compression.register_compression("zstd", _open_zstd, "zst")
