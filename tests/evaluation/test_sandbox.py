"""What a generated program may and may not do."""

from pathlib import Path

import pytest

from diffusify.evaluation.sandbox import runs_without_error


def test_a_program_without_errors_passes() -> None:
    assert runs_without_error("import math\nfrom typing import List\nassert math.sqrt(4) == 2\nprint('x' * 100_000)\n")
    assert not runs_without_error("assert 1 == 2\n")
    assert not runs_without_error("def broken(:\n")


@pytest.mark.parametrize(
    "program",
    {
        "exits": "raise SystemExit(0)",
        "leaves": "import os\nos._exit(0)",
        "loops": "while True:\n    pass",
        "waits": "import time\ntime.sleep(60)",
        "reads": "input()\ninput()",
        "eats": "x = []\nwhile True:\n    x.append(' ' * 10**8)",
        "forks": "import os\nos.fork()",
        "bombs": "import os\nwhile True:\n    os.fork()",
        "calls": "import subprocess\nsubprocess.run(['true'])",
        "raw calls": "import _posixsubprocess",
        "shells": "import os\nos.system('true')",
        "connects": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "raw sockets": "import _socket\n_socket.socket()",
        "foreign": "import ctypes\nctypes.CDLL(None).getpid()",
        "kills": "import os\nos.kill(os.getppid(), 15)",
        "removes": "import os\nos.remove('x')",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_harmful_program_is_stopped_and_fails(program: tuple[str, str]) -> None:
    assert not runs_without_error(program[1] + "\n", seconds=2.0)


def test_no_file_is_written(tmp_path: Path) -> None:
    file = tmp_path / "made"
    assert not runs_without_error(f"open({str(file)!r}, 'w').write('x')\n")
    assert not runs_without_error(f"import os\nos.open({str(file)!r}, os.O_CREAT | os.O_WRONLY)\n")
    assert not file.exists()
