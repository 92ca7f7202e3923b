"""What an editor asks at the cursor: the text before it, the text behind it, and what belongs between.

diffusify serve runs/infiller &
python examples/complete_at_cursor.py http://127.0.0.1:8000 FILE LINE
"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen


def main(address: str, file: str, line: int) -> str:
    """The line again, from both sides. The model has to see what stands behind (`--recipe ar` or `mlm`)."""
    lines = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
    with urlopen(f"{address}/v1/models") as answer:
        model = next(one["id"] for one in json.load(answer)["data"] if one["diffusion"]["infills"])
    asked = {
        "model": model,
        "prompt": "".join(lines[: line - 1]),
        "suffix": "".join(lines[line:]),
        "max_tokens": 16,
        "temperature": 0,
    }
    request = Request(f"{address}/v1/fim/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
