"""Checkpoints that are whole or not there: sealed with sizes and hashes, moved into place, checked before use."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusify.models.saving import sync
from diffusify.training.resilience.distributed import agreed

MANIFEST = "manifest.json"
DRAFTS = ".unfinished"  # where checkpoints are written, beside where they end up


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(draft: Path, whole: Path) -> None:
    """Seal a checkpoint that is written, and move it into place: after a crash it is there in full, or not at all."""
    files = {str(path.relative_to(draft)): _print(path) for path in sorted(draft.rglob("*")) if path.is_file()}
    (draft / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    sync(draft)
    if whole.exists():  # of another attempt at this step
        os.replace(whole, draft.with_name("replaced"))
    os.replace(draft, whole)
    sync(whole.parent, deep=False)
    shutil.rmtree(draft.with_name("replaced"), ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or does not read"
    for name, wanted in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size} of {wanted['size']} bytes"
        if _print(path) != wanted:
            return f"{name} is not what was written"
    return None


def chosen(folder: Path, start: str | bool, tell: Callable[[str], None], *, first: bool) -> Path:
    """The checkpoint to go on from: `start`, or the newest whole one. The first process looks for all.

    ValueError where it is damaged or there is none.
    """
    step = -1
    if first:
        clear_drafts(folder)
        found = newest_whole(folder, tell) if start is True else Path(str(start))
        if found is None:
            raise ValueError(f"there is no checkpoint in {folder} to go on from")
        fault = damage(found) if start is not True else None
        if fault:
            raise ValueError(f"{found} is damaged: {fault}")
        tell(f"going on from {found}")
        step = step_of(found)
    [step] = agreed(step)
    return folder / f"checkpoint-{step:.0f}" if start is True else Path(str(start))


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; None if there are none.

    Damaged ones are told of and put aside as `damaged-STEP`. ValueError if there is none but damaged ones.
    """
    found = checkpoints(folder)
    passed = []
    for checkpoint in found:
        fault = damage(checkpoint)
        if fault is None:
            for bad, why in passed:
                aside = folder / f"damaged-{step_of(bad)}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(bad, aside)
                tell(f"{bad} is damaged ({why}): put aside as {aside.name}, the one before it is used")
            return checkpoint
        passed.append((checkpoint, fault))
    if passed:
        what = "; ".join(f"{path.name}: {why}" for path, why in passed)
        raise ValueError(f"no checkpoint in {folder} is whole ({what}); remove them to start from the beginning")
    return None


def clear_drafts(folder: Path) -> None:
    """Remove what a process that died left half written."""
    for leftover in (folder / DRAFTS, *folder.glob(".saving-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what a finished run needs no more."""
    clear_drafts(folder)
    for leftover in (*checkpoints(folder), *folder.glob("damaged-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _print(path: Path) -> dict[str, int | str]:
    """A file's size and hash."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
