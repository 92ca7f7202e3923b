"""Models are uploaded to and opened from a stand-in of the hub, online and from its cache; errors name the way out."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.repocard import metadata_load
from typer.testing import CliRunner

import diffusify
from diffusify.cli import app
from diffusify.models.bundled import find_diffusion_config
from diffusify.models.lora import adapter_base
from diffusify.models.recipe import Recipe
from diffusify.models.saving import load_denoiser, open_base
from tests.models.hub_server import TOKEN, HubServer, hub_server

SMALL = {"steps": 1, "length": 32, "held_out": 64, "bf16": False}


@pytest.fixture(scope="module")
def model(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bidirectional model."""
    out = tmp_path_factory.mktemp("models") / "ar"
    return diffusify.adapt(causal_base, corpus, out, recipe=diffusify.ar(), **SMALL)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in of the hub, with an empty cache and a token."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield server
        close_session()


@pytest.fixture
def disconnect(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forbids all requests, as HF_HUB_OFFLINE=1 does."""

    def disconnect() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()

    return disconnect


def upload(hub: HubServer, folder: Path | str, name: str) -> None:
    """Put the files of a folder into a repository."""
    hub.repositories[name] = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_a_pushed_model_opens_by_its_name_also_from_the_cache(
    model: Path, hub: HubServer, disconnect: Callable[[], None]
) -> None:
    (model / "texts.jsonl").touch()  # as `reinforce` writes
    assert diffusify.push_to_hub(model, "lab/tiny") == f"{hub.address}/lab/tiny"
    uploaded = hub.repositories["lab/tiny"]
    assert {"README.md", "config.json", "diffusion_config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded)
    assert not {"run.json", "training.json", "run.lock", "metrics.jsonl", "texts.jsonl"} & set(uploaded)
    text = diffusify.load(model).infill("The cat[[3]] mat", seed=1, temperature=0.5).text
    for _ in range(2):
        assert diffusify.load("lab/tiny").infill("The cat[[3]] mat", seed=1, temperature=0.5).text == text
        disconnect()


def test_commands_take_the_name_of_a_pushed_model(model: Path, hub: HubServer) -> None:
    run = CliRunner()
    done = run.invoke(app, ["push", str(model), "lab/tiny", "--private"])
    assert done.exit_code == 0 and f"uploaded {hub.address}/lab/tiny" in done.stderr
    done = run.invoke(app, ["generate", "lab/tiny", "The cat", "--max-new-tokens", "4", "--preset", "fast"])
    assert done.exit_code == 0 and done.stdout.startswith("The cat"), done.output
    assert diffusify.load("lab/tiny").config == diffusify.load(model).config


def test_a_base_and_adapters_on_the_hub(
    causal_base: str, corpus: str, hub: HubServer, disconnect: Callable[[], None], tmp_path: Path
) -> None:
    upload(hub, causal_base, "lab/base")
    hub.repositories["lab/base"]["README.md"] = b"---\nlicense: mit\n---\n"
    folder = diffusify.adapt("lab/base", corpus, tmp_path / "lora", lora=diffusify.Lora(2), **SMALL)
    card = metadata_load(folder / "README.md") or {}
    assert (card["base_model"], card["license"]) == ("lab/base", "mit")
    diffusify.push_to_hub(folder, "lab/adapters")
    shutil.rmtree(folder)
    text = diffusify.load("lab/adapters").generate("The cat", max_new_tokens=6).text
    more = diffusify.adapt("lab/adapters", corpus, tmp_path / "more", **SMALL)  # training continues with the adapters
    assert adapter_base(more) == "lab/base" and open_base("lab/base").source == "lab/base"
    assert find_diffusion_config("lab/base") is None
    with pytest.raises(ValueError, match="lab/adapters holds adapters, and training continues with these"):
        diffusify.adapt("lab/adapters", corpus, tmp_path / "other", lora=diffusify.Lora(2), **SMALL)
    disconnect()
    assert diffusify.load("lab/adapters").generate("The cat", max_new_tokens=6).text == text


@pytest.mark.parametrize(
    ("recipe", "way_out"),
    [(diffusify.block(4), "merge them first: diffusify merge"), (diffusify.draft(4), "upload the base")],
)
def test_adapters_of_a_local_base_are_not_uploaded(
    recipe: Recipe, way_out: str, causal_base: str, corpus: str, hub: HubServer, tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    folder = diffusify.adapt(causal_base, corpus, out, recipe=recipe, lora=diffusify.Lora(2), **SMALL)
    with pytest.raises(ValueError, match=f"on this machine only; {way_out}"):
        diffusify.push_to_hub(folder, "lab/adapters")
    assert not hub.repositories


def test_a_folder_of_an_earlier_version_gets_its_model_card_when_it_is_uploaded(
    model: Path, hub: HubServer, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "earlier"))
    (folder / "README.md").unlink()
    diffusify.push_to_hub(folder, "lab/earlier")
    assert hub.repositories["lab/earlier"]["README.md"].startswith(b"---\n")


def test_what_is_no_model_on_the_hub_is_refused(
    causal_base: str, hub: HubServer, disconnect: Callable[[], None]
) -> None:
    upload(hub, causal_base, "lab/base")
    assert diffusify.load("lab/base").config.recipe == "as_is"
    with pytest.raises(ValueError, match=r"no diffusion_config.json.*`diffusify adapt lab/base --out DIR`"):
        load_denoiser("lab/base")
    hub.repositories["lab/dream"] = {"config.json": b'{"model_type": "Dream", "auto_map": {}}'}
    with pytest.raises(ValueError, match=r"no diffusion_config.json.*`diffusify import lab/dream --out DIR`"):
        diffusify.load("lab/dream")
    with pytest.raises(ValueError, match=r"lab/nothing is neither a folder nor a repository.*`hf auth login`"):
        diffusify.load("lab/nothing")
    disconnect()
    with pytest.raises(ValueError, match=r"lab/nothing is neither .* the hub cannot be reached.*HF_HUB_OFFLINE"):
        diffusify.load("lab/nothing")


def test_a_refused_upload_names_the_way_out(model: Path, hub: HubServer, disconnect: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=r"could not be uploaded to lab/tiny.*log in with `hf auth login`"):
        diffusify.push_to_hub(model, "lab/tiny", token="hf_wrong")
    disconnect()
    with pytest.raises(ValueError, match=r"could not be uploaded to lab/tiny.*that the network works"):
        diffusify.push_to_hub(model, "lab/tiny")


def test_only_diffusion_models_are_uploaded(causal_base: str, hub: HubServer) -> None:
    with pytest.raises(ValueError, match="holds no diffusion_config.json"):
        diffusify.push_to_hub(causal_base, "lab/base")
    assert not hub.repositories
