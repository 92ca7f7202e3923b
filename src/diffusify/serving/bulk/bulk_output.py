"""Generation from a file of records to a file of results, which continues after a kill."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from diffusify.config import to_plain
from diffusify.models.saving import checksum
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.bulk.bulk_records import BulkInput, BulkSettings
from diffusify.serving.bulk.bulk_run import generate_records
from diffusify.text.bad_records import BadRecords
from diffusify.text.data_checksum import data_checksum


@dataclass(frozen=True)
class BulkProgress:
    """How far a generation is: records with a result, of all records, and the tokens that this run has generated."""

    results: BadRecords
    total: int
    tokens: int = 0


def generate_file(
    lm: DiffusionLM, source: BulkInput, output: Path, settings: BulkSettings, *, tokens: int = 16384
) -> Iterator[BulkProgress]:
    """Write a line of JSON for each record of `source` (see `generate_records`), and yield the progress after each.

    The same call continues an output that was begun earlier. A hidden file beside it says what it belongs to.
    ValueError for an output of other records, settings or another model, or one that another process is writing.
    """
    check_output(output)
    identity = {
        "input": data_checksum(source.files),
        "settings": to_plain(settings),
        "model": {"config": to_plain(lm.config), "weights": checksum(lm.denoiser)},
    }
    with _opened(output, json.loads(json.dumps(identity))) as file:
        results, generated = _read_results(file), 0
        yield BulkProgress(results, source.count)
        done = results.records
        for result in generate_records(lm, islice(source, done, None), settings, start=done, tokens=tokens):
            if "error" in result:
                result["error"] = f"record {results.records + 1}: {result['error']}"
            line = json.dumps(result, ensure_ascii=False, default=str) + "\n"
            file.write(line.encode(errors="backslashreplace"))  # a lone surrogate as JSON spells it
            file.flush()
            _count(results, result)
            generated += result["tokens"] if "error" not in result else 0
            yield BulkProgress(results, source.count, generated)


def check_output(output: Path) -> None:
    """ValueError for an output that is not a file of JSON lines."""
    if output.suffix != ".jsonl":
        raise ValueError(f"output {output} holds a JSON object in each line; give a name that ends in .jsonl")


@contextmanager
def _opened(output: Path, identity: dict[str, Any]) -> Iterator[IO[bytes]]:
    """The output, opened for reading and appending; no other process can open it so."""
    card = output.with_name(f".{output.name}.json")
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    elif not card.exists():
        raise ValueError(f"output {output} exists and was not written by this command; give another file, or delete it")
    saved = json.loads(card.read_text(encoding="utf-8"))
    if differing := [name for name in identity if saved.get(name) != identity[name]]:
        raise ValueError(
            f"output {output} belongs to a run with different {' and '.join(differing)}; give another file, or delete "
            "it"
        )
    with output.open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is writing {output}; wait for it, or give another file") from None
        yield file


def _read_results(file: IO[bytes]) -> BadRecords:
    """Count the results that an output has so far, and remove a last line that was cut off by a kill."""
    results, end = BadRecords(problem="have errors"), 0
    file.seek(0)
    for line in file:
        if line.endswith(b"\n"):
            _count(results, json.loads(line))
            end += len(line)
    file.truncate(end)
    return results


def _count(results: BadRecords, result: dict[str, Any]) -> None:
    if "error" in result:
        results.add(result["error"])
    else:
        results.records += 1
