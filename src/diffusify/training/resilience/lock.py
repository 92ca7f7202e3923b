"""A lock file that keeps a second run out of a run's folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The kernel releases it when the process dies, however it dies.

    Raises ValueError, with the holder's process id, when another run holds the lock.
    """
    path = folder / LOCK
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, child processes do not inherit it
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
