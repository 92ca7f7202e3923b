"""Complete code at the cursor of an editor, from the text before and after it (fill in the middle).

diffusify serve smollm2-infill &
python examples/complete_at_cursor.py http://127.0.0.1:8000 FILE LINE
"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen


def main(address: str, file: str, line: int) -> str:
    """Generate line number `line` of a file again, with as many tokens as the model finds right.

    The server needs a model that fills masked spans. With a block model such as `smollm2-infill`, `"rerank": 8` in the
    body keeps the likeliest of eight completions.
    """
    lines = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
    with urlopen(f"{address}/v1/models") as response:
        model = next(entry["id"] for entry in json.load(response)["data"] if entry["diffusion"]["infills"])
    body = {
        "model": model,
        "prompt": "".join(lines[: line - 1]),
        "suffix": "".join(lines[line:]),
        "max_tokens": 64,
        "temperature": 0,
    }
    request = Request(f"{address}/v1/fim/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
