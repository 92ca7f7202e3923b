"""Several processes as one run, each forked from one that has everything imported."""

import faulthandler
import itertools
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

PATIENCE = 100  # seconds
PORT_OF_ANYBODY = 0
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
    "logging_steps": 1, "save_strategy": "no", "seed": 1, "optim": "sgd", "learning_rate": 0.01,
    "lr_scheduler_type": "constant", "ddp_find_unused_parameters": False,
}  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.worlds", "diffusify.training.adapt"])
torch.set_num_threads(1)


def start(function: Callable[..., None], *given: Any) -> Any:
    """One process at work on a function of this module."""
    process = _context.Process(target=_begin, args=(function, *given))
    process.start()
    return process


def _begin(function: Callable[..., None], *given: Any) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # who hangs says where
    function(*given)


def world(size: int, function: Callable[..., None], *given: Any) -> list[int | None]:
    """The exit codes of `size` processes that train as one."""
    with socket.socket() as free:
        free.bind(("localhost", PORT_OF_ANYBODY))
        port = free.getsockname()[1]
    processes = [start(_member, rank, size, port, function, *given) for rank in range(size)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _member(rank: int, size: int, port: int, function: Callable[..., None], *given: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    function(*given)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def trainer(
    base: str,
    corpus: str,
    out: Path,
    *,
    sharded: bool = False,
    minutes: float | None = None,
    **options: Any,
) -> Any:
    """A trainer of a tiny network in blocks of four, perhaps with its weights shared out (FSDP2)."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    from diffusify.models.loading import load_base
    from diffusify.models.recipes import block
    from diffusify.text.packing import pack
    from diffusify.text.sources import load_texts
    from diffusify.training.adapt import make_denoiser
    from diffusify.training.budget import Budget
    from diffusify.training.trainer import DiffusionTrainer

    source, recipe = load_base(base), block(4)
    denoiser, tokenizer = make_denoiser(source, recipe)
    texts = load_texts(corpus)
    assert isinstance(texts, Dataset)
    rows = pack(texts, tokenizer, 32)
    if sharded:
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
        }  # fmt: skip
    args = TrainingArguments(output_dir=str(out), **(SETTINGS | options))
    if sharded:  # accelerate shards on accelerators only; PyTorch does on CPUs, too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return DiffusionTrainer(
        denoiser,
        recipe,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        tokenizer=source.tokenizer,
        budget=Budget(minutes=minutes) if minutes else None,
    )


def learn(base: str, corpus: str, out: Path, options: dict[str, Any]) -> None:
    """Train, and leave the log and the whole model in `out`."""
    resume, prepare = options.pop("resume", False), options.pop("prepare", None)
    made = trainer(base, corpus, out, **options)
    if prepare is not None:
        prepare(made)
    made.train(resume_from_checkpoint=resume)
    shared = [isinstance(weight, DTensor) for weight in made.denoiser.parameters()]
    layers = [isinstance(layer, FSDPModule) for layer in made.denoiser.network.model.layers]
    assert set(shared + layers) == {bool(options.get("sharded"))}
    made.save_model(str(out / "model"))
    if rank() == 0:
        (out / "log.json").write_text(json.dumps(made.state.log_history))


def losses(out: Path) -> list[float]:
    """The loss of every step of a run that `learn` made."""
    return [entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]


def bad_step_at_last_rank(made: Any) -> None:
    """A NaN in the second step, in one process and in its last micro-batch."""
    real, seen = made.compute_loss, []

    def compute_loss(*given: Any, **more: Any) -> Any:
        seen.append(made.state.global_step)
        loss = real(*given, **more)
        return loss * float("nan") if rank() and seen.count(1) == made.args.gradient_accumulation_steps else loss

    made.compute_loss = compute_loss


def told_to_stop_at_last_rank(made: Any) -> None:
    """A polite kill, of one process, in the middle of the second step."""
    real = made.training_step

    def training_step(*given: Any, **more: Any) -> Any:
        if rank() and made.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **more)

    made.training_step = training_step


def full_disk_at_first_rank(made: Any) -> None:
    """The second checkpoint does not fit; only the process that writes it knows."""
    from diffusify.training.resilience import resilient

    real = resilient.save_denoiser

    def save_denoiser(*given: Any, **more: Any) -> None:
        if rank() == 0 and made.state.global_step == 2 and not made.state.log_history[-1].get("train_loss"):
            raise OSError(28, "No space left on device")
        real(*given, **more)

    resilient.save_denoiser = save_denoiser


def clocks_that_differ(made: Any) -> None:
    """For the second process a step takes a second more than for the first."""
    from diffusify.training import budget

    real = budget.perf_counter
    turns = itertools.count()
    budget.perf_counter = lambda: real() + rank() * next(turns)


def adapt_until(step: int | None, base: str, corpus: str, out: Path, options: dict[str, Any]) -> None:
    """A whole run, killed at the end of a step."""
    from rich.console import Console

    from diffusify.training.adapt import adapt
    from diffusify.training.budget import Budget

    real = Budget.on_step_end

    def on_step_end(budget: Budget, args: Any, state: Any, control: Any, **more: Any) -> None:
        real(budget, args, state, control, **more)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Budget.on_step_end = on_step_end  # pyright: ignore[reportAttributeAccessIssue]
    adapt(base, corpus, out, console=Console(quiet=True), **options)
