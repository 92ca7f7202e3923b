"""Tiny random models, bidirectional and block-causal, and servers for them in a thread of this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

from fastapi import FastAPI

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.app import create_app
from diffusify.serving.api.server import Server
from diffusify.text.tokenizer import TextTokenizer
from tests.families import tiny_network
from tests.text import makers


def tiny_lm(*, infills: bool, context: int = 320, tokenizer: TextTokenizer | None = None) -> DiffusionLM:
    """A random Llama as a diffusion model: a bidirectional one if it `infills`, else a block-causal one."""
    tokenizer = tokenizer or makers.byte_level()
    network = tiny_network("llama", vocab_size=len(tokenizer.tokenizer), max_position_embeddings=context)
    attention, recipe = (Bidirectional(), "ar") if infills else (BlockCausal(4), "block")
    config = DiffusionConfig(tokenizer.mask_token_id, 1, attention, "LlamaForCausalLM", recipe=recipe)
    return DiffusionLM(Denoiser(network, config).eval(), tokenizer)


def tiny_models() -> dict[str, DiffusionLM]:
    """The models of `serving`."""
    return {"infiller": tiny_lm(infills=True), "left-to-right": tiny_lm(infills=False)}


@contextmanager
def running(app: FastAPI, **settings: Any) -> Iterator[str]:
    """The address of a running server."""
    address: Queue[str] = Queue()
    server = Server(app, port=0, on_listening=address.put, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield address.get(timeout=60)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(first: str = "infiller", **settings: Any) -> Iterator[str]:
    """The address of a server with both tiny models, `first` listed first; `settings` are those of `create_app`."""
    models = tiny_models()
    with running(create_app({first: models.pop(first), **models}, **settings)) as address:
        yield address
