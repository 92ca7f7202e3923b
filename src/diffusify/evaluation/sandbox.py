"""Execution of generated programs with limited rights."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 5.0
MEMORY = 2**30  # bytes

# Runs in the child process before the program. An audit hook cannot be removed.
_GUARD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_CPU, ({cpu}, {cpu}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def refuse(event, arguments, sys=sys, banned=frozenset({banned})):
    name = str(arguments[0]) if event == "import" else event.split(".")[0]
    operation = event if event.startswith("os.") else name
    writes = event == "open" and bool((arguments[2] or 0) & {writing})
    if operation in banned or writes:
        raise PermissionError(operation)
sys.addaudithook(refuse)
del refuse, resource
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "program"}})
import os
os.write({done}, b"{word}")
"""
_BANNED = {
    "socket", "_socket", "ctypes", "_ctypes", "subprocess", "_posixsubprocess", "multiprocessing", "os.fork",
    "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.killpg", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.putenv",
    "shutil", "syslog", "pty", "signal", "faulthandler",
}  # fmt: skip


def runs_without_error(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end without an error within `seconds`, in its own process and folder.

    It may use a gigabyte of memory, and no other process, socket, foreign code or file for writing. This prevents
    accidents; it does not stop malicious programs.
    """
    word = secrets.token_hex(16)  # printed at the end, so an early exit does not count
    read_end, write_end = os.pipe()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    guard = _GUARD.format(
        memory=MEMORY, cpu=int(seconds) + 1, banned=sorted(_BANNED), writing=writing, done=write_end, word=word
    )
    with tempfile.TemporaryDirectory() as folder, os.fdopen(read_end, "rb") as output:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", guard],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)
        try:
            child.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        return output.read(64) == word.encode()
