"""Models that are opened on request."""

import asyncio
import shutil
from pathlib import Path
from threading import Event

import httpx
import pytest

from diffusify.models.saving import save_denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.app import create_app
from diffusify.serving.engine.engine import Engine
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_pool import ModelPool
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


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder; give the one that contains the folders"):
        create_app({}, folder=tmp_path / "nowhere")


def test_an_invalid_config_hides_no_other_model(folder: Path) -> None:
    (folder / "two" / "diffusion_config.json").write_text("{}")
    with running(create_app({}, folder=folder)) as address, httpx.Client(base_url=f"{address}/v1") as client:
        assert [model["id"] for model in client.get("models").json()["data"]] == ["one"]
        answer = client.get("models/two")
        assert answer.status_code == 400 and "is not a valid diffusion config" in answer.json()["error"]["message"]


def test_open_models_do_not_wait_for_one_that_is_opened(folder: Path) -> None:
    opening, go_on = Event(), Event()

    def opener(path: str) -> DiffusionLM:
        if Path(path).name == "two":
            opening.set()
            assert go_on.wait(60)
        return tiny_lm(infills=False)

    async def use(pool: ModelPool) -> None:
        await pool.get("one")
        second = asyncio.create_task(pool.get("two"))
        await asyncio.to_thread(opening.wait, 60)
        try:
            await asyncio.wait_for(pool.get("one"), 60)
            assert not second.done()
        finally:
            go_on.set()
        assert await second is pool.engine.queues["two"].lm

    asyncio.run(use(ModelPool(Engine({}, metrics=Metrics()), folder, opener=opener)))


def test_a_corrupt_folder_is_an_error(folder: Path) -> None:
    (folder / "two" / "model.safetensors").write_bytes(b"")
    with running(create_app({}, folder=folder)) as address:
        body = {"model": "two", "prompt": "The"}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400
        assert httpx.post(f"{address}/v1/completions", json=body | {"model": "one"}).status_code == 200
