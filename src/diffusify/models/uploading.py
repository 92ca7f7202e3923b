"""Uploads of saved models to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from diffusify.config import DiffusionConfig
from diffusify.models.bundled import resolve_model
from diffusify.models.lora import adapter_base
from diffusify.models.model_card import write_model_card

# What only the training run needs, and hidden files.
_NOT_UPLOADED = ["run.json", "run.lock", "training.json", "metrics.jsonl", "texts.jsonl", "checkpoint-*", ".*"]


def push_to_hub(
    model: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a diffusion model",
) -> str:
    """Upload a saved model to the repository `repo_id` (OWNER/NAME) of the Hugging Face Hub. Returns its address.

    The repository is made if there is none; `private` is as in `transformers`. `diffusify.load(repo_id)` opens it. The
    settings, the logs and the sampled texts of the training run are not uploaded. ValueError if `model` is not a
    diffusion model, if its adapters need a base on this machine, or if the hub refuses the upload.
    """
    folder = resolve_model(model)
    config = DiffusionConfig.load(folder)  # raises if this is not a diffusion model
    base = adapter_base(folder)
    if base is not None and (Path(base).is_absolute() or Path(base).exists()):
        way_out = f"merge them first: diffusify merge {model} --out DIR"
        if config.adapters == "masks":  # these cannot be merged
            way_out = (
                "upload the base as well, and give its name there in adapter_config.json and diffusion_config.json"
            )
        raise ValueError(f"{model} holds adapters for the base {base}, which is on this machine only; {way_out}")
    write_model_card(folder, folder)
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=_NOT_UPLOADED,
        )
    except Exception as error:  # the HTTP library has exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{model} could not be uploaded to {repo_id} on the hub ({reason}); log in with `hf auth login` or set "
            "HF_TOKEN, and check that you may write to OWNER/NAME and that the network works"
        ) from error
    return str(repository)
