"""A server under load: throughput compared with one request at a time, latency, memory, and clients that disconnect.

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
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    requests: Annotated[int, typer.Option(help="Number of requests under load.")] = 200,
    clients: Annotated[int, typer.Option(help="Number of concurrent clients.")] = 32,
    serial: Annotated[int, typer.Option(help="Number of requests sent one by one.")] = 16,
    warm: Annotated[int, typer.Option(help="Number of small warm-up requests before memory is measured.")] = 2000,
    flat: Annotated[int, typer.Option(help="Number of small requests while memory is measured.")] = 1000,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "bfloat16",
) -> None:
    """Measure, and save the numbers."""
    with server(model, dtype) as (address, process):
        found = asyncio.run(measure(address, process.pid, requests, clients, serial, warm, flat))
    print(json.dumps(found, indent=2))
    print("wrote", save("serving", f"python benchmarks/serving.py {model}", 0, {"dtype": dtype, **found}))


@contextmanager
def server(model: str, dtype: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`diffusify serve` in a separate process."""
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


def make_request(number: int) -> dict[str, Any]:
    """A random request: greedy or sampled, stepwise or lossless, 16 to 64 tokens."""
    rng = random.Random(number)
    variants: list[dict[str, Any]] = [
        {"tolerance": 0.0},
        {},
        {"threshold": 0.7},
        {"temperature": 0.8},
        {"tolerance": 0.7},
    ]
    request = {"model": "m", "prompt": rng.choice(PROMPTS), "max_tokens": rng.choice([16, 32, 48, 64]), "seed": number}
    return request | {"temperature": 0.0} | rng.choice(variants)


async def measure(
    address: str, pid: int, requests: int, clients: int, serial: int, warm: int, flat: int
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await send(client, make_request(0))
        one_by_one = [await send(client, make_request(number)) for number in range(serial)]
        serial_rate = sum(tokens for tokens, *_ in one_by_one) / sum(seconds for _, seconds, _ in one_by_one)
        start = perf_counter()
        loaded = await send_concurrently(client, [make_request(number) for number in range(requests)], clients)
        seconds = perf_counter() - start
        loaded_rate = sum(tokens for tokens, *_ in loaded) / seconds
        waits = sorted(seconds for _, seconds, _ in loaded)
        disconnected = await disconnect(client, 16)
        memory = await watch_memory(client, pid, warm, flat, clients)
    return {
        "serial": {"requests": serial, "tokens_per_second": round(serial_rate, 1)},
        "load": {
            "requests": requests,
            "clients": clients,
            "errors": sum(status != 200 for *_, status in loaded),
            "tokens_per_second": round(loaded_rate, 1),
            "times_serial": round(loaded_rate / serial_rate, 2),
            "seconds_median": round(statistics.median(waits), 2),
            "seconds_slowest": round(waits[-1], 2),
            "slowest_over_median": round(waits[-1] / statistics.median(waits), 2),
        },
        "vanished": disconnected,
        "memory": memory,
    }


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, float, int]:
    """Tokens, seconds and status of a request."""
    start = perf_counter()
    answer = await client.post("/v1/completions", json=body)
    tokens = answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else 0
    return tokens, perf_counter() - start, answer.status_code


async def send_concurrently(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], clients: int
) -> list[tuple[int, float, int]]:
    """All requests, a number of them at once."""
    turn = asyncio.Semaphore(clients)

    async def one(body: dict[str, Any]) -> tuple[int, float, int]:
        async with turn:
            return await send(client, body)

    return await asyncio.gather(*(one(body) for body in bodies))


async def disconnect(client: httpx.AsyncClient, count: int) -> dict[str, Any]:
    """Clients that disconnect early: the number of forward passes until none of their rows runs."""
    body = {"model": "m", "prompt": PROMPTS[0], "max_tokens": 400, "stream": True, "temperature": 0.0}

    async def begin() -> None:
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            await anext(stream.aiter_lines())

    await asyncio.gather(*(begin() for _ in range(count)))
    before = await read_metric(client, 'diffusify_forwards_total{model="m"}')
    while await read_metric(client, "diffusify_working_rows"):
        pass
    after = await read_metric(client, 'diffusify_forwards_total{model="m"}')
    return {"clients": count, "passes_until_free": int(after - before)}


async def read_metric(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


async def watch_memory(client: httpx.AsyncClient, pid: int, warm: int, count: int, clients: int) -> dict[str, Any]:
    """Resident memory at every quarter of many small requests, after warm-up requests of most shapes."""

    def resident() -> int:
        return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20)

    async def send_small(first: int, number: int) -> None:
        await send_concurrently(client, [make_request(first + i) | {"max_tokens": 4} for i in range(number)], clients)

    cold = resident()
    await send_small(0, warm)
    measured = [resident()]
    for quarter in range(4):
        await send_small(warm + quarter * count // 4, count // 4)
        measured.append(resident())
    return {"mib_cold": cold, "warm_requests": warm, "requests": count, "mib_at_each_quarter": measured}


if __name__ == "__main__":
    typer.run(main)
