"""Options that many commands share, and the parser of `-o KEY=VALUE`."""

import json
import re
from typing import Annotated, Any, Literal, get_type_hints

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a diffusion model (made by `diffusify adapt`, `tune`, `merge` or `import`), "
        "the name of a bundled model such as smollm2-block, or a Hugging Face Hub id. What generates or scores text "
        "also takes a base model as it is."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device to run on, such as cpu or cuda:0.", show_default="the GPU (CUDA, XPU or MPS) if any, else the CPU"
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Data type of the weights.", show_default="float32 on a CPU, bfloat16 on a GPU"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def parse_options(pairs: list[str], *known: dict[str, Any]) -> list[dict[str, Any]]:
    """Parse `KEY=VALUE` pairs into one dictionary for each of `known`.

    `known` are dictionaries from key to type. A key that several of them have goes to the first. A value of type Any is
    not checked here. ValueError for a pair without `=`, an unknown key or a value of another type.
    """
    from diffusify.config import from_plain, nearest

    parsed: list[dict[str, Any]] = [{} for _ in known]
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"-o {pair}: write KEY=VALUE")
        index = next((i for i, types in enumerate(known) if key in types), None)
        if index is None:
            raise ValueError(f'-o {pair}: "{key}" is not known{nearest(key, set().union(*known))}')
        hint, value = known[index][key], read_value(text)
        parsed[index][key] = value if hint is Any else from_plain(value, hint, f"-o {key}")
    return parsed


def read_value(text: str) -> Any:
    """The JSON value that `text` spells, or `text` itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def unescape(text: str) -> str:
    r"""Replace the two characters \n, which a shell does not interpret, by a line break, and \\ by a backslash."""
    return re.sub(r"\\([n\\])", lambda match: "\n" if match[1] == "n" else "\\", text)


def training_argument_types() -> dict[str, Any]:
    """The field names of `transformers.TrainingArguments`, with type Any: that class checks the values itself."""
    from transformers import TrainingArguments

    return dict.fromkeys(get_type_hints(TrainingArguments), Any)


def argument_types(function: Any, *names: str) -> dict[str, Any]:
    """The types of the named arguments of a function, or of all its arguments."""
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    return {name: hints[name] for name in names} if names else hints
