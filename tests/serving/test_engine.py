"""Concurrent requests: each gets the answer that it gets alone, and none blocks the others for good."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.engine.engine import Engine, QueueFull
from diffusify.serving.engine.job import Job, QueuedJob
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_queue import ModelQueue
from tests.serving.models import serving, tiny_lm

POLICIES: list[dict[str, Any]] = [
    {}, {"threshold": 0.3}, {"policy": {"type": "Unmask", "rank": "Random"}}, {"policy": "Ancestral", "steps": 5},
    {"policy": "Rdm", "steps": 6}, {"policy": "ReMdm"}, {"policy": "Klass"}, {"top_k": 4},
    {"repetition_penalty": 1.3}, {"guidance": 0.5},
]  # fmt: skip
LENGTHS = [6, 24, 9, 16, 12, 20]


def mixed_requests() -> list[tuple[str, dict[str, Any]]]:
    """32 requests of all kinds, as path and body."""
    requests: list[tuple[str, dict[str, Any]]] = []
    for i in range(32):
        infills = i % 2 == 0
        body = dict(POLICIES[i // 2 % len(POLICIES)]) | {"seed": i, "temperature": [0.0, 1.0, 0.7][i % 3]}
        body |= {"model": "infiller" if infills else "left-to-right"}
        if infills and i % 4 == 0:
            body |= {"window": 16, "cache": "dual"} if not body.get("policy") else {}
        if not infills and i % 5 == 0:
            body = {"seed": i, "temperature": body["temperature"], "model": body["model"], "tolerance": 0.5}
        if infills and i % 3 == 0:
            requests.append(("infill", body | {"text": f"The cat [[{LENGTHS[i % 6] // 4 + 1}]] dog [[2-5]]."}))
        elif i % 7 == 1:
            messages = [{"role": "user", "content": "Is it so? " * (i % 4 + 1)}]
            requests.append(("chat/completions", body | {"messages": messages, "max_tokens": LENGTHS[i % 6]}))
        else:
            more = {"n": 2} if i % 6 == 5 else {}
            prompt = {"prompt": "The cat " * (i % 5), "max_tokens": LENGTHS[i % 6]}
            requests.append(("completions", body | more | prompt))
    return requests


def content(response: httpx.Response) -> dict[str, Any]:
    """The JSON of a response without what differs between equal requests.

    Lossless decoding takes more forward passes under load, since it drafts less where more texts share a pass.
    """
    assert response.status_code == 200, response.text
    found = {key: value for key, value in response.json().items() if key not in ("id", "created")}
    if "usage" in found:
        found["usage"] = {key: value for key, value in found["usage"].items() if "forward" not in key}
    return found


@pytest.mark.slow
def test_32_requests_together_are_32_requests_alone() -> None:
    requests = mixed_requests()
    assert len(requests) == 32

    async def run(address: str) -> tuple[list[dict], list[dict]]:
        async with httpx.AsyncClient(base_url=f"{address}/v1/", timeout=None) as client:
            together = await asyncio.gather(*(client.post(path, json=body) for path, body in requests))
            alone = [await client.post(path, json=body) for path, body in requests]
            return [content(response) for response in together], [content(response) for response in alone]

    with serving() as address:
        together, alone = asyncio.run(run(address))
        metrics = httpx.get(f"{address}/metrics").text
    for one, other, request in zip(together, alone, requests, strict=True):
        assert one == other, request
    shared = re.findall(r'batch_rows_bucket\{le="8.0",model="(.*?)"\} (\d+)', metrics)
    all_steps = re.findall(r'batch_rows_count\{model="(.*?)"\} (\d+)', metrics)
    assert all(int(few) < int(steps) for (_, few), (_, steps) in zip(shared, all_steps, strict=True))


def in_engine(work: Callable[[Engine], Awaitable[None]], **limits: Any) -> None:
    """Run requests on an engine in this process."""

    async def run() -> None:
        engine = Engine({"m": tiny_lm(infills=False)}, metrics=Metrics(), **limits)
        engine.start()
        try:
            await work(engine)
        finally:
            engine.stop()

    asyncio.run(run())


def job(length: int = 24, **more: Any) -> Job:
    return Job("m", lambda lm: lm.prepare_generation(["The cat"], length, SamplingConfig()), **more)


def test_a_cancelled_job_is_removed_before_the_next_pass() -> None:
    async def work(engine: Engine) -> None:
        batcher = engine.queues["m"].batcher
        stays = engine.submit(job(on_step=lambda step: step))
        cancelled = engine.submit(job(on_step=lambda _: batcher.passes))
        async for passes in cancelled:
            if passes == 3:
                cancelled.cancel()
        assert len(batcher.loops) == 1
        assert len((await stays.result()).results()) == 1
        steps = cancelled.work.forwards
        assert 3 <= steps <= 5 < stays.work.forwards

    in_engine(work)


def test_a_full_queue_says_when_to_retry() -> None:
    async def work(engine: Engine) -> None:
        first = [engine.submit(job()) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 requests are waiting, which is the limit; retry after 1 s"):
            engine.submit(job())
        for one in first:
            assert (await one.result()).results()[0].tokens == 24
        assert (await engine.submit(job()).result()).results()

    in_engine(work, waiting=3)


def test_deadlines() -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(TimeoutError, match="not finished within 1e-09 s"):
            await engine.submit(job(timeout=1e-9)).result()

    in_engine(work)


def test_requests_start_in_order_within_the_budget() -> None:
    """A long text waits until it fits, and later requests do not overtake it."""

    async def work(engine: Engine) -> None:
        seen: list[tuple[str, int]] = []

        async def generate(name: str, length: int) -> None:
            watched = job(length, on_step=lambda _: seen.append((name, engine.queues["m"].rows)))
            await engine.submit(watched).result()

        await asyncio.gather(generate("first", 15), generate("long", 60), generate("short", 30))
        assert list(dict.fromkeys(name for name, _ in seen)) == ["first", "long", "short"]
        assert all(rows <= 1 for _, rows in seen)  # only one of them fits into 100 positions
        with pytest.raises(ValueError, match="needs 1 x 103 tokens .* takes at most 100; request fewer or shorter"):
            await engine.submit(job(100)).result()

    in_engine(work, tokens=100)


def test_a_failing_request_fails_alone() -> None:
    async def work(engine: Engine) -> None:
        def fail(logits: Any, canvas: Any, positions: Any) -> Any:
            raise RuntimeError("failed")

        fails = Job("m", lambda lm: lm.prepare_generation(["The"], 8, SamplingConfig(logits_processor=fail)))
        good, failing = engine.submit(job()), engine.submit(fails)
        with pytest.raises(RuntimeError, match="failed"):
            await failing.result()
        assert (await good.result()).results()[0].tokens == 24
        assert engine.alive

    in_engine(work)


def test_the_pool_is_freed() -> None:
    queues = []

    async def work(engine: Engine) -> None:
        queues.extend(engine.queues.values())
        for _ in range(3):
            await asyncio.gather(*(engine.submit(job(length)).result() for length in (5, 30, 12)))

    in_engine(work)
    (queue,) = queues
    assert not queue.running and queue.batcher.pool.height == 0
    assert all(layer.keys is None for layer in queue.batcher.pool.layers)


def test_the_pool_keeps_to_the_budget_under_steady_load() -> None:
    """A long text follows many short ones and short ones follow it, all of them while others are running."""
    queue = ModelQueue("m", tiny_lm(infills=False), tokens=500)
    settings, largest, last = SamplingConfig(threshold=1.0), 0, 0

    def generate(length: int) -> QueuedJob:
        one = QueuedJob("m", lambda lm: lm.prepare_generation(["The cat"], length, settings))
        queue.receive(one)
        return one

    lengths = [40, *range(4, 20), 200, *[9] * 40]
    jobs = [generate(length) for length in lengths]
    while queue.waiting or queue.running:
        queue.admit()
        last = max(last, len(queue.running) if jobs[17].ended else 0)
        queue.step()
        keys = queue.batcher.pool.layers[0].keys
        largest = max(largest, 0 if keys is None else keys.shape[0] * (keys.shape[2] - 1))
    assert [one.work.results()[0].tokens for one in jobs] == lengths
    assert last > 12 and largest <= 500


@pytest.mark.slow
def test_a_terminated_server_answers_accepted_requests(causal_base: str) -> None:
    """After SIGTERM every accepted request gets its whole answer."""
    command = [sys.executable, "-m", "diffusify", "serve", f"tiny={causal_base}", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:[1-9]\d*", line)))

        async def load() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=address, timeout=None) as client:
                body = {"model": "tiny", "prompt": "The", "max_tokens": 50, "temperature": 0}
                rest = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(8)]
                async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                    lines = stream.aiter_lines()
                    await anext(lines)
                    process.send_signal(signal.SIGTERM)
                    text = [line async for line in lines]
                assert text[-2:] == ["data: [DONE]", ""] or text[-1] == "data: [DONE]"
                return await asyncio.gather(*rest)

        answers = asyncio.run(load())
        assert [json.loads(answer.text)["usage"]["completion_tokens"] for answer in answers] == [50] * 8
        process.stderr.read()
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn ends by the signal itself
