"""Tiny random models of the two kinds, and real servers that serve them."""

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
from tests.families import tiny_network
from tests.text import makers


def tiny_lm(*, infills: bool, context: int = 320) -> DiffusionLM:
    """A random Llama, adapted by nobody."""
    tokenizer = makers.byte_level()
    network = tiny_network("llama", vocab_size=len(tokenizer.tokenizer), max_position_embeddings=context)
    attention, recipe = (Bidirectional(), "ar") if infills else (BlockCausal(4), "block")
    card = DiffusionConfig(tokenizer.mask_token_id, 1, attention, "LlamaForCausalLM", recipe=recipe)
    return DiffusionLM(Denoiser(network, card).eval(), tokenizer)


def tiny_models() -> dict[str, DiffusionLM]:
    return {"infiller": tiny_lm(infills=True), "left-to-right": tiny_lm(infills=False)}


@contextmanager
def running(app: FastAPI, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    address: Queue[str] = Queue()
    server = Server(app, port=0, announce=address.put, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield address.get(timeout=60)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(first: str = "infiller", **settings: Any) -> Iterator[str]:
    models = tiny_models()
    with running(create_app({first: models.pop(first), **models}, **settings)) as address:
        yield address
