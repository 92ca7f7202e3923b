"""Settings and fixtures of all tests: offline, one thread, with types and shapes checked on every call."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

# The libraries read these when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import jaxtyping._decorator
import jaxtyping._storage
import torch
from greenlet import getcurrent
from jaxtyping import install_import_hook


class PerGreenletStorage:
    """jaxtyping's storage of bound axis sizes, per greenlet instead of per thread: the server's requests interleave."""

    @property
    def memo_stack(self) -> list:
        return getcurrent().__dict__.setdefault("jaxtyping_shapes", [])


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that remembers its results for hashable arguments."""
    remembered = lru_cache(maxsize=None)(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)

    return call


jaxtyping._storage._shape_storage = PerGreenletStorage()  # pyright: ignore[reportAttributeAccessIssue]
# Nested functions are decorated at every call of the outer one, which takes milliseconds if the checks are built anew.
for name in ("_make_fn_with_signature", "_apply_typechecker"):
    setattr(jaxtyping._decorator, name, cached(getattr(jaxtyping._decorator, name)))
torch.set_num_threads(1)
install_import_hook("diffusify", "beartype.beartype")

import pytest
from hypothesis import settings

from tests.families import tiny_network
from tests.text import makers

settings.register_profile("tests", deadline=None)  # no test measures time
settings.load_profile("tests")

TEXT = [f"The cat number {i} sat on the mat, and the dog ran over the lazy fox. It is so! " * 4 for i in range(24)]


def pytest_collection_finish() -> None:
    """Exempt what the imports made from garbage collection, which accelerate runs in full after every training."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def blank_curves() -> Iterator[None]:
    """Save empty files as `curve.png`: drawing takes most of a tiny run's time. See test_curve.py for real curves."""
    metrics_log = sys.modules.get("diffusify.training.metrics_log")
    with pytest.MonkeyPatch.context() as patch:
        if metrics_log is not None:
            patch.setattr(metrics_log, "draw_curve", lambda log, tokens_per_step, path: path.touch())
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a small jsonl file of texts."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return str(path)


@pytest.fixture(scope="session")
def causal_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a folder with a tiny random Llama and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    makers.byte_level().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def masked_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a folder with a tiny random BERT and a word-piece tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "bert"
    tiny_network("bert", vocab_size=200).save_pretrained(folder)
    makers.word_piece().tokenizer.save_pretrained(folder)
    return str(folder)
