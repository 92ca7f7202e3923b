"""Where texts and records come from: files, folders, hubs, the standard library, and mixtures of them."""

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value
from datasets.iterable_dataset import ExamplesIterable

from diffusify.config import nearest
from diffusify.text.files import (
    RECORDS,
    TEXTS,
    Part,
    find_files,
    no_text,
    parts_of,
    read_records,
    read_texts,
    try_texts,
)
from diffusify.text.tokenizer import TextTokenizer

FORMS = "give a file, a folder, hub:NAME or builtin:pydoc"

# A number and a star, then a source; the comma that parts two of them stands before the next number and star.
_WEIGHTED = re.compile(r"\s*([-+.\w]+)\*(.+)", re.DOTALL)
_COMMA = re.compile(r",(?=\s*[-+.\w]+\*)")
_HUB = re.compile(r"hub:(?P<name>[^:@#]+)(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<field>.+))?")


def load_texts(source: str, *, seed: int = 0) -> Dataset | IterableDataset:
    """The documents of a source, as a dataset with the one column `text`. Blank documents are left out.

    - `notes.txt`, `notes.md`: one document; `data.jsonl`, `data.parquet`: one per record, its field `text`; each of
      them may be gzipped (`.gz`). A folder: all such files in it and below, sorted by path.
    - `hub:NAME`, `hub:NAME:CONFIG@SPLIT#FIELD`: a dataset of the Hugging Face Hub, streamed; split `train` and field
      `text` if unset.
    - `builtin:pydoc`: the topics of Python's own `help()`.
    - `0.7*data.jsonl,0.3*notes.txt`: a mixture. A weight is a source's share of the documents drawn (by `seed`).
      Drawing ends when every document has been drawn; a source that runs out before starts again, so shares hold.

    Files are read at once into memory, and the first record that cannot be read is an error; see `stream_texts` for
    the other way. A path that exists is a path, whatever it looks like. ValueError for a source that does not exist,
    cannot be read or has no documents.
    """
    path = _path(source)
    if path is None:
        return _named(source, partial(load_texts, seed=seed), seed, streaming=False)
    texts = [text for file in find_files(path, TEXTS) for text in read_texts(file)]
    if not texts:
        raise ValueError(no_documents(source))
    return Dataset.from_dict({"text": texts})


def stream_texts(source: str, *, seed: int = 0) -> IterableDataset:
    """The records of a source of texts (see `load_texts`), read while they are used.

    Each has a `text`, or a `fault` that says why it cannot be read; only a file of which nothing can be read is a
    ValueError. Blank texts may be among them. Shards, which `set_epoch` shuffles, are files and the parts of large
    ones; the dataset's state says where to go on.
    """
    path = _path(source)
    if path is None:
        return _named(source, partial(stream_texts, seed=seed), seed, streaming=True)
    parts = [part for file in find_files(path, TEXTS) for part in parts_of(file)]
    features = Features({"text": Value("string"), "fault": Value("string")})
    # IterableDataset.from_generator would do the same, and leave a lock file in a cache folder besides.
    return IterableDataset(ExamplesIterable(_examples, {"parts": parts}), info=DatasetInfo(features=features))


def files_of(source: str) -> list[Path] | None:
    """All files that a source of texts consists of; None if a part of it is on a hub. ValueError if one is missing."""
    path = _path(source)
    if path is not None:
        return find_files(path, TEXTS)
    if source.startswith("hub:"):
        return None
    if source.startswith("builtin:"):
        _builtin(source)
        return []
    if _WEIGHTED.fullmatch(source):
        parts = [files_of(part) for _, part in _weighted(source)]
        return None if None in parts else [file for part in parts for file in part or ()]
    raise ValueError(_missing(source, FORMS))


def no_documents(source: str) -> str:
    """What to say of a source without texts."""
    return f"data source {source} has no documents: nothing but empty files in it"


def load_records(source: str, *, seed: int = 0) -> Dataset:
    """The records of a source, as a dataset with the one column `record`: a JSON object, written out.

    - `pairs.jsonl`, `pairs.json` (a list), `pairs.parquet`, each also as `.gz`, or a folder of such files.
    - `hub:NAME`, `hub:NAME:CONFIG@SPLIT`: a dataset of the Hugging Face Hub; split `train` if unset.
    - `0.7*pairs.jsonl,0.3*chats.jsonl`: a mixture, as `load_texts` draws it.

    All of it is read now. Records may differ in their fields. What JSON cannot say (a date) becomes a string.
    ValueError for a source that does not exist, cannot be read or has no records.
    """
    path = _path(source)
    if path is not None:
        records = chain.from_iterable(read_records(file) for file in find_files(path, RECORDS))
    elif source.startswith("hub:"):
        records = _hub(source, streaming=False)
    elif _WEIGHTED.fullmatch(source):
        return _mixture(source, partial(load_records, seed=seed), seed)
    else:
        raise ValueError(_missing(source, "give a file, a folder or hub:NAME"))
    written = [json.dumps(record, default=str) for record in records]
    if not written:
        raise ValueError(f"data source {source} has no records")
    return Dataset.from_dict({"record": written})


def split_off(dataset: Dataset, tokens: int, tokenizer: TextTokenizer, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The dataset without some documents, and those documents, worth about `tokens` tokens: held out, to measure on.

    Whole documents drawn by `seed`: at least one, at most a tenth of them. A single document is cut near its end
    instead, between paragraphs if one ends there. A document that occurs again is held out with all its copies.
    ValueError if nothing would be left.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1, or there is nothing to measure on")
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
    """A text cut in two. The end is a twentieth or less; up to a fifth where that spares a paragraph or a line."""
    text = text.strip()
    wanted = len(text) * (1 - min(0.05, tokens / len(tokenizer.document(text))))
    for boundary in (r"\n\s*\n", r"\n"):
        ends = [found.end() for found in re.finditer(boundary, text)]
        if near := [end for end in ends if 0.8 * len(text) <= end <= wanted]:
            return text[: near[-1]], text[near[-1] :]
    words = [found.end() for found in re.finditer(r"\s+", text)]
    if not words:
        raise ValueError(f"the data is the single word {text[:40]!r}, of which nothing can be held out; give more text")
    cut = max((end for end in words if end <= wanted), default=words[-1])
    return text[:cut], text[cut:]


def _path(source: str) -> Path | None:
    """The source as a path, if there is anything at it."""
    path = Path(source).expanduser()
    # A mixture can be longer than a file's name may be: Path.exists raises then, os.path.exists does not.
    return path if source and os.path.exists(path) else None


def _missing(source: str, way: str) -> str:
    path = Path(source).expanduser()
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.with_name(close[0])}? else {way}" if close else way
    mixture = "; a mixture has a weight for each source: 0.7*FILE,0.3*FILE" if "," in source else ""
    return f"data source {source} does not exist; {hint}{mixture}"


def _named(source: str, load: Callable[[str], Any], seed: int, *, streaming: bool) -> Any:
    """The texts of a source that is no path."""
    if source.startswith("hub:"):
        texts = _hub_texts(source)
        return texts if streaming else texts.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if source.startswith("builtin:"):
        topics = _builtin(source)
        return topics.to_iterable_dataset() if streaming else topics
    if _WEIGHTED.fullmatch(source):
        return _mixture(source, load, seed)
    raise ValueError(_missing(source, FORMS))


def _examples(parts: list[Part]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Single records under unique names, as the datasets library wants them."""
    for part in parts:
        for number, text in enumerate(try_texts(part)):
            fault = isinstance(text, ValueError)
            yield f"{part}/{number}", {"text": None if fault else text, "fault": str(text) if fault else None}


def _hub(source: str, *, streaming: bool) -> Any:
    found = _HUB.fullmatch(source)
    if found is None:
        raise ValueError(f"data source {source} is no name; write hub:NAME or hub:NAME:CONFIG@SPLIT#FIELD")
    split = found["split"] or "train"
    loaded: Any = datasets.load_dataset(found["name"], found["config"], split=split, streaming=streaming)
    return loaded if found["field"] is None else _renamed(loaded, found["field"], source)


def _renamed(loaded: Any, field: str, source: str) -> Any:
    names = loaded.column_names or list(next(iter(loaded), {}))
    if field not in names:
        raise ValueError(f"{source} has no field {field}; fields found: {', '.join(names)}")
    return loaded if field == "text" else loaded.select_columns([field]).rename_column(field, "text")


def _hub_texts(source: str) -> IterableDataset:
    stream = _hub(source, streaming=True)
    names = stream.column_names or list(next(iter(stream), {}))
    if "text" not in names:
        raise ValueError(no_text(source, names))
    return stream.select_columns(["text"])


def _builtin(source: str) -> Dataset:
    name = source.removeprefix("builtin:")
    if name != "pydoc":
        raise ValueError(f'there is no built-in data "{name}"{nearest(name, ["pydoc"])}')
    from pydoc_data.topics import topics

    return Dataset.from_dict({"text": [topics[topic] for topic in sorted(topics)]})


def _weighted(source: str) -> list[tuple[float, str]]:
    """The parts of a mixture and their weights."""
    parts = []
    for part in _COMMA.split(source):
        found = _WEIGHTED.fullmatch(part)
        assert found is not None, "the caller matches the first part, the comma all others"
        try:
            weight = float(found[1])
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight {found[1]} of {found[2]} must be a number above 0, as in 0.7*a.txt,0.3*b.txt")
        parts.append((weight, found[2].strip()))
    return parts


def _mixture(source: str, load: Callable[[str], Any], seed: int) -> Any:
    weights, names = zip(*_weighted(source), strict=True)
    parts = [load(name) for name in names]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [part.to_iterable_dataset() if isinstance(part, Dataset) else part for part in parts]
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="all_exhausted")
