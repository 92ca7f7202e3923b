"""A file of prompts that is generated in bulk: rate beside one prompt at a time, and completeness after two kills.

python bulk.py MODEL [--records 1000]
"""

import json
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Annotated, Any

import torch
import typer
from machine import save

import diffusify
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.bulk.bulk_records import BulkSettings
from diffusify.serving.bulk.bulk_run import generate_records
from diffusify.text.sources import load_texts

WORDS = (4, 8, 16, 32)  # of the prompts, in turn


def main(
    model: Annotated[str, typer.Argument(help="Folder or name of a model.")] = "smollm2-block",
    records: Annotated[int, typer.Option(help="Number of prompts of the run that is killed twice.")] = 1000,
    timed: Annotated[int, typer.Option(help="Number of prompts of the run that is timed.")] = 400,
    serial: Annotated[int, typer.Option(help="Number of prompts generated one by one.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(help="Number of tokens of each answer.")] = 16,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "bfloat16",
) -> None:
    """Measure, and save the numbers."""
    lm, prompts = diffusify.load(model, dtype=getattr(torch, dtype)), make_prompts(records)
    rates, texts = measure(lm, prompts, timed, serial, max_new_tokens)
    del lm
    killed = kill_twice(model, prompts, texts, ["--max-new-tokens", str(max_new_tokens), "--dtype", dtype])
    found = {"model": model, "dtype": dtype, "max_new_tokens": max_new_tokens, **rates, "killed": killed}
    print(json.dumps(found, indent=2))
    print("wrote", save("bulk", f"python benchmarks/bulk.py {model} --dtype {dtype}", 0, found))


def make_prompts(count: int) -> list[str]:
    """The first words of paragraphs of Python's manual, few and many in turn."""
    texts = [dict(row)["text"] for row in load_texts("builtin:pydoc")]
    paragraphs = [paragraph.split() for text in texts for paragraph in text.split("\n\n")]
    prompts = [" ".join(words[:n]) for words, n in zip(paragraphs, cycle(WORDS)) if len(words) > n]
    assert len(prompts) >= count
    return prompts[:count]


def measure(
    lm: DiffusionLM, prompts: list[str], timed: int, serial: int, max_new_tokens: int
) -> tuple[dict[str, Any], list[str | None]]:
    """Tokens per second one by one and in bulk, and the texts of the latter."""
    lm.generate(prompts[0], max_new_tokens)
    start = perf_counter()
    alone = [lm.generate(prompt, max_new_tokens) for prompt in prompts[:serial]]
    middle = perf_counter()
    records = [{"prompt": prompt} for prompt in prompts[:timed]]
    together = list(generate_records(lm, records, BulkSettings(max_new_tokens=max_new_tokens)))
    seconds = perf_counter() - middle
    serial_rate = sum(result.tokens for result in alone) / (middle - start)
    bulk_rate = sum(record["tokens"] for record in together) / seconds
    equal = sum(a.completion == b["completion"] for a, b in zip(alone, together, strict=False))
    return {
        "serial": {"prompts": serial, "tokens_per_second": round(serial_rate, 1)},
        "bulk": {
            "prompts": timed,
            "tokens_per_second": round(bulk_rate, 1),
            "times_serial": round(bulk_rate / serial_rate, 2),
            "texts_equal_to_serial": equal,
        },
    }, [record["completion"] for record in together]


def kill_twice(model: str, prompts: list[str], texts: list[str | None], options: list[str]) -> dict[str, Any]:
    """Kill `diffusify generate` after about a third and two thirds of the prompts, and let it finish."""
    with TemporaryDirectory() as folder:
        source, output = Path(folder) / "prompts.jsonl", Path(folder) / "out.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        files = ["--input", str(source), "--output", str(output)]
        command = [sys.executable, "-m", "diffusify", "generate", model, *files, *options]
        killed_at = [run_until(command, output, len(prompts) * share // 3) for share in (1, 2)]
        subprocess.run(command, check=True)
        results = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {
        "prompts": len(prompts),
        "lines_at_each_kill": killed_at,
        "lines": len(results),
        "in_order": [result["prompt"] for result in results] == prompts,
        "texts_equal_to_undisturbed": sum(a == b["completion"] for a, b in zip(texts, results, strict=False)),
    }


def run_until(command: list[str], output: Path, lines: int) -> int:
    """Kill a command once its output has so many lines; the number of lines then."""
    with subprocess.Popen(command) as process:
        while not output.exists() or output.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "the command ended before it was killed"
            sleep(0.05)  # and leave the processor to it
        process.send_signal(signal.SIGKILL)
    return output.read_bytes().count(b"\n")


if __name__ == "__main__":
    typer.run(main)
