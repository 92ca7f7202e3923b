"""Atomic checkpoints: written aside with sizes and hashes, renamed into place, verified before use."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusify.models.saving import fsync_path
from diffusify.training.resilience.distributed import all_reduce_max

MANIFEST = "manifest.json"
STAGING = ".unfinished"  # the folder in a run's folder where checkpoints are written


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def commit_checkpoint(staged: Path, checkpoint: Path) -> None:
    """Add a manifest to a staged checkpoint and rename it into place, so that a crash leaves all of it or nothing."""
    files = {str(path.relative_to(staged)): _digest(path) for path in sorted(staged.rglob("*")) if path.is_file()}
    (staged / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    fsync_path(staged)
    if checkpoint.exists():  # from an earlier attempt at this step
        os.replace(checkpoint, staged.with_name("replaced"))
    os.replace(staged, checkpoint)
    fsync_path(checkpoint.parent, recursive=False)
    shutil.rmtree(staged.with_name("replaced"), ignore_errors=True)


def find_corruption(checkpoint: Path) -> str | None:
    """The first difference between a checkpoint's files and its manifest; None if the checkpoint is valid."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or not readable"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} of {expected['size']} bytes"
        if _digest(path) != expected:
            return f"{name} does not match its checksum"
    return None


def select_checkpoint(folder: Path, resume_from: str | bool, notify: Callable[[str], None], *, is_main: bool) -> Path:
    """The checkpoint to resume from: `resume_from`, or the newest valid one if it is True.

    The main process verifies it for all. Raises ValueError if it is corrupt or there is none.
    """
    step = -1
    if is_main:
        remove_partial_saves(folder)
        found = newest_valid_checkpoint(folder, notify) if resume_from is True else Path(str(resume_from))
        if found is None:
            raise ValueError(f"there is no checkpoint in {folder} to resume from")
        fault = find_corruption(found) if resume_from is not True else None
        if fault:
            raise ValueError(f"{found} is corrupt: {fault}")
        notify(f"resuming from {found}")
        step = checkpoint_step(found)
    [step] = all_reduce_max(step)
    return folder / f"checkpoint-{step:.0f}" if resume_from is True else Path(str(resume_from))


def newest_valid_checkpoint(folder: Path, notify: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint; None if there are no checkpoints.

    Newer corrupt checkpoints are reported and renamed to `damaged-STEP`. Raises ValueError if all are corrupt.
    """
    corrupt = []
    for checkpoint in list_checkpoints(folder):
        fault = find_corruption(checkpoint)
        if fault is None:
            for other, other_fault in corrupt:
                aside = folder / f"damaged-{checkpoint_step(other)}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(other, aside)
                notify(f"{other} is corrupt ({other_fault}); renamed it to {aside.name}, using the one before it")
            return checkpoint
        corrupt.append((checkpoint, fault))
    if corrupt:
        faults = "; ".join(f"{path.name}: {fault}" for path, fault in corrupt)
        raise ValueError(f"all checkpoints in {folder} are corrupt ({faults}); remove them to start from the beginning")
    return None


def remove_partial_saves(folder: Path) -> None:
    """Remove the partial files that a killed process left."""
    for path in (folder / STAGING, *folder.glob(".saving-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a finished run, corrupt and partial ones included."""
    remove_partial_saves(folder)
    for path in (*list_checkpoints(folder), *folder.glob("damaged-*")):
        shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> dict[str, int | str]:
    """A file's size and hash."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
