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
from diffusify.text.files import RECORDS, TEXTS, find_files, no_text, read_records, read_texts
from diffusify.text.tokens import TextTokenizer

# A number and a star, then a source; the comma that parts two of them stands before the next number and star.
_WEIGHTED = re.compile(r"\s*([-+.\w]+)\*(.+)", re.DOTALL)
_COMMA = re.compile(r",(?=\s*[-+.\w]+\*)")
_HUB = re.compile(r"hub:(?P<name>[^:@#]+)(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<field>.+))?")


def load_texts(source: str, *, streaming: bool = False, seed: int = 0) -> Dataset | IterableDataset:
    """The documents of a source, as a dataset with the one column `text`. Blank documents are left out.

    - `notes.txt`, `notes.md`: one document; `data.jsonl`, `data.parquet`: one per record, its field `text`; each of
      them may be gzipped (`.gz`). A folder: all such files in it and below, sorted by path.
    - `hub:NAME`, `hub:NAME:CONFIG@SPLIT#FIELD`: a dataset of the Hugging Face Hub, always streamed; split `train` and
      field `text` if unset.
    - `builtin:pydoc`: the topics of Python's own `help()`.
    - `0.7*data.jsonl,0.3*notes.txt`: a mixture. A weight is a source's share of the documents drawn (by `seed`).
      Drawing ends when every document has been drawn; a source that runs out before starts again, so shares hold.

    With `streaming` files are read while the texts are used, else at once into memory. A path that exists is a path,
    whatever it looks like. ValueError for a source that does not exist, cannot be read or has no documents.
    """
    path = _path(source)
    if path is None:
        if source.startswith("hub:"):
            return _hub_texts(source)
        if source.startswith("builtin:"):
            return _builtin(source, streaming)
        if _WEIGHTED.fullmatch(source):
            return _mixture(source, partial(load_texts, streaming=streaming, seed=seed), seed)
        raise ValueError(_missing(source, "give a file, a folder, hub:NAME or builtin:pydoc"))
    paths = find_files(path, TEXTS)
    if streaming:
        # IterableDataset.from_generator would do the same, and leave a lock file in a cache folder besides.
        files = ExamplesIterable(_examples, {"paths": paths})
        texts = IterableDataset(files, info=DatasetInfo(features=Features({"text": Value("string")})))
        empty = next(iter(texts), None) is None
    else:
        texts = Dataset.from_dict({"text": [text for file in paths for text in read_texts(file)]})
        empty = not len(texts)
    if empty:
        raise ValueError(f"data source {source} has no documents: nothing but empty files in it ({len(paths)})")
    return texts


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
        mixture = _mixture(source, partial(load_records, seed=seed), seed)
        assert isinstance(mixture, Dataset), "its parts are"
        return mixture
    else:
        raise ValueError(_missing(source, "give a file, a folder or hub:NAME"))
    written = [json.dumps(record, default=str) for record in records]
    if not written:
        raise ValueError(f"data source {source} has no records")
    return Dataset.from_dict({"record": written})


def split_off(
    dataset: Dataset | IterableDataset, tokens: int, tokenizer: TextTokenizer, *, seed: int = 0
) -> tuple[Dataset | IterableDataset, Dataset]:
    """The dataset without some documents, and those documents, worth about `tokens` tokens: held out, to measure on.

    Of a Dataset, whole documents drawn by `seed`: at least one, at most a tenth of them. A single document is cut
    near its end instead, between paragraphs if one ends there. Of a stream, the first documents. A document that
    occurs again is held out with all its copies. ValueError if nothing would be left.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1, or there is nothing to measure on")
    if isinstance(dataset, IterableDataset):
        return _split_stream(dataset, tokens, tokenizer)
    texts = dataset["text"][:]
    documents = list(dict.fromkeys(texts))
    if not documents:
        raise ValueError("there are no documents to hold some out of")
    if len(documents) == 1:
        train, held = _split_document(documents[0], tokens, tokenizer)
        return Dataset.from_dict({"text": [train] * len(texts)}), Dataset.from_dict({"text": [held]})
    random.Random(seed).shuffle(documents)
    held_out = _worth(iter(documents[: max(1, len(documents) // 10)]), tokens, tokenizer)
    held = set(held_out)
    train = dataset.select([n for n, text in enumerate(texts) if text not in held])
    return train, Dataset.from_dict({"text": held_out})


def _worth(documents: Iterator[str], tokens: int, tokenizer: TextTokenizer) -> list[str]:
    """The first documents that have `tokens` tokens together, or all."""
    taken = []
    for document in documents:
        taken.append(document)
        tokens -= len(tokenizer.document(document))
        if tokens <= 0:
            break
    return taken


def _split_stream(stream: IterableDataset, tokens: int, tokenizer: TextTokenizer) -> tuple[IterableDataset, Dataset]:
    held_out = _worth((row["text"] for row in stream), tokens, tokenizer)
    held = set(held_out)
    train = stream.skip(len(held_out)).filter(lambda text: text not in held, input_columns="text")
    if next(iter(train), None) is None:
        raise ValueError(
            f"nothing is left to train on when {tokens} tokens are held out of this stream of "
            f"{len(held_out)} documents; hold out less, or load the texts without streaming"
        )
    return train, Dataset.from_dict({"text": held_out})


def _split_document(text: str, tokens: int, tokenizer: TextTokenizer) -> tuple[str, str]:
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


def _examples(paths: list[Path]) -> Iterator[tuple[str, dict[str, str]]]:
    """Single documents under unique names, as the datasets library wants them."""
    for path in paths:
        for number, text in enumerate(read_texts(path)):
            yield f"{path}/{number}", {"text": text}


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
    return stream.select_columns(["text"]).filter(lambda text: bool(text and text.strip()), input_columns="text")


def _builtin(source: str, streaming: bool) -> Dataset | IterableDataset:
    name = source.removeprefix("builtin:")
    if name != "pydoc":
        raise ValueError(f'there is no built-in data "{name}"{nearest(name, ["pydoc"])}')
    from pydoc_data.topics import topics

    texts = Dataset.from_dict({"text": [topics[topic] for topic in sorted(topics)]})
    return texts.to_iterable_dataset() if streaming else texts


def _mixture(source: str, load: Callable[[str], Dataset | IterableDataset], seed: int) -> Dataset | IterableDataset:
    weights, parts = [], []
    for part in _COMMA.split(source):
        found = _WEIGHTED.fullmatch(part)
        assert found is not None, "the caller matches the first part, the comma all others"
        try:
            weight = float(found[1])
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight {found[1]} of {found[2]} must be a number above 0, as in 0.7*a.txt,0.3*b.txt")
        weights.append(weight)
        parts.append(load(found[2].strip()))
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [part.to_iterable_dataset() if isinstance(part, Dataset) else part for part in parts]
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="all_exhausted")
