"""What a run survives: signals, bad steps, damaged files, a full disk, itself in the same folder."""

import json
import os
import resource
import signal
import subprocess
import sys
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
from diffusify.training.resilience.checkpoints import damage, newest_whole, publish
from diffusify.training.resilience.lock import locked
from diffusify.training.trainer import DiffusionTrainer
from tests.training.worlds import adapt_until, start

TINY: dict[str, Any] = {
    "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "steps",
    "save_steps": 1, "logging_steps": 1,
}  # fmt: skip

ON_STEP_END = Budget.on_step_end


class Run:
    """A tiny run, what it says, and what happens in its steps."""

    def __init__(self, base: str, corpus: str, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.base, self.corpus, self.out, self.patch = base, corpus, out, patch
        self.said = StringIO()

    def __call__(self, steps: int = 4, **options: Any) -> Path:
        console = Console(file=self.said, width=1000)
        return adapt(self.base, self.corpus, self.out, steps=steps, console=console, **(TINY | options))

    def at(self, step: int, act: Callable[[], None]) -> None:
        """Do something at the end of a step, and nothing else at any other."""

        def on_step_end(budget: Budget, args: Any, state: Any, control: Any, **more: Any) -> None:
            ON_STEP_END(budget, args, state, control, **more)
            if state.global_step == step:
                act()

        self.patch.setattr(Budget, "on_step_end", on_step_end)

    def spoil(self, *steps: int) -> None:
        """Not-a-number losses in these steps, in the second of two micro-batches."""
        real, seen = DiffusionTrainer.compute_loss, []

        def compute_loss(trainer: DiffusionTrainer, *given: Any, **more: Any) -> Any:
            seen.append(trainer.state.global_step + 1)
            loss = real(trainer, *given, **more)
            return loss * float("nan") if seen[-1] in steps and seen.count(seen[-1]) == 2 else loss

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
def whole(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of four steps makes, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    return Run(causal_base, corpus, out, pytest.MonkeyPatch())()


@pytest.fixture
def undisturbed(causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(causal_base, corpus, tmp_path / "undisturbed", monkeypatch)


def same(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def no_file_above(size: int) -> None:
    """As a disk that is nearly full would have it; -1 is a disk with room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def room() -> Iterator[None]:
    """Room on the disk after a test that had none."""
    yield
    no_file_above(-1)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, SystemExit), (signal.SIGUSR1, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_told_to_stop_it_saves_and_goes_on_later(
    run: Run, whole: Path, number: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # as a shell does to a job in the background
    try:
        run.at(2, lambda: signal.raise_signal(number))
        with pytest.raises(raised) as caught:
            run(save_strategy="no")
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert raised is KeyboardInterrupt or caught.value.args == (128 + number,)
    assert run.checkpoints == ["checkpoint-2"] and "checkpoint-2" in run.said.getvalue()
    run.at(0, lambda: None)
    assert same(run(save_strategy="no"), whole)


def test_ctrl_c_twice_stops_at_once(run: Run) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run.at(2, twice)
    with pytest.raises(KeyboardInterrupt):
        run(save_strategy="no")
    assert run.checkpoints == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run: Run, whole: Path) -> None:
    run.at(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    assert run.checkpoints == ["checkpoint-2", "checkpoint-3"]
    file = run.out / "checkpoint-3" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run.at(0, lambda: None)
    assert same(run(), whole)
    assert "checkpoint-3 is damaged (optimizer.pt is not what was written)" in run.said.getvalue()
    assert f"going on from {run.out / 'checkpoint-2'}" in run.said.getvalue()
    assert {path.name for path in whole.iterdir()} == {path.name for path in run.out.iterdir()}


def test_damage_is_told(tmp_path: Path) -> None:
    def fresh() -> Path:
        draft, there = tmp_path / "draft", tmp_path / "checkpoint-1"
        (draft / "shards").mkdir(parents=True)
        (draft / "shards" / "a.bin").write_bytes(b"0123")
        publish(draft, there)
        assert damage(there) is None and not draft.exists()
        return there

    (fresh() / "shards" / "a.bin").write_bytes(b"012")
    assert damage(tmp_path / "checkpoint-1") == "shards/a.bin has 3 of 4 bytes"
    (fresh() / "shards" / "a.bin").unlink()
    assert damage(tmp_path / "checkpoint-1") == "shards/a.bin is missing"
    (fresh() / "manifest.json").write_text("{")
    assert damage(tmp_path / "checkpoint-1") == "manifest.json is missing or does not read"


def test_no_whole_checkpoint_is_one_clear_error(run: Run) -> None:
    run.at(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    for name in run.checkpoints:
        (run.out / name / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no checkpoint .* is whole .*checkpoint-2: optimizer.pt is missing"):
        run()
    assert damage(run.out / "checkpoint-2") and run.checkpoints == ["checkpoint-1", "checkpoint-2"]


def test_without_checkpoints_there_is_none_to_go_on_from(tmp_path: Path) -> None:
    assert newest_whole(tmp_path, print) is None


def test_a_run_that_was_stopped_at_its_end_trains_no_further(run: Run, whole: Path) -> None:
    run.at(4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    assert run.checkpoints[-1] == "checkpoint-4"
    run.at(0, lambda: None)
    assert same(run(), whole)
    assert [entry["step"] for entry in run.metrics if "loss" in entry] == [1, 2, 3, 4]


def test_steps_that_are_not_finite_change_nothing(run: Run) -> None:
    """The third of three steps is bad: weights, and Adam's memory in the checkpoint, are those after two."""
    run.spoil(3)
    two = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    run.at(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(**two)
    first, second = (run.out / f"checkpoint-{step}" for step in (2, 3))
    assert same(first, second)
    before, after = (torch.load(folder / "optimizer.pt")["state"] for folder in (first, second))
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])
    state = json.loads((second / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["NonFiniteGuard"]["attributes"] == {"skipped": 1, "in_a_row": 1}
    losses = [entry for entry in run.metrics if "loss" in entry]
    assert losses[2]["loss"] is None and losses[2]["skipped"] == 1 and losses[1]["loss"] > 0


def test_a_log_tells_of_the_steps_that_were_made(run: Run, undisturbed: Run) -> None:
    run.spoil(2)
    two = {"gradient_accumulation_steps": 2, "logging_steps": 2, "steps": 2}
    run(**two)
    undisturbed(**(two | {"logging_steps": 1}))
    [both] = [entry for entry in run.metrics if "loss" in entry]
    first = next(entry for entry in undisturbed.metrics if "loss" in entry)
    assert both["loss"] == pytest.approx(first["loss"]) and both["nll"] > 0


def test_too_many_bad_steps_in_a_row_end_a_run(run: Run) -> None:
    run.spoil(1, 3, 4, 5)
    with pytest.raises(FloatingPointError, match="not finite in 2 steps in a row.*checkpoint-4"):
        run(steps=6, gradient_accumulation_steps=2, max_skipped=2)
    assert same(run.out / "checkpoint-3", run.out / "checkpoint-4")
    with pytest.raises(ValueError, match="max_skipped=0"):
        run(steps=6, gradient_accumulation_steps=2, max_skipped=0)


@pytest.fixture
def after_save(run: Run) -> Callable[[int, Callable[[], None]], None]:
    """Do something after a step's checkpoint."""
    real = DiffusionTrainer._save_checkpoint

    def at(step: int, act: Callable[[], None]) -> None:
        def save(trainer: DiffusionTrainer, *given: Any) -> None:
            real(trainer, *given)
            if trainer.state.global_step == step:
                act()

        run.patch.setattr(DiffusionTrainer, "_save_checkpoint", save)

    return at


def test_a_full_disk_does_not_end_a_run(run: Run, whole: Path, room: None, after_save: Any) -> None:
    def make_room() -> None:
        assert run.checkpoints == ["checkpoint-1"] and not (run.out / ".unfinished").exists()
        no_file_above(-1)

    run.at(2, lambda: no_file_above(20_000))  # less than the weights
    after_save(3, make_room)
    assert same(run(), whole)
    for step in (2, 3):
        assert f"checkpoint-{step} could not be saved" in run.said.getvalue()
    assert f"the last checkpoint is {run.out / 'checkpoint-1'}; training goes on" in run.said.getvalue()


def test_a_full_disk_has_many_names(run: Run, whole: Path) -> None:
    """Tokenizers raise nothing more special than this."""
    real = PreTrainedTokenizerBase.save_pretrained

    def save(tokenizer: PreTrainedTokenizerBase, folder: Path, *rest: Any, **more: Any) -> Any:
        if "checkpoint-2" in str(folder):
            raise Exception("No space left on device (os error 28)")
        return real(tokenizer, folder, *rest, **more)

    run.patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)
    assert same(run(), whole)
    assert "checkpoint-2 could not be saved (Exception('No space left" in run.said.getvalue()


def test_a_disk_that_is_full_from_the_start_is_one_clear_error(run: Run, room: None) -> None:
    run.at(1, lambda: no_file_above(20_000))
    with pytest.raises(OSError, match="checkpoint-1 could not be saved .* none before it"):
        run()


def test_a_model_that_does_not_fit_leaves_its_checkpoint(run: Run, whole: Path, room: None, after_save: Any) -> None:
    after_save(4, lambda: no_file_above(20_000))
    with pytest.raises(OSError, match="could not be saved .*the last checkpoint is .*checkpoint-4"):
        run()
    no_file_above(-1)
    assert not (run.out / "diffusion_config.json").exists()
    assert same(run(), whole)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(run: Run) -> None:
    allowed = os.access
    run.patch.setattr(run_folder.os, "access", lambda path, mode: allowed(path, mode) and Path(path) != run.out.parent)
    run.patch.setattr("diffusify.training.adapt.open_base", lambda *given, **more: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="cannot be written to"):
        run()


def test_what_a_finished_run_left_over_is_removed(run: Run) -> None:
    run(steps=1)
    before = {path.name for path in run.out.iterdir()}
    (run.out / "checkpoint-1").mkdir()
    (run.out / "run.lock").touch()
    run(steps=1)
    assert {path.name for path in run.out.iterdir()} == before


HOLD = """
import sys
from pathlib import Path
from diffusify.training.resilience.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_refused(run: Run) -> None:
    run.out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another run is at work in .*process {holder.pid} "):
            run()
        holder.kill()
    run(steps=1)
    assert not (run.out / "run.lock").exists()


def test_a_folder_is_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_the_journal_of_a_resumed_run_is_that_of_an_undisturbed_one(run: Run, undisturbed: Run) -> None:
    options = {"steps": 4, **TINY, "save_steps": 2}
    undisturbed(**options)
    victim = start(adapt_until, 3, run.base, run.corpus, run.out, options)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert [entry["step"] for entry in run.metrics if "loss" in entry] == [1, 2]
    assert (run.out / "curve.png").exists()
    run(**options)

    def lasting(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry for entry in metrics if "train_runtime" not in entry]

    assert lasting(run.metrics) == lasting(undisturbed.metrics)
    assert lasting(run.metrics) == lasting(json.loads((run.out / "training.json").read_text())["log"])


def test_a_journal_catches_up_when_the_disk_has_room_again(tmp_path: Path, room: None) -> None:
    journal, control = MetricsLog(tmp_path, 8), TrainerControl()
    state = TrainerState(log_history=[{"step": 1, "loss": 1.0}])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    journal.on_train_begin(args, state, control)
    state.log_history.append({"step": 2, "loss": float("inf")})
    no_file_above(30)
    journal.on_log(args, state, control)
    no_file_above(-1)
    state.log_history.append({"step": 3, "loss": 3.0})
    journal.on_log(args, state, control)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, None, 3.0]


def test_a_reporter_that_is_not_installed_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="report_to=mlflow"):
        run(report_to="mlflow")
    assert not run.out.exists()
