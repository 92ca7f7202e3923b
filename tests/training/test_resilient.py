"""What a run survives: signals, non-finite steps, corrupt files, a full disk, a second run in the same folder."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

from diffusify.training import run_folder
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget
from diffusify.training.metrics_log import MetricsLog
from diffusify.training.resilience.checkpoints import (
    MANIFEST,
    commit_checkpoint,
    find_corruption,
    newest_valid_checkpoint,
)
from diffusify.training.resilience.lock import locked
from diffusify.training.resilience.nonfinite import NonFiniteGuard
from diffusify.training.trainer import DiffusionTrainer
from tests.training.worlds import adapt_until_killed, start_process

TINY: dict[str, Any] = {
    "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "steps",
    "save_steps": 1, "logging_steps": 1,
}  # fmt: skip

ON_STEP_END = Budget.on_step_end


class Run:
    """A tiny run whose output is recorded, and in whose steps a test can interfere."""

    def __init__(self, base: str, corpus: str, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.base, self.corpus, self.out, self.patch = base, corpus, out, patch
        self.output = StringIO()

    def __call__(self, steps: int = 4, **options: Any) -> Path:
        console = Console(file=self.output, width=1000)
        return adapt(self.base, self.corpus, self.out, steps=steps, console=console, **(TINY | options))

    def at(self, step: int, action: Callable[[], None]) -> None:
        """Call `action` at the end of a step; replaces an earlier action."""

        def on_step_end(budget: Budget, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ON_STEP_END(budget, args, state, control, **kwargs)
            if state.global_step == step:
                action()

        self.patch.setattr(Budget, "on_step_end", on_step_end)

    def nan_in(self, *steps: int) -> None:
        """Make the loss NaN in these steps, in the second of two micro-batches."""
        real, calls = DiffusionTrainer.compute_loss, []

        def compute_loss(trainer: DiffusionTrainer, *args: Any, **kwargs: Any) -> Any:
            calls.append(trainer.state.global_step + 1)
            loss = real(trainer, *args, **kwargs)
            return loss * float("nan") if calls[-1] in steps and calls.count(calls[-1]) == 2 else loss

        self.patch.setattr(DiffusionTrainer, "compute_loss", compute_loss)

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("checkpoint-*"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(causal_base, corpus, tmp_path / "run", monkeypatch)


@pytest.fixture(scope="module")
def four_steps(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of four steps."""
    out = tmp_path_factory.mktemp("four-steps")
    return Run(causal_base, corpus, out, pytest.MonkeyPatch())()


@pytest.fixture
def undisturbed(causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A second run, to compare with."""
    return Run(causal_base, corpus, tmp_path / "undisturbed", monkeypatch)


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def limit_file_size(size: int) -> None:
    """Make writing of larger files fail as on a full disk; -1 removes the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def disk_space() -> Iterator[None]:
    """Removes the limit on file sizes after a test."""
    yield
    limit_file_size(-1)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, SystemExit), (signal.SIGUSR1, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_saves_a_checkpoint_to_resume_from(
    run: Run, four_steps: Path, number: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # as a shell does for background jobs
    try:
        run.at(2, lambda: signal.raise_signal(number))
        with pytest.raises(raised) as caught:
            run(save_strategy="no")
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert raised is KeyboardInterrupt or caught.value.args == (128 + number,)
    assert run.checkpoints == ["checkpoint-2"] and "checkpoint-2" in run.output.getvalue()
    run.at(0, lambda: None)
    assert same_weights(run(save_strategy="no"), four_steps)


def test_ctrl_c_twice_stops_at_once(run: Run) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run.at(2, twice)
    with pytest.raises(KeyboardInterrupt):
        run(save_strategy="no")
    assert run.checkpoints == []


def test_a_corrupt_checkpoint_is_reported_and_the_one_before_is_used(run: Run, four_steps: Path) -> None:
    run.at(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    assert run.checkpoints == ["checkpoint-2", "checkpoint-3"]
    file = run.out / "checkpoint-3" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run.at(0, lambda: None)
    assert same_weights(run(), four_steps)
    assert "checkpoint-3 is corrupt (optimizer.pt does not match its checksum)" in run.output.getvalue()
    assert f"resuming from {run.out / 'checkpoint-2'}" in run.output.getvalue()
    assert {path.name for path in four_steps.iterdir()} == {path.name for path in run.out.iterdir()}


def test_corruption_is_described(tmp_path: Path) -> None:
    def commit() -> Path:
        staged, checkpoint = tmp_path / "staged", tmp_path / "checkpoint-1"
        (staged / "shards").mkdir(parents=True)
        (staged / "shards" / "a.bin").write_bytes(b"0123")
        commit_checkpoint(staged, checkpoint)
        assert find_corruption(checkpoint) is None and not staged.exists()
        return checkpoint

    (commit() / "shards" / "a.bin").write_bytes(b"012")
    assert find_corruption(tmp_path / "checkpoint-1") == "shards/a.bin has 3 of 4 bytes"
    (commit() / "shards" / "a.bin").write_bytes(b"0124")
    assert find_corruption(tmp_path / "checkpoint-1") == "shards/a.bin does not match its checksum"
    (commit() / "shards" / "a.bin").unlink()
    assert find_corruption(tmp_path / "checkpoint-1") == "shards/a.bin is missing"
    (commit() / "manifest.json").write_text("{")
    assert find_corruption(tmp_path / "checkpoint-1") == "manifest.json is missing or not readable"


def test_an_error_names_all_corrupt_checkpoints(run: Run) -> None:
    run.at(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    for name in run.checkpoints:
        (run.out / name / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="all checkpoints .* are corrupt .*checkpoint-2: optimizer.pt is missing"):
        run()
    assert find_corruption(run.out / "checkpoint-2") and run.checkpoints == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path: Path) -> None:
    assert newest_valid_checkpoint(tmp_path, print) is None


def test_a_run_that_was_stopped_after_its_last_step_trains_no_further(run: Run, four_steps: Path) -> None:
    run.at(4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    assert run.checkpoints[-1] == "checkpoint-4"
    run.at(0, lambda: None)
    assert same_weights(run(), four_steps)
    assert [entry["step"] for entry in run.metrics if "loss" in entry] == [1, 2, 3, 4]


def test_non_finite_steps_change_nothing(run: Run) -> None:
    """The third of three steps is NaN: the weights and Adam's state in the checkpoint are those after two steps."""
    run.nan_in(3)
    two = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    run.at(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(**two)
    first, second = (run.out / f"checkpoint-{step}" for step in (2, 3))
    assert same_weights(first, second)
    before, after = (torch.load(folder / "optimizer.pt")["state"] for folder in (first, second))
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])
    state = json.loads((second / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["NonFiniteGuard"]["attributes"] == {"skipped": 1, "in_a_row": 1}
    losses = [entry for entry in run.metrics if "loss" in entry]
    assert losses[2]["loss"] is None and losses[2]["skipped"] == 1 and losses[1]["loss"] > 0


def test_the_guard_restores_its_counts() -> None:
    """Also those of an earlier version, whose guard had another name."""
    for name in ("NonFiniteGuard", "Guard"):
        guard, saved = NonFiniteGuard(), {name: {"args": {}, "attributes": {"skipped": 3, "in_a_row": 2}}}
        state = TrainerState()
        state.stateful_callbacks = saved  # pyright: ignore[reportAttributeAccessIssue]
        guard.on_train_begin(TrainingArguments(use_cpu=True, report_to="none"), state, TrainerControl())
        assert (guard.skipped, guard.in_a_row) == (3, 2)


def test_a_checkpoint_that_lacks_a_callback_is_resumed_and_saved_again(run: Run) -> None:
    """As those of earlier versions, whose guard had another name."""
    run.at(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    checkpoint = run.out / "checkpoint-2"
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["Guard"] = state["stateful_callbacks"].pop("NonFiniteGuard")
    file.write_text(json.dumps(state))
    (checkpoint / MANIFEST).unlink()
    commit_checkpoint(checkpoint.rename(run.out / "edited"), checkpoint)
    assert find_corruption(checkpoint) is None
    run.at(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    assert run.checkpoints[-1] == "checkpoint-3"
    state = json.loads((run.out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["NonFiniteGuard"]["attributes"] == {"skipped": 0, "in_a_row": 0}


def test_the_log_averages_over_steps_that_were_not_skipped(run: Run, undisturbed: Run) -> None:
    run.nan_in(2)
    two = {"gradient_accumulation_steps": 2, "logging_steps": 2, "steps": 2}
    run(**two)
    undisturbed(**(two | {"logging_steps": 1}))
    [both] = [entry for entry in run.metrics if "loss" in entry]
    first = next(entry for entry in undisturbed.metrics if "loss" in entry)
    assert both["loss"] == pytest.approx(first["loss"]) and both["nll"] > 0


def test_too_many_non_finite_steps_in_a_row_end_a_run(run: Run) -> None:
    run.nan_in(1, 3, 4, 5)
    with pytest.raises(FloatingPointError, match="not finite in 2 steps in a row.*checkpoint-4"):
        run(steps=6, gradient_accumulation_steps=2, max_skipped=2)
    assert same_weights(run.out / "checkpoint-3", run.out / "checkpoint-4")
    with pytest.raises(ValueError, match="max_skipped=0"):
        run(steps=6, gradient_accumulation_steps=2, max_skipped=0)


@pytest.fixture
def after_save(run: Run) -> Callable[[int, Callable[[], None]], None]:
    """A function that lets `action` be called after a step's checkpoint."""
    real = DiffusionTrainer._save_checkpoint

    def at(step: int, action: Callable[[], None]) -> None:
        def save(trainer: DiffusionTrainer, *args: Any) -> None:
            real(trainer, *args)
            if trainer.state.global_step == step:
                action()

        run.patch.setattr(DiffusionTrainer, "_save_checkpoint", save)

    return at


def test_a_full_disk_does_not_end_a_run(run: Run, four_steps: Path, disk_space: None, after_save: Any) -> None:
    def free_space() -> None:
        assert run.checkpoints == ["checkpoint-1"] and not (run.out / ".unfinished").exists()
        limit_file_size(-1)

    run.at(2, lambda: limit_file_size(20_000))  # less than the weights
    after_save(3, free_space)
    assert same_weights(run(), four_steps)
    for step in (2, 3):
        assert f"checkpoint-{step} could not be saved" in run.output.getvalue()
    assert f"the last checkpoint is {run.out / 'checkpoint-1'}; training continues" in run.output.getvalue()


def test_any_exception_while_saving_counts_as_a_full_disk(run: Run, four_steps: Path) -> None:
    """The tokenizers library raises a bare Exception."""
    real = PreTrainedTokenizerBase.save_pretrained

    def save(tokenizer: PreTrainedTokenizerBase, folder: Path, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint-2" in str(folder):
            raise Exception("No space left on device (os error 28)")
        return real(tokenizer, folder, *args, **kwargs)

    run.patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)
    assert same_weights(run(), four_steps)
    assert "checkpoint-2 could not be saved (Exception('No space left" in run.output.getvalue()


def test_a_first_checkpoint_that_does_not_fit_is_an_error(run: Run, disk_space: None) -> None:
    run.at(1, lambda: limit_file_size(20_000))
    with pytest.raises(OSError, match="checkpoint-1 could not be saved .* no earlier one"):
        run()


def test_a_model_that_cannot_be_saved_leaves_its_checkpoint(
    run: Run, four_steps: Path, disk_space: None, after_save: Any
) -> None:
    after_save(4, lambda: limit_file_size(20_000))
    with pytest.raises(OSError, match="could not be saved .*the last checkpoint is .*checkpoint-4"):
        run()
    limit_file_size(-1)
    assert not (run.out / "diffusion_config.json").exists()
    assert same_weights(run(), four_steps)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(run: Run) -> None:
    real = os.access
    run.patch.setattr(run_folder.os, "access", lambda path, mode: real(path, mode) and Path(path) != run.out.parent)
    run.patch.setattr("diffusify.training.adapt.open_base", lambda *args, **kwargs: pytest.fail("loaded the base"))
    with pytest.raises(ValueError, match="cannot be written to"):
        run()


def test_leftovers_of_a_finished_run_are_removed(run: Run) -> None:
    run(steps=1)
    before = {path.name for path in run.out.iterdir()}
    (run.out / "checkpoint-1").mkdir()
    (run.out / "run.lock").touch()
    run(steps=1)
    assert {path.name for path in run.out.iterdir()} == before


def hold_lock(folder: Path, is_held: Any) -> None:
    with locked(folder):
        is_held.set()
        time.sleep(60)


def test_two_runs_in_one_folder_are_refused(run: Run) -> None:
    run.out.mkdir()
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    holder = context.Process(target=hold_lock, args=(run.out, is_held))
    holder.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(ValueError, match=f"another run is using .*process {holder.pid} "):
            run()
    finally:
        holder.kill()
        holder.join()
    run(steps=1)
    assert not (run.out / "run.lock").exists()


def test_a_lock_is_released(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    assert not list(tmp_path.iterdir())


class Crash(BaseException):
    """An exception that nothing catches."""


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["crash", "kill"])
def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(run: Run, undisturbed: Run, killed: bool) -> None:
    options = {"steps": 4, **TINY, "save_steps": 2}
    undisturbed(**options)
    if killed:
        process = start_process(adapt_until_killed, 3, run.base, run.corpus, run.out, options)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    else:
        run.at(3, lambda: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run(**options)
        run.at(0, lambda: None)
    assert [entry["step"] for entry in run.metrics if "loss" in entry] == [1, 2]
    assert (run.out / "curve.png").exists()
    run(**options)

    def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry for entry in metrics if "train_runtime" not in entry]

    assert without_times(run.metrics) == without_times(undisturbed.metrics)
    assert without_times(run.metrics) == without_times(json.loads((run.out / "training.json").read_text())["log"])


def test_a_metrics_log_catches_up_after_a_full_disk(tmp_path: Path, disk_space: None) -> None:
    metrics_log, control = MetricsLog(tmp_path, 8), TrainerControl()
    state = TrainerState(log_history=[{"step": 1, "loss": 1.0}])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    metrics_log.on_train_begin(args, state, control)
    state.log_history.append({"step": 2, "loss": float("inf")})
    limit_file_size(30)
    metrics_log.on_log(args, state, control)
    limit_file_size(-1)
    state.log_history.append({"step": 3, "loss": 3.0})
    metrics_log.on_log(args, state, control)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, None, 3.0]


def test_a_reporter_that_is_not_installed_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="report_to=mlflow"):
        run(report_to="mlflow")
    assert not run.out.exists()
