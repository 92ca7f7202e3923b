"""Slow, invalid and unauthorized requests get a clear error, and the server keeps running."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import httpx
import pytest

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.app import Limits, create_app
from tests.serving.models import running, serving, tiny_models

GOOD = {"model": "infiller", "prompt": "The cat", "max_tokens": 3}


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client
        assert client.post("/v1/completions", json=GOOD).status_code == 200  # the server still works


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "infiller", "prompt": "\xff\xfe"}', 400),
        (b"\xff\xfe\x00", 400),
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (b'{"model": "infiller", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "infiller", "prompt": "x", "temperature": 1e999}', 400),
        (b'{"model": "infiller", "prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", 400),
        (b'{"model": "infiller", "prompt": "x", "max_tokens": -1}', 400),
        (b'{"model": "infiller", "prompt": "x", "seed": 99999999999999999999999}', 400),
        (b'{"model": "infiller", "prompt": "x", "n": 1.5}', 400),
        (b'{"model": "infiller", "prompt": [99999999999999999999]}', 400),
        (b'{"model": "infiller", "prompt": [-1]}', 400),
        (b'{"model": "infiller", "prompt": []}', 400),
        (b'{"model": "infiller", "prompt": "\\ud800"}', 400),
        (b'{"model": "infiller", "prompt": "x", "logit_bias": {"-3": 1}}', 400),
        (b'{"model": "infiller", "prompt": "x", "logit_bias": {"9999999": 1}}', 400),
        (b'{"model": "infiller", "prompt": "x", "logit_bias": {"1": NaN}}', 400),
        (b'{"model": "infiller", "prompt": "x", "regex": "(a{1000}){1000}"}', 400),
        (b'{"model": "infiller", "prompt": "' + b"x" * 10_000_000 + b'"}', 413),
    ],
    ids=lambda value: repr(value[:50]) if isinstance(value, bytes) else value,
)
def test_invalid_requests(client: httpx.Client, body: bytes, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusify.text.regex_worker.MAX_SECONDS", 0.5)
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path", ["/v1/infill", "/v1/score", "/v1/alternatives", "/v1/tokenize", "/v1/chat/completions"]
)
@pytest.mark.parametrize("more", [{}, {"text": ""}, {"tokens": []}, {"tokens": [None]}, {"text": "[[", "position": 9}])
def test_incomplete_requests(client: httpx.Client, path: str, more: dict) -> None:
    answer = client.post(path, json={"model": "left-to-right"} | more)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_special_tokens_in_prompts_are_plain_text(client: httpx.Client) -> None:
    """Neither the mask token nor any other special token can be spelled in a prompt."""
    mask = tiny_models()["infiller"].tokenizer.tokenizer.mask_token
    answer = client.post("/v1/infill", json={"model": "infiller", "text": f"The {mask} [[2]] <|im_end|> cat"}).json()
    assert f"The {mask}" in answer["choices"][0]["text"] and "<|im_end|>" in answer["choices"][0]["text"]
    assert len(answer["choices"][0]["spans"]) == 1
    ids = client.post("/v1/tokenize", json={"model": "infiller", "text": f"{mask}"}).json()["tokens"]
    assert "".join(token["text"] for token in ids) == mask


def raw(address: str, sent: bytes) -> bytes:
    """What a client receives that sends these bytes and then waits until the server closes the connection."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
        return found


def test_connections_of_slow_clients_are_closed() -> None:
    """After half a line, half the headers, half a body, and half a request behind a whole one."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with running(create_app(tiny_models(), Limits(receive_timeout=0.3)), receive_timeout=0.3) as address:
        assert raw(address, b"") == b""
        assert raw(address, b"POST /v1/comp") == b""
        assert raw(address, head) == b""
        slow = raw(address, head + b"Content-Length: 100\r\n\r\n{")
        assert slow.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.3 s" in slow
        body = json.dumps(GOOD).encode()
        good = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        assert raw(address, good + head).count(b"HTTP/1.1 200") == 1
        assert httpx.post(f"{address}/v1/completions", json=GOOD).status_code == 200


def test_keys() -> None:
    with serving(keys=("secret", "other")) as address, httpx.Client(base_url=address) as client:
        for key in (b"", b"Bearer wrong", b"Bearer \xff"):
            headers = [(b"Authorization", key)]
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=headers).status_code == 401
        for key in ("secret", "other"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/health").json() == {"alive": True} and client.get("/ready").json() == {"ready": True}
        assert client.get("/").status_code == 200


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="a key is empty; give a secret"):
        create_app(tiny_models(), keys=("secret", ""))


def test_only_allowed_origins_may_send_requests(server: str) -> None:
    headers = {"Origin": "https://elsewhere.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{server}/v1/models", headers=headers).headers
    with serving(origins=("https://elsewhere.org",)) as address:
        answer = httpx.options(f"{address}/v1/models", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://elsewhere.org"


def test_failures_are_answered_and_counted(tmp_path: Path) -> None:
    """With the headers of other answers."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "diffusion_config.json").touch()

    def opener(path: str) -> DiffusionLM:
        raise RuntimeError("secret")

    app = create_app({}, folder=tmp_path, opener=opener, origins=("https://elsewhere.org",))
    with running(app) as address:
        answer = httpx.get(f"{address}/v1/models/broken", headers={"Origin": "https://elsewhere.org"})
        metrics = httpx.get(f"{address}/metrics").text
    assert answer.status_code == 500 and answer.json()["error"]["message"].startswith("internal server error; see")
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["access-control-allow-origin"]
    assert 'diffusify_requests_total{path="/v1/models/{name}",status="500"} 1.0' in metrics


@pytest.mark.parametrize("log_prompts", [False, True])
def test_logs(log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One line per request, with its body only if `log_prompts` is set."""
    with serving(log_prompts=log_prompts) as address:
        logging.getLogger("diffusify.serving").addHandler(caplog.handler)
        httpx.post(f"{address}/v1/completions", json=GOOD)
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "diffusify.serving"]
    logging.getLogger("diffusify.serving").removeHandler(caplog.handler)
    assert (line["path"], line["status"], line["model"], line["forwards"]) == ("/v1/completions", 200, "infiller", 3)
    assert ("The cat" in json.dumps(line)) == log_prompts


def test_metrics() -> None:
    lines = (
        'diffusify_requests_total{path="/v1/completions",status="200"} 1.0',
        'diffusify_requests_total{path="/v1/completions",status="404"} 1.0',
        'diffusify_tokens_total{model="infiller"} 3.0',
        'diffusify_forwards_total{model="infiller"} 3.0',
        "diffusify_waiting 0.0",
        "diffusify_working_rows 0.0",
    )
    with serving() as address, httpx.Client(base_url=address) as client:
        client.post("/v1/completions", json=GOOD)
        client.post("/v1/completions", json={"model": "nobody", "prompt": ""})
        missing = lines
        for _ in range(1000):  # a step is counted after its result is sent
            answer = client.get("/metrics").text
            missing = [line for line in lines if line not in answer]
            if not missing:
                break
    assert not missing


def test_requests_of_disconnected_clients_are_cancelled(server: str) -> None:
    """Also without a stream."""
    body = json.dumps(GOOD | {"max_tokens": 300}).encode()
    host, _, port = server.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while "diffusify_working_rows 1.0" not in httpx.get(f"{server}/metrics").text:
            pass
    deadline = monotonic() + 60
    while 'diffusify_requests_total{path="/v1/completions",status="499"}' not in httpx.get(f"{server}/metrics").text:
        assert monotonic() < deadline
    assert "diffusify_working_rows 0.0" in httpx.get(f"{server}/metrics").text
