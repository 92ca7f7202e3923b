"""Adds the files outside `docs/` that pages link to, at the same place as in the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("benchmarks/README.md", "recipes/README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\(([^)#:]+)")


def on_files(files: Files, *, config: Any) -> Files:
    pages = {page.src_uri: Path("docs") / page.src_uri for page in files.documentation_pages()}
    pages |= {name: Path(name) for name in PAGES}
    for path in tuple(pages.values()):
        for link in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            there = (ROOT / path.parent / link).resolve().relative_to(ROOT)
            if there.parts[0] != "docs":
                pages[str(there)] = there
    for name, path in pages.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Both `docs/` and the repository's root become the root of the site."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](").replace("](docs/", "](")
