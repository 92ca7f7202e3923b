"""Data sources of texts and records: files, folders, hubs, the standard library, and mixtures of them."""

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value
from datasets.iterable_dataset import ExamplesIterable

from diffusify.config import nearest
from diffusify.text.compression import read_zstd_of_hubs
from diffusify.text.data_checksum import data_checksum
from diffusify.text.files import FilePart, read_texts, split_file, try_records, try_texts
from diffusify.text.folders import RECORD_TYPES, TEXT_TYPES, find_files
from diffusify.text.tables import decode_bytes, missing_field_message
from diffusify.text.tokenizer import TextTokenizer

SOURCE_FORMS = "give a file, a folder, hub:NAME or builtin:pydoc"
_RECORD_FEATURES = Features({"record": Value("string"), "fault": Value("string")})

# A weighted source is a number, a star and a source; a comma separates two of them before the next number and star.
_WEIGHTED = re.compile(r"\s*([-+.\w]+)\*(.+)", re.DOTALL)
_COMMA = re.compile(r",(?=\s*[-+.\w]+\*)")
_HUB = re.compile(r"hub:(?P<name>[^:@#]+)(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<field>.+))?")


class _LocalSource(NamedTuple):
    """A file or folder, and the field of its records that holds the text."""

    path: Path
    field: str


def load_texts(source: str, *, seed: int = 0) -> Dataset | IterableDataset:
    """Load the documents of a source as a dataset with the single column `text`. Blank documents are skipped.

    - `notes.txt`, `notes.md`: one document; `data.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`: the field
      `text` of each record, or another one: `data.jsonl#content`. Each file may be compressed (`.gz`, `.bz2`, `.xz`,
      `.zst`). A folder: all such files in it and below, sorted by path, but no hidden ones.
    - `hub:NAME`, `hub:NAME:CONFIG@SPLIT#FIELD`: a dataset of the Hugging Face Hub, streamed; split `train` and field
      `text` if unset.
    - `builtin:pydoc`: the topics of Python's own `help()`.
    - `0.7*data.jsonl,0.3*notes.txt`: a mixture. A weight is a source's share of the documents sampled (by `seed`).
      Sampling ends when every document has been used; a source that runs out earlier starts again, so shares hold.

    Files are read into memory at once, and the first record that cannot be read is an error; see `stream_texts` for
    streaming. A path that exists is always taken as a path. ValueError if the source does not exist, cannot be read or
    has no documents.
    """
    local = _find_local(source)
    if local is None:
        return _load_named(source, partial(load_texts, seed=seed), seed, streaming=False)
    files = find_files(local.path, TEXT_TYPES, local.field)
    texts = [text for file in files for text in read_texts(file, local.field)]
    if not texts:
        raise ValueError(no_documents_message(source))
    return Dataset.from_dict({"text": texts})


def stream_texts(source: str, *, seed: int = 0) -> IterableDataset:
    """Stream the records of a source of texts (see `load_texts`), which are read while they are used.

    A record has a `text`, or a `fault` that says why it cannot be read. Blank texts are kept. Shards, which `set_epoch`
    shuffles, are files and parts of large files; the dataset's state can be saved and resumed. ValueError for a file
    of which no record can be read.
    """
    local = _find_local(source)
    if local is None:
        return _load_named(source, partial(stream_texts, seed=seed), seed, streaming=True)
    parts = [part for file in find_files(local.path, TEXT_TYPES, local.field) for part in split_file(file)]
    features = Features({"text": Value("string"), "fault": Value("string")})
    # IterableDataset.from_generator does the same but leaves a lock file in a cache folder.
    generate = partial(_keyed_records, local.field)
    return IterableDataset(ExamplesIterable(generate, {"parts": parts}), info=DatasetInfo(features=features))


def source_files(source: str, *, records: bool = False) -> list[Path] | None:
    """All files of a source of texts, or of `records`; None if a part is on a hub. ValueError if one does not exist."""
    local = _find_local(source)
    if local is not None:
        return find_files(local.path, RECORD_TYPES) if records else find_files(local.path, TEXT_TYPES, local.field)
    if source.startswith("hub:"):
        return None
    if source.startswith("builtin:"):
        _load_builtin(source)
        return []
    if _WEIGHTED.fullmatch(source):
        parts = [source_files(part, records=records) for _, part in _parse_mixture(source)]
        return None if None in parts else [file for part in parts for file in part or ()]
    raise ValueError(_missing_message(source, SOURCE_FORMS))


def other_files(source: str, *, records: bool = False) -> str | None:
    """A note on the files of a folder that are not data; None without any, or if the source is no folder."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    data = set(source_files(source, records=records) or ())
    other = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in data]
    if not other:
        return None
    return f"{len(other):,} other files of the folder are not data, such as {other[0].relative_to(folder)}"


def source_checksum(source: str, *, records: bool = False) -> str | None:
    """A checksum of what the files of a source contain; None if a part is on a hub, or a file cannot be found."""
    try:
        files = source_files(source, records=records)
    except ValueError:  # reading the source will say why
        return None
    return None if files is None else data_checksum(files)


def no_documents_message(source: str) -> str:
    """The error message for a source without texts."""
    return f"data source {source} has no documents: all its files are empty"


def load_records(source: str, *, seed: int = 0, limit: int | None = None) -> Dataset:
    """Load the records of a source: each has a `record`, a JSON object as a string, or a `fault` that says why not.

    - `pairs.jsonl`, `pairs.json` (a list), `pairs.csv`, `.tsv`, `.parquet`, `.arrow`, each also compressed (`.gz`,
      `.bz2`, `.xz`, `.zst`), or a folder of such files, hidden ones left out.
    - `hub:NAME`, `hub:NAME:CONFIG@SPLIT`: a dataset of the Hugging Face Hub; split `train` if unset.
    - `0.7*pairs.jsonl,0.3*chats.jsonl`: a mixture, sampled as in `load_texts`.

    Everything is read into memory at once, or with a `limit` that many records of each part. Records may differ in
    their fields. A value that JSON does not have, such as a date, becomes a string; bytes that are no text become null.
    ValueError if the source does not exist, has no records, or a file has none that can be read.
    """
    local = _find_local(source)
    if local is not None:
        if not os.path.exists(Path(source).expanduser()):
            raise ValueError(f"{source}: records are used whole; leave #{local.field} out, or give a template with it")
        records = chain.from_iterable(try_records(file) for file in find_files(local.path, RECORD_TYPES))
    elif source.startswith("hub:"):
        records = map(decode_bytes, _load_hub(source, streaming=limit is not None))
    elif _WEIGHTED.fullmatch(source):
        return _load_mixture(source, partial(load_records, seed=seed, limit=limit), seed)
    else:
        raise ValueError(_missing_message(source, "give a file, a folder or hub:NAME"))
    columns: dict[str, list[str | None]] = {"record": [], "fault": []}
    for record in islice(records, limit):
        is_fault = isinstance(record, ValueError)
        columns["record"].append(None if is_fault else json.dumps(record, default=_to_json))
        columns["fault"].append(str(record) if is_fault else None)
    if not columns["record"]:
        raise ValueError(f"data source {source} has no records")
    return Dataset.from_dict(columns, features=_RECORD_FEATURES)


def split_off(dataset: Dataset, tokens: int, tokenizer: TextTokenizer, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split a dataset into training documents and held-out documents of about `tokens` tokens.

    Held out are whole documents sampled by `seed`: at least one, at most a tenth of them, each with all its copies. A
    single document is cut near its end instead, at the end of a paragraph if there is one. With 0 tokens none is held
    out. ValueError if nothing would be left.
    """
    if tokens == 0:
        return dataset, dataset.select([])
    texts = dataset["text"][:]
    documents = list(dict.fromkeys(texts))
    if not documents:
        raise ValueError("there are no documents to hold some out of")
    if len(documents) == 1:
        train, held = split_document(documents[0], tokens, tokenizer)
        return Dataset.from_dict({"text": [train] * len(texts)}), Dataset.from_dict({"text": [held]})
    random.Random(seed).shuffle(documents)
    held_out = []
    for document in documents[: max(1, len(documents) // 10)]:
        held_out.append(document)
        tokens -= len(tokenizer.document(document))
        if tokens <= 0:
            break
    held = set(held_out)
    train = dataset.select([n for n, text in enumerate(texts) if text not in held])
    return train, Dataset.from_dict({"text": held_out})


def split_document(text: str, tokens: int, tokenizer: TextTokenizer) -> tuple[str, str]:
    """Cut a text in two, before its last `tokens` tokens or last twentieth, whichever is shorter.

    The second part may grow to a fifth of the text if the cut then falls between paragraphs or lines. ValueError if
    the text is a single word.
    """
    text = text.strip()
    target = len(text) * (1 - min(0.05, tokens / len(tokenizer.document(text))))
    for boundary in (r"\n\s*\n", r"\n"):
        ends = [match.end() for match in re.finditer(boundary, text)]
        if close := [end for end in ends if 0.8 * len(text) <= end <= target]:
            return text[: close[-1]], text[close[-1] :]
    words = [match.end() for match in re.finditer(r"\s+", text)]
    if not words:
        raise ValueError(
            f"the data is the single word {text[:40]!r}, so no part of it can be held out; give more text, or train "
            "without validation: held_out=0"
        )
    cut = max((end for end in words if end <= target), default=words[-1])
    return text[:cut], text[cut:]


def _find_local(source: str) -> _LocalSource | None:
    """The path of a source and its field, or None if there is no such file or folder. A path may contain `#`."""
    name, _, field = source.rpartition("#")
    for path, text_field in ((source, "text"), (name, field)):
        # A mixture can be longer than a file name may be: Path.exists raises an error then, os.path.exists does not.
        if path and text_field and os.path.exists(Path(path).expanduser()):
            return _LocalSource(Path(path).expanduser(), text_field)
    return None


def _missing_message(source: str, advice: str) -> str:
    path = Path(source).expanduser()
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.with_name(close[0])}? Otherwise {advice}" if close else advice
    mixture = "; a mixture needs a weight for each source: 0.7*FILE,0.3*FILE" if "," in source else ""
    return f"data source {source} does not exist; {hint}{mixture}"


def _load_named(source: str, load: Callable[[str], Any], seed: int, *, streaming: bool) -> Any:
    """The texts of a source that is not a path."""
    if source.startswith("hub:"):
        texts = _load_hub_texts(source)
        return texts if streaming else texts.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if source.startswith("builtin:"):
        topics = _load_builtin(source)
        return topics.to_iterable_dataset() if streaming else topics
    if _WEIGHTED.fullmatch(source):
        return _load_mixture(source, load, seed)
    raise ValueError(_missing_message(source, SOURCE_FORMS))


def _keyed_records(field: str, parts: list[FilePart]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Single records with unique keys, as the datasets library expects them."""
    for part in parts:
        for number, text in enumerate(try_texts(part, field)):
            fault = isinstance(text, ValueError)
            yield f"{part}/{number}", {"text": None if fault else text, "fault": str(text) if fault else None}


def _load_hub(source: str, *, streaming: bool) -> Any:
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError(f"data source {source} has no dataset name; write hub:NAME or hub:NAME:CONFIG@SPLIT#FIELD")
    split = match["split"] or "train"
    read_zstd_of_hubs()
    try:
        loaded: Any = datasets.load_dataset(match["name"], match["config"], split=split, streaming=streaming)
    except RuntimeError as error:  # a repository with a script
        raise ValueError(
            f"data source {source} cannot be loaded ({error}); download its files and give them"
        ) from error
    return loaded if match["field"] is None else _as_text(loaded, match["field"], source)


def _as_text(loaded: Any, field: str, source: str) -> Any:
    names = loaded.column_names or list(next(iter(loaded), {}))
    if field not in names:
        raise ValueError(missing_field_message(source, field, names))
    return loaded if field == "text" else loaded.select_columns([field]).rename_column(field, "text")


def _to_json(value: Any) -> str | None:
    """A value that JSON does not have as a string; bytes that are no text count as missing."""
    return None if isinstance(value, bytes) else str(value)


def _decoded(stream: IterableDataset, source: str) -> IterableDataset:
    """A stream of texts, which some programs write as bytes."""

    def decode(text: Any) -> dict[str, str]:
        if isinstance(decoded := decode_bytes(text), bytes):
            raise ValueError(
                f"{source}: the field that holds the text has bytes that are not UTF-8; name another field"
            )
        return {"text": decoded}

    is_binary = stream.features is not None and stream.features["text"].dtype in ("binary", "large_binary")
    return (
        stream.map(decode, input_columns="text", features=Features({"text": Value("string")})) if is_binary else stream
    )


def _load_hub_texts(source: str) -> IterableDataset:
    stream = _as_text(_load_hub(source, streaming=True), "text", source)
    return _decoded(stream.select_columns(["text"]), source)


def _load_builtin(source: str) -> Dataset:
    name = source.removeprefix("builtin:")
    if name != "pydoc":
        raise ValueError(f'there is no built-in data "{name}"{nearest(name, ["pydoc"])}')
    from pydoc_data.topics import topics

    return Dataset.from_dict({"text": [topics[topic] for topic in sorted(topics)]})


def _parse_mixture(source: str) -> list[tuple[float, str]]:
    """The weight and source of each part of a mixture."""
    parts = []
    for part in _COMMA.split(source):
        match = _WEIGHTED.fullmatch(part)
        assert match is not None, "the caller matches the first part, the comma all others"
        try:
            weight = float(match[1])
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight {match[1]} of {match[2]} must be a number above 0, as in 0.7*a.txt,0.3*b.txt")
        parts.append((weight, match[2].strip()))
    return parts


def _load_mixture(source: str, load: Callable[[str], Any], seed: int) -> Any:
    weights, sources = zip(*_parse_mixture(source), strict=True)
    parts = [load(part) for part in sources]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [part.to_iterable_dataset() if isinstance(part, Dataset) else part for part in parts]
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="all_exhausted")
