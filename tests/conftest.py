"""What every test needs: no network, one thread, and types and shapes checked on every call."""

import json
import os

# Read when the libraries are imported, so set before.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import jaxtyping._storage
import torch
from greenlet import getcurrent
from jaxtyping import install_import_hook


class PerGreenlet:
    """The shapes of the calls that are under way. jaxtyping has them per thread, but the server's loops take turns."""

    @property
    def memo_stack(self) -> list:
        return getcurrent().__dict__.setdefault("jaxtyping_shapes", [])


jaxtyping._storage._shape_storage = PerGreenlet()  # pyright: ignore[reportAttributeAccessIssue]
torch.set_num_threads(1)
install_import_hook("diffusify", "beartype.beartype")

import pytest

from tests.families import tiny_network
from tests.text import makers

TEXT = [f"The cat number {i} sat on the mat, and the dog ran over the lazy fox. It is so! " * 4 for i in range(24)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small jsonl file of texts."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return str(path)


@pytest.fixture(scope="session")
def causal_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random Llama and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    makers.byte_level().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def masked_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random BERT and a word-piece tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "bert"
    tiny_network("bert", vocab_size=200).save_pretrained(folder)
    makers.word_piece().tokenizer.save_pretrained(folder)
    return str(folder)
