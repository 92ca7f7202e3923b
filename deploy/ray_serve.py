"""Serves models on several machines behind one address with Ray Serve. Each replica is a complete server.

MODELS=demo=runs/demo REPLICAS=2 serve run deploy.ray_serve:app
"""

import os

from fastapi import FastAPI
from ray import serve

import diffusify
from diffusify.cli.serve import model_names
from diffusify.serving.api.app import create_app


def build() -> FastAPI:
    """The server of one replica. It runs in the replica, which opens the models itself."""
    sources = model_names(os.environ["MODELS"].split(","))
    return create_app({name: diffusify.load(source) for name, source in sources.items()})


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "2")),
    max_ongoing_requests=64,  # the replica's engine batches them
    ray_actor_options={
        "num_cpus": float(os.environ.get("CPUS", "1")),
        "num_gpus": float(os.environ.get("GPUS", "0")),
        "runtime_env": {"env_vars": {"MODELS": os.environ.get("MODELS", "")}},
    },
)
@serve.ingress(build)
class Replica:
    """One server."""


app = Replica.bind()
