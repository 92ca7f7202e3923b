"""A server under load: throughput against one request at a time, waiting, memory, and clients that vanish.

python serving.py MODEL [--requests 200] [--clients 32]
"""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import httpx
import typer
from machine import save

PROMPTS = [
    "The with statement is used to", "A function definition is", "When an exception is raised", "The import statement",
    "A string literal", "Classes can be", "The value of a lambda expression", "Generators are",
]  # fmt: skip


def main(
    model: Annotated[str, typer.Argument(help="A model's folder.")],
    requests: Annotated[int, typer.Option(help="How many under load.")] = 200,
    clients: Annotated[int, typer.Option(help="How many at once.")] = 32,
    serial: Annotated[int, typer.Option(help="How many one by one.")] = 16,
    warm: Annotated[int, typer.Option(help="How many small ones before memory is watched.")] = 2000,
    flat: Annotated[int, typer.Option(help="How many small ones to watch memory by.")] = 1000,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
) -> None:
    """Measure, and save the numbers."""
    with server(model, dtype) as (address, process):
        found = asyncio.run(measure(address, process.pid, requests, clients, serial, warm, flat))
    print(json.dumps(found, indent=2))
    print("wrote", save("serving", "python benchmarks/serving.py MODEL", 0, {"dtype": dtype, **found}))


@contextmanager
def server(model: str, dtype: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`diffusify serve` in a process of its own."""
    command = [sys.executable, "-m", "diffusify", "serve", f"m={model}", "--port", "0", "--dtype", dtype]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stderr is not None
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:[1-9]\d*", line)))
        drain = asyncio.new_event_loop().run_in_executor(None, process.stderr.read)
        try:
            yield address, process
        finally:
            process.terminate()
            del drain


def asked(number: int) -> dict[str, Any]:
    """Of all sorts: greedy and drawn, stepwise and lossless, 16 to 64 tokens."""
    luck = random.Random(number)
    ways: list[dict[str, Any]] = [{"tolerance": 0.0}, {}, {"threshold": 0.7}, {"temperature": 0.8}, {"tolerance": 0.7}]
    plain = {"model": "m", "prompt": luck.choice(PROMPTS), "max_tokens": luck.choice([16, 32, 48, 64]), "seed": number}
    return plain | {"temperature": 0.0} | luck.choice(ways)


async def measure(
    address: str, pid: int, requests: int, clients: int, serial: int, warm: int, flat: int
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await ask(client, asked(0))
        one_by_one = [await ask(client, asked(number)) for number in range(serial)]
        alone = sum(tokens for tokens, *_ in one_by_one) / sum(seconds for _, seconds, _ in one_by_one)
        begun = perf_counter()
        loaded = await crowd(client, [asked(number) for number in range(requests)], clients)
        took = perf_counter() - begun
        together = sum(tokens for tokens, *_ in loaded) / took
        waits = sorted(seconds for _, seconds, _ in loaded)
        gone = await vanish(client, 16)
        memory = await watch_memory(client, pid, warm, flat, clients)
    return {
        "serial": {"requests": serial, "tokens_per_second": round(alone, 1)},
        "load": {
            "requests": requests,
            "clients": clients,
            "errors": sum(status != 200 for *_, status in loaded),
            "tokens_per_second": round(together, 1),
            "times_serial": round(together / alone, 2),
            "seconds_median": round(statistics.median(waits), 2),
            "seconds_slowest": round(waits[-1], 2),
            "slowest_over_median": round(waits[-1] / statistics.median(waits), 2),
        },
        "vanished": gone,
        "memory": memory,
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, float, int]:
    """Tokens, seconds and status."""
    begun = perf_counter()
    answer = await client.post("/v1/completions", json=body)
    tokens = answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else 0
    return tokens, perf_counter() - begun, answer.status_code


async def crowd(client: httpx.AsyncClient, bodies: list[dict[str, Any]], clients: int) -> list[tuple[int, float, int]]:
    """All of them, so many at once."""
    turn = asyncio.Semaphore(clients)

    async def one(body: dict[str, Any]) -> tuple[int, float, int]:
        async with turn:
            return await ask(client, body)

    return await asyncio.gather(*(one(body) for body in bodies))


async def vanish(client: httpx.AsyncClient, count: int) -> dict[str, Any]:
    """Clients that go away in the middle: how many passes until no row of theirs is at work."""
    body = {"model": "m", "prompt": PROMPTS[0], "max_tokens": 400, "stream": True, "temperature": 0.0}

    async def begin() -> None:
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            await anext(stream.aiter_lines())

    await asyncio.gather(*(begin() for _ in range(count)))
    before = await gauge(client, 'diffusify_forwards_total{model="m"}')
    while await gauge(client, "diffusify_working_rows"):
        pass
    after = await gauge(client, 'diffusify_forwards_total{model="m"}')
    return {"clients": count, "passes_until_free": int(after - before)}


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


async def watch_memory(client: httpx.AsyncClient, pid: int, warm: int, count: int, clients: int) -> dict[str, Any]:
    """Resident memory at every quarter of many small requests, when passes of most shapes have been made."""

    def resident() -> int:
        return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20)

    async def some(first: int, many: int) -> None:
        await crowd(client, [asked(first + i) | {"max_tokens": 4} for i in range(many)], clients)

    cold = resident()
    await some(0, warm)
    seen = [resident()]
    for quarter in range(4):
        await some(warm + quarter * count // 4, count // 4)
        seen.append(resident())
    return {"mib_cold": cold, "warm_requests": warm, "requests": count, "mib_at_each_quarter": seen}


if __name__ == "__main__":
    typer.run(main)
