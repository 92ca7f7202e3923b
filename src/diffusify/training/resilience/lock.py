"""One run in a folder at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go of it when the process dies, however it dies.

    ValueError, with the holder's process id, when another run is at work in there.
    """
    path = folder / LOCK
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, no child process inherits it
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise ValueError(
                    f"another run is at work in {folder} (process {file.read() or 'unknown'}); wait for it, stop it, "
                    "or give another folder"
                ) from None
            if not _is_at(path, file.fileno()):
                continue  # whoever held it has just removed it
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
