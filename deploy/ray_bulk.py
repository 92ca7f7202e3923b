"""Generates the texts of a file of records on several machines with Ray Data. Each replica has the whole model.

python deploy/ray_bulk.py smollm2-block prompts.jsonl results --replicas 4 --gpus 1

INPUT is a file or folder of JSON lines as for `diffusify generate --input`, OUTPUT a folder for files of results. Ray
repeats the work of machines that fail. A record without a seed gets one that depends on what it contains.
"""

import json
import zlib
from pathlib import Path
from typing import IO, Annotated, Any

import pyarrow as pa
import ray
import typer
from ray.data.datasource import BlockBasedFileDatasink

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.bulk.bulk_records import BulkSettings
from diffusify.serving.bulk.bulk_run import generate_records


class Generator:
    """A replica. It turns lines of records into lines of results."""

    def __init__(self, model: str, settings: BulkSettings) -> None:
        self.lm, self.settings = DiffusionLM.from_pretrained(model), settings

    def __call__(self, lines: pa.Table) -> pa.Table:
        records = map(parse, lines["text"].to_pylist())
        results = generate_records(self.lm, records, self.settings)
        return pa.table({"text": [json.dumps(result, ensure_ascii=False) for result in results]})


def parse(line: str) -> dict[str, Any] | ValueError:
    """The record of a line, or a ValueError that says why there is none."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return ValueError(f"{line[:40]} is not JSON: {error}")
    if not isinstance(record, dict):
        return ValueError(f"{line[:40]} is not a JSON object")
    return {"seed": zlib.crc32(line.encode())} | record


class JsonLines(BlockBasedFileDatasink):
    """Files of lines."""

    def write_block_to_file(self, block: Any, file: IO[bytes]) -> None:
        for line in block.to_arrow()["text"].to_pylist():
            file.write(f"{line}\n".encode())


def main(
    model: Annotated[str, typer.Argument(help="Model, at a path that all machines have, or its name.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="File or folder of JSON lines.")],
    output: Annotated[str, typer.Argument(help="Folder for the results.")],
    replicas: Annotated[int, typer.Option(help="Number of replicas of the model.")] = 1,
    cpus: Annotated[float, typer.Option(help="Number of CPUs of a replica; reading and writing need one more.")] = 1,
    gpus: Annotated[float, typer.Option(help="Number of GPUs of a replica.")] = 0,
    batch: Annotated[int, typer.Option(help="Number of records that a replica gets at once.")] = 1024,
    settings: Annotated[Path | None, typer.Option(help="JSON file of `SamplingConfig.save`.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Maximum number of tokens to generate.")] = None,
) -> None:
    """Generate the texts of all records."""
    sampling = SamplingConfig() if settings is None else SamplingConfig.load(settings)
    results = ray.data.read_text(source).map_batches(
        Generator,
        fn_constructor_args=(model, BulkSettings(sampling, sampling, max_new_tokens)),
        compute=ray.data.ActorPoolStrategy(size=replicas),
        batch_size=batch,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus,
    )
    results.write_datasink(JsonLines(output, file_format="jsonl"))


if __name__ == "__main__":
    typer.run(main)
