"""The holes of a document are filled: `[[12]]` is room for twelve tokens, `[[4-20]]` for as many as are surest.

python examples/infill_document.py runs/infiller letter.md > filled.md
"""

import re
import sys
from pathlib import Path

import diffusify


def main(folder: str, file: str) -> str:
    """The document without holes. Each paragraph is a text of its own, so a document may be longer than the context."""
    model = diffusify.load(folder)  # one that sees both ways: `--recipe ar` or `mlm`
    parts = re.split(r"(\n\s*\n)", Path(file).read_text(encoding="utf-8"))
    holed = [part for part in parts if re.search(r"(?<!\\)\[\[\d", part)]

    # All paragraphs with holes are one batch; what is written one token at a time, the surest first, is best.
    filled = iter(model.infill(holed, temperature=0.7, top_p=0.9))
    return "".join(next(filled).text if part in holed else part for part in parts)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]), end="")
