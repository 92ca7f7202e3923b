"""Two replicas behind one address with Ray Serve."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffusify[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # from Ray


@pytest.fixture
def address(causal_base: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from ray import serve  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("MODELS", f"tiny={causal_base}")
    monkeypatch.setenv("REPLICAS", "2")
    monkeypatch.setenv("CPUS", "0.5")
    path = Path(__file__).parents[2] / "deploy" / "ray_serve.py"
    spec = importlib.util.spec_from_file_location("ray_serve", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 18427})
    serve.run(module.app)
    yield "http://127.0.0.1:18427"
    serve.shutdown()
    ray.shutdown()


def test_two_replicas_give_equal_answers(address: str) -> None:
    from ray import serve  # pyright: ignore[reportMissingImports]

    body = {"model": "tiny", "prompt": "The cat", "max_tokens": 8, "temperature": 0}
    with httpx.Client(base_url=address, timeout=120) as client:
        choices = [client.post("/v1/completions", json=body).json()["choices"] for _ in range(13)]
        assert all(each == choices[0] for each in choices) and choices[0][0]["text"]
        pages = (client.get("/metrics").text for _ in range(30))
        counts = {str(re.findall(r"^diffusify_requests_total.*completions.*$", text, re.MULTILINE)) for text in pages}
    assert serve.status().applications["default"].deployments["Replica"].replica_states == {"RUNNING": 2}
    assert len(counts) == 2  # each server counts its own requests, and 13 requests cannot be split evenly
    assert os.environ["REPLICAS"] == "2"
