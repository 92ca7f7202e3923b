"""Models that are opened on request."""

import shutil
from pathlib import Path

import httpx
import pytest

from diffusify.models.saving import save_denoiser
from diffusify.serving.api.app import create_app
from tests.serving.models import running, tiny_lm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        lm = tiny_lm(infills=name == "two")
        save_denoiser(tmp_path / name, lm.denoiser, lm.tokenizer.tokenizer)
    (tmp_path / "no model").mkdir()
    return tmp_path


def test_models_are_opened_and_closed(folder: Path) -> None:
    with running(create_app({}, folder=folder, keep=1)) as address, httpx.Client(base_url=f"{address}/v1") as client:

        def listed() -> dict[str, bool]:
            return {one["id"]: "chats" in one["diffusion"] for one in client.get("models").json()["data"]}

        def complete(name: str) -> httpx.Response:
            return client.post("completions", json={"model": name, "prompt": "The", "max_tokens": 4, "temperature": 0})

        assert listed() == {"one": False, "two": False}
        first = complete("one").json()["choices"]
        assert listed() == {"one": True, "two": False}
        assert complete("two").status_code == 200
        assert listed() == {"one": False, "two": True}  # keep=1
        shutil.copytree(folder / "one", folder / "three")
        assert complete("three").json()["choices"] == first
        answer = complete("../one")
        assert answer.status_code == 404 and "is not served" in answer.json()["error"]["message"]
        assert client.get("models/two").json()["diffusion"]["infills"] is True


def test_a_corrupt_folder_is_an_error(folder: Path) -> None:
    (folder / "two" / "model.safetensors").write_bytes(b"")
    with running(create_app({}, folder=folder)) as address:
        body = {"model": "two", "prompt": "The"}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400
        assert httpx.post(f"{address}/v1/completions", json=body | {"model": "one"}).status_code == 200
