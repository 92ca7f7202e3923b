"""Runs of several processes, started from a fork server that has everything imported."""

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

TIMEOUT = 100  # seconds
ANY_FREE_PORT = 0
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
    "logging_steps": 1, "save_strategy": "no", "seed": 1, "optim": "sgd", "learning_rate": 0.01,
    "lr_scheduler_type": "constant", "ddp_find_unused_parameters": False,
}  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.worlds", "diffusify.reinforcement.reinforce"])
torch.set_num_threads(1)


def start_process(function: Callable[..., None], *args: Any) -> Any:
    """Start a process that calls a function of this module."""
    process = _context.Process(target=_with_timeout, args=(function, *args))
    process.start()
    return process


def _with_timeout(function: Callable[..., None], *args: Any) -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # shows where a process hangs
    function(*args)


def run_world(size: int, function: Callable[..., None], *args: Any) -> list[int | None]:
    """The exit codes of `size` ranks that call a function of this module."""
    with socket.socket() as free:
        free.bind(("localhost", ANY_FREE_PORT))
        port = free.getsockname()[1]
    processes = [start_process(_run_rank, rank, size, port, function, *args) for rank in range(size)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def fork_ranks(size: int, function: Callable[[int], None], folder: Path) -> list[int | None]:
    """The exit codes of `size` forks of this process that call a function with their rank, in one process group.

    Much faster than `run_world`, but a fork must not use the thread pools of this process (tokenizers, datasets).
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run_fork, args=(rank, size, function, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run_fork(rank: int, size: int, function: Callable[[int], None], folder: Path) -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    function(rank)
    torch.distributed.destroy_process_group()


def _run_rank(rank: int, size: int, port: int, function: Callable[..., None], *args: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    function(*args)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def make_trainer(
    base: str,
    corpus: str,
    out: Path,
    *,
    sharded: bool = False,
    minutes: float | None = None,
    **options: Any,
) -> Any:
    """A trainer of a tiny network with the recipe block(4), optionally with sharded weights (FSDP2)."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    from diffusify.models.loading import load_base
    from diffusify.models.make_denoiser import make_denoiser
    from diffusify.models.recipes import block
    from diffusify.text.packing import pack
    from diffusify.text.sources import load_texts
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
    if sharded:  # accelerate shards on accelerators only, though PyTorch can on CPUs
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


def train_and_save(base: str, corpus: str, out: Path, options: dict[str, Any]) -> None:
    """Train, and save the log and the whole model in `out`. `prepare` is called with the trainer before."""
    resume, prepare = options.pop("resume", False), options.pop("prepare", None)
    trainer = make_trainer(base, corpus, out, **options)
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    weights_sharded = [isinstance(weight, DTensor) for weight in trainer.denoiser.parameters()]
    layers_sharded = [isinstance(layer, FSDPModule) for layer in trainer.denoiser.network.model.layers]
    assert set(weights_sharded + layers_sharded) == {bool(options.get("sharded"))}
    trainer.save_model(str(out / "model"))
    if rank() == 0:
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))


def losses(out: Path) -> list[float]:
    """The loss of every step of a run of `train_and_save`."""
    return [entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]


def nan_loss_at_last_rank(trainer: Any) -> None:
    """Make the loss NaN in the second step, on the last rank and in its last micro-batch."""
    real, steps = trainer.compute_loss, []

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        steps.append(trainer.state.global_step)
        loss = real(*args, **kwargs)
        return loss * float("nan") if rank() and steps.count(1) == trainer.args.gradient_accumulation_steps else loss

    trainer.compute_loss = compute_loss


def sigterm_at_last_rank(trainer: Any) -> None:
    """Send SIGTERM to the last rank in the middle of the second step."""
    real = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if rank() and trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    trainer.training_step = training_step


def full_disk_at_first_rank(trainer: Any) -> None:
    """Make saving of the second checkpoint fail, on the rank that writes it."""
    from diffusify.training.resilience import resilient

    real = resilient.save_denoiser

    def save_denoiser(*args: Any, **kwargs: Any) -> None:
        if rank() == 0 and trainer.state.global_step == 2 and not trainer.state.log_history[-1].get("train_loss"):
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    resilient.save_denoiser = save_denoiser


def slower_clock_at_last_rank(trainer: Any) -> None:
    """Make every step take a second longer on the last of two ranks."""
    from diffusify.training import budget

    real = budget.perf_counter
    calls = itertools.count()
    budget.perf_counter = lambda: real() + rank() * next(calls)


def adapt_until_killed(step: int | None, base: str, corpus: str, out: Path, options: dict[str, Any]) -> None:
    """Run `adapt`, and send SIGKILL to this process at the end of a step; None: never."""
    from rich.console import Console

    from diffusify.training.adapt import adapt
    from diffusify.training.budget import Budget

    real = Budget.on_step_end

    def on_step_end(budget: Budget, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(budget, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Budget.on_step_end = on_step_end  # pyright: ignore[reportAttributeAccessIssue]
    adapt(base, corpus, out, console=Console(quiet=True), **options)


def reinforce_until_killed(model: str, data: str, out: Path, options: dict[str, Any]) -> None:
    """Run `reinforce` until the test kills this process."""
    from rich.console import Console

    from diffusify.reinforcement.reinforce import reinforce

    reinforce(model, data, out, console=Console(quiet=True), **options)
