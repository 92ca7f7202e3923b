"""The data files of a folder: which of its files are data, and which belong to other programs."""

import json
from collections.abc import Iterator
from pathlib import Path

from diffusify.text.compression import COMPRESSED_AS, file_type, open_bytes, report_damage

TEXT_TYPES = (".txt", ".md", ".jsonl", ".parquet", ".json", ".csv", ".tsv", ".arrow")  # files of texts
RECORD_TYPES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")  # files of records

_HIDDEN = (".", "__")  # names of files and folders that begin so are not data: .ipynb_checkpoints, ._a.jsonl, __MACOSX
_COMPANIONS = {"dataset_info.json", "dataset_infos.json", "_delta_log", "_temporary"}
_SEARCHED = 1 << 20  # bytes of a .json or .csv file in which a field must be mentioned


def find_files(path: Path, types: tuple[str, ...], field: str | None = None) -> list[Path]:
    """The file itself, or all data files of these types in a folder and below it, sorted by path.

    Hidden files and folders are not data, nor are files that other programs keep beside data. Of a folder that
    `datasets` saved only its own data files count, and of several splits `train`. With a `field`, files that need not
    be data (`.json`, `.csv`, `.tsv`) count only if they mention it. ValueError if there is no such file.
    """
    if path.is_file():
        if file_type(path) not in types:
            raise ValueError(f"data source {path} has an unknown file type; known: {', '.join(types)}, {COMPRESSED_AS}")
        return [path]
    paths = [file for file in _data_files(path) if file_type(file) in types and _may_have(file, field)]
    if not paths:
        raise ValueError(f"folder {path} has no file of a known type: {', '.join(types)}, {COMPRESSED_AS}")
    return paths


def _data_files(folder: Path) -> Iterator[Path]:
    if (folder / "dataset_dict.json").is_file():
        folder = _train_split(folder)
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if isinstance(state, dict) and "_data_files" in state:  # other .arrow files are caches of `Dataset.map`
            yield from (folder / file["filename"] for file in state["_data_files"])
            return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_HIDDEN) or path.name in _COMPANIONS:
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():  # a link may lead into a circle
            yield from _data_files(path)


def _train_split(folder: Path) -> Path:
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
    if "train" not in splits:
        raise ValueError(f"{folder} has no split train; give the folder of one: {', '.join(splits) or 'none'}")
    return folder / "train"


def _may_have(path: Path, field: str | None) -> bool:
    """False for a file of another program, such as package.json, which does not mention the field."""
    if field is None or not field.isascii() or file_type(path) not in (".json", ".csv", ".tsv"):
        return True
    try:
        with report_damage(path), open_bytes(path) as file:
            return field.encode() in file.read(_SEARCHED)
    except (OSError, ValueError):  # reading the file will say why
        return True
