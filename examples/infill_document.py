"""Fill the masked spans of a document: `[[12]]` is a span of 12 tokens, `[[...]]` one of unknown length.

python examples/infill_document.py smollm2-infill letter.md > filled.md
"""

import re
import sys
from pathlib import Path

import diffusify


def main(folder: str, file: str) -> str:
    """The filled document. Each paragraph is infilled alone, so a document can be longer than the model's context."""
    model = diffusify.load(folder)  # bundled, or made with `ar`, `mlm` or `block -o infilling=0.75`
    paragraphs = re.split(r"(\n\s*\n)", Path(file).read_text(encoding="utf-8"))
    masked = [paragraph for paragraph in paragraphs if re.search(r"(?<!\\)\[\[(\d|\.\.\.)", paragraph)]

    # All paragraphs with masked spans form one batch.
    filled = iter(model.infill(masked, temperature=0.7, top_p=0.9))
    return "".join(next(filled).text if paragraph in masked else paragraph for paragraph in paragraphs)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]), end="")
