"""Programs that a model wrote, run where they can do little harm."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 5.0
MEMORY = 2**30  # bytes

# Runs in the child before the program. An audit hook cannot be taken off again.
_GUARD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_CPU, ({cpu}, {cpu}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def refuse(event, arguments, sys=sys, banned=frozenset({banned})):
    name = str(arguments[0]) if event == "import" else event.split(".")[0]
    asked = event if event.startswith("os.") else name
    writes = event == "open" and bool((arguments[2] or 0) & {writing})
    if asked in banned or writes:
        raise PermissionError(asked)
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


def runs(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end without an error: in a process and a folder of its own, within a time.

    It may use a gigabyte of memory and no other process, no socket, no foreign code, and change no file. That keeps
    accidents in; it is no wall against malice.
    """
    word = secrets.token_hex(16)  # which a program that only exits early does not say
    told, done = os.pipe()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    guard = _GUARD.format(
        memory=MEMORY, cpu=int(seconds) + 1, banned=sorted(_BANNED), writing=writing, done=done, word=word
    )
    with tempfile.TemporaryDirectory() as folder, os.fdopen(told, "rb") as answer:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", guard],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            pass_fds=(done,),
            start_new_session=True,
        )
        os.close(done)
        try:
            child.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        return answer.read(64) == word.encode()
