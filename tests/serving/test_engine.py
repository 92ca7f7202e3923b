"""Requests beside each other: each gets what it gets alone, and none holds up the others for ever."""

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
from diffusify.serving.engine.engine import Busy, Engine
from diffusify.serving.engine.job import Job
from diffusify.serving.engine.metrics import Metrics
from tests.serving.models import serving, tiny_lm

POLICIES: list[dict[str, Any]] = [
    {}, {"threshold": 0.3}, {"policy": {"type": "Unmask", "rank": "Random"}}, {"policy": "Ancestral", "steps": 5},
    {"policy": "Rdm", "steps": 6}, {"policy": "ReMdm"}, {"policy": "Klass"}, {"top_k": 4},
    {"repetition_penalty": 1.3}, {"guidance": 0.5},
]  # fmt: skip
LENGTHS = [8, 256, 17, 64, 33, 100]


def mixed() -> list[tuple[str, dict[str, Any]]]:
    """32 requests of every sort."""
    asked: list[tuple[str, dict[str, Any]]] = []
    for i in range(32):
        both_ways = i % 2 == 0
        wishes = dict(POLICIES[i // 2 % len(POLICIES)]) | {"seed": i, "temperature": [0.0, 1.0, 0.7][i % 3]}
        wishes |= {"model": "infiller" if both_ways else "left-to-right"}
        if both_ways and i % 4 == 0:
            wishes |= {"window": 16, "cache": "dual"} if not wishes.get("policy") else {}
        if not both_ways and i % 5 == 0:
            wishes = {"seed": i, "temperature": wishes["temperature"], "model": wishes["model"], "tolerance": 0.5}
        if both_ways and i % 3 == 0:
            asked.append(("infill", wishes | {"text": f"The cat [[{LENGTHS[i % 6] // 4 + 1}]] dog [[2-5]]."}))
        elif i % 7 == 1:
            messages = [{"role": "user", "content": "Is it so? " * (i % 4 + 1)}]
            asked.append(("chat/completions", wishes | {"messages": messages, "max_tokens": LENGTHS[i % 6]}))
        else:
            more = {"n": 2} if i % 6 == 5 else {}
            asked.append(
                ("completions", wishes | more | {"prompt": "The cat " * (i % 5), "max_tokens": LENGTHS[i % 6]})
            )
    return asked


def told(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in ("id", "created")}


def test_32_requests_together_are_32_requests_alone() -> None:
    asked = mixed()
    assert len(asked) == 32

    async def run(address: str) -> tuple[list[dict], list[dict]]:
        async with httpx.AsyncClient(base_url=f"{address}/v1/", timeout=None) as client:
            batcher = await asyncio.gather(*(client.post(path, json=body) for path, body in asked))
            alone = [await client.post(path, json=body) for path, body in asked]
            return [told(answer) for answer in batcher], [told(answer) for answer in alone]

    with serving() as address:
        batcher, alone = asyncio.run(run(address))
        metrics = httpx.get(f"{address}/metrics").text
    for one, other, request in zip(batcher, alone, asked, strict=True):
        assert one == other, request
    shared = re.findall(r'batch_rows_bucket\{le="8.0",model="(.*?)"\} (\d+)', metrics)
    all_steps = re.findall(r'batch_rows_count\{model="(.*?)"\} (\d+)', metrics)
    assert all(int(few) < int(steps) for (_, few), (_, steps) in zip(shared, all_steps, strict=True))


def in_engine(work: Callable[[Engine], Awaitable[None]], **limits: Any) -> None:
    """Run some requests on an engine in this process."""

    async def run() -> None:
        engine = Engine({"m": tiny_lm(infills=False)}, metrics=Metrics(), **limits)
        engine.start()
        try:
            await work(engine)
        finally:
            engine.stop()

    asyncio.run(run())


def job(room: int = 40, **more: Any) -> Job:
    return Job("m", lambda lm: lm.prepare_generation(["The cat"], room, SamplingConfig()), **more)


def test_who_is_cancelled_is_gone_before_the_next_pass() -> None:
    async def work(engine: Engine) -> None:
        batcher = engine.queues["m"].batcher
        stays, goes = engine.submit(job(listen=lambda step: step)), engine.submit(job(listen=lambda _: batcher.passes))
        async for passes in goes:
            if passes == 3:
                goes.cancel()
        assert len(batcher.loops) == 1
        assert len((await stays.done()).results()) == 1
        steps = goes.work.forwards
        assert 3 <= steps <= 5 < stays.work.forwards

    in_engine(work)


def test_a_full_line_says_when_to_come_again() -> None:
    async def work(engine: Engine) -> None:
        first = [engine.submit(job()) for _ in range(3)]
        with pytest.raises(Busy, match="3 requests are waiting, which is all that may; come again in 1 s"):
            engine.submit(job())
        for one in first:
            assert (await one.done()).results()[0].tokens == 40
        assert (await engine.submit(job()).done()).results()

    in_engine(work, waiting=3)


def test_deadlines() -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(TimeoutError, match="not done within 1e-09 s"):
            await engine.submit(job(seconds=1e-9)).done()

    in_engine(work)


def test_first_come_first_served_within_the_budget() -> None:
    """A long text waits for its turn, and what comes later does not overtake it."""

    async def work(engine: Engine) -> None:
        seen: list[tuple[str, int]] = []

        async def go(name: str, room: int) -> None:
            await engine.submit(job(room, listen=lambda _: seen.append((name, engine.queues["m"].rows)))).done()

        await asyncio.gather(go("first", 30), go("long", 120), go("short", 60))
        assert list(dict.fromkeys(name for name, _ in seen)) == ["first", "long", "short"]
        assert all(rows <= 1 for _, rows in seen)  # 200 positions have room for one of them
        with pytest.raises(ValueError, match="needs 1 texts of 203 tokens, but there is room for 200"):
            await engine.submit(job(200)).done()

    in_engine(work, tokens=200)


def test_a_failing_request_fails_alone() -> None:
    async def work(engine: Engine) -> None:
        def bad(logits: Any, canvas: Any, asked: Any) -> Any:
            raise RuntimeError("of its own")

        fails = Job("m", lambda lm: lm.prepare_generation(["The"], 8, SamplingConfig(logits_processor=bad)))
        good, failing = engine.submit(job()), engine.submit(fails)
        with pytest.raises(RuntimeError, match="of its own"):
            await failing.done()
        assert (await good.done()).results()[0].tokens == 40
        assert engine.alive

    in_engine(work)


def test_memory_is_given_back() -> None:
    queues = []

    async def work(engine: Engine) -> None:
        queues.extend(engine.queues.values())
        for _ in range(3):
            await asyncio.gather(*(engine.submit(job(room)).done() for room in (5, 60, 20)))

    in_engine(work)
    (queue,) = queues
    assert not queue.working and queue.batcher.pool.height == 0
    assert all(layer.keys is None for layer in queue.batcher.pool.layers)


def test_a_server_that_is_told_to_end_answers_first(causal_base: str) -> None:
    """SIGTERM under load: every request that was taken in gets its whole answer."""
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
