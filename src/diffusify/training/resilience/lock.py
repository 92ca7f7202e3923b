"""A lock file that keeps a second run out of a run's folder, or makes it wait."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"


@contextmanager
def locked(folder: Path, name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock of a folder. The kernel releases it when the process dies, however it dies.

    When another run holds it, waits for that run, or without `wait` raises ValueError with its process id.
    """
    path = folder / name
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                # Unlike flock's, child processes do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise ValueError(
                    f"another run is using {folder} (process {file.read() or 'unknown'}); wait for it, stop it, or "
                    "give another folder"
                ) from None
            if not _is_open_file(path, file.fileno()):
                continue  # the previous holder removed the file after we opened it
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Whether a path still names the file that is open under a descriptor."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
