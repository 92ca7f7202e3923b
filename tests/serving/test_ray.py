"""Two replicas behind one address, by Ray Serve."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffusify[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own


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


def test_two_replicas_answer_alike(address: str) -> None:
    from ray import serve  # pyright: ignore[reportMissingImports]

    body = {"model": "tiny", "prompt": "The cat", "max_tokens": 8, "temperature": 0}
    with httpx.Client(base_url=address, timeout=120) as client:
        told = [client.post("/v1/completions", json=body).json()["choices"] for _ in range(13)]
        assert all(one == told[0] for one in told) and told[0][0]["text"]
        asked = (client.get("/metrics").text for _ in range(30))
        counted = {str(re.findall(r"^diffusify_requests_total.*completions.*$", text, re.MULTILINE)) for text in asked}
    assert serve.status().applications["default"].deployments["Replica"].replica_states == {"RUNNING": 2}
    assert len(counted) == 2  # two servers, each of which counts its own: they cannot have answered half of 13 each
    assert os.environ["REPLICAS"] == "2"
