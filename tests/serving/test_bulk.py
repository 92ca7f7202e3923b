"""Bulk generation: each record gets what it gets alone, in order, and a killed run continues."""

import gzip
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.models.saving import save_denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.bulk.bulk_output import generate_file
from diffusify.serving.bulk.bulk_records import BulkInput, BulkSettings
from diffusify.serving.bulk.bulk_run import generate_records
from diffusify.serving.engine.batching import PassBatcher
from tests.serving.models import tiny_lm

run = CliRunner()
LENGTHS = [4, 30, 9, 60, 2]
SETTINGS = BulkSettings(SamplingConfig(seed=10), SamplingConfig(seed=10), max_new_tokens=12)


@pytest.fixture(scope="module")
def infiller() -> DiffusionLM:
    return tiny_lm(infills=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny block model."""
    folder, lm = tmp_path_factory.mktemp("models") / "block", tiny_lm(infills=False)
    save_denoiser(folder, lm.denoiser, lm.tokenizer.tokenizer)
    return str(folder)


def mixed_records() -> list[dict[str, Any]]:
    """Records of all kinds, with settings of their own and other fields."""
    records: list[dict[str, Any]] = []
    for i in range(15):
        kinds: list[dict[str, Any]] = [
            {"prompt": "The cat " * (i % 4), "max_new_tokens": LENGTHS[i % 5]},
            {"messages": [{"role": "user", "content": f"Is it {i}?"}], "temperature": 1.0, "top_k": 9}
            | {"chosen": "yes", "rejected": "no", "label": False},
            {"text": f"The [[{i % 3 + 1}]] sat [[2-4]] mat", "seed": i},
            {"prompt": "and the dog", "stop": ["e", " "], "steps": 3, "temperature": None},
            {"prompt": [{"from": "human", "value": "so?"}], "policy": "Rdm"},
        ]
        records.append({"id": i} | kinds[i % 5])
    return records


def alone(lm: DiffusionLM, record: dict[str, Any], number: int) -> dict[str, Any]:
    """What a record gets alone."""
    names = ("temperature", "top_k", "stop", "steps", "seed")
    sampling: dict[str, Any] = {"seed": 10 + number} | {
        name: record[name] for name in names if record.get(name) is not None
    }
    if "text" in record:
        result = lm.infill(record["text"], **sampling)
        found: dict[str, Any] = {"text": result.text, "spans": list(result.spans or ())}
    else:
        if isinstance(record.get("prompt"), list):
            config = SamplingConfig(policy=_policy(record["policy"]), **sampling)
            result = lm.prepare_chat([[{"role": "user", "content": "so?"}]], 12, config).results()[0]
        elif "messages" in record:
            result = lm.chat(record["messages"], 12, **sampling)
        else:
            result = lm.generate(record["prompt"], record.get("max_new_tokens", 12), **sampling)
        found = {"completion": result.completion, "finish_reason": result.finish_reason}
    return record | found | {"tokens": result.tokens, "forwards": result.forwards, "seed": result.seed}


def _policy(name: str) -> Any:
    from diffusify.diffusion import policies

    return getattr(policies, name)()


def test_mixed_records_get_what_they_get_alone_in_order(infiller: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    records, batchers = mixed_records(), []
    monkeypatch.setattr(PassBatcher, "__init__", _remembering(PassBatcher.__init__, batchers))
    together = list(generate_records(infiller, records, SETTINGS, tokens=512))
    assert together == [alone(infiller, record, number) for number, record in enumerate(records)]
    assert batchers[0].passes < sum(record["forwards"] for record in together) / 2


def _remembering(init: Any, made: list[Any]) -> Any:
    def remember(self: Any, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    return remember


def test_bad_records_are_reported_and_others_are_not_affected(infiller: DiffusionLM) -> None:
    good = {"prompt": "The cat", "error": "of an earlier run", "seed": 3}
    bad: list[tuple[dict[str, Any] | ValueError, str]] = [
        (ValueError("line 1 is not JSON"), "line 1 is not JSON"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature: 'hot' must be one of float"),
        ({"prompt": "x " * 400}, ".* context is 320"),
        ({"prompt": 3}, "the field prompt is not a text but 3"),
        ({"title": "x"}, "a record has one field prompt or messages or text; fields found: title"),
        ({"prompt": "x", "messages": []}, ".* fields found: prompt, messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, ".*role"),
        ({"text": "no span"}, ".* has no masked span"),
        ({"text": "a [[2]]", "stop": "x"}, "stop='x' ends a continuation"),
        ({"prompt": "\ud800"}, ".*lone surrogate at character 0"),
        ({"prompt": "x", "seed": 2**70}, "seed="),
    ]
    records = [record for record, _ in bad]
    *failed, kept = generate_records(infiller, [*records, good], SETTINGS)
    for (record, message), found in zip(bad, failed, strict=True):
        assert re.match(message, found.pop("error")), message
        assert found == (record if isinstance(record, dict) else {})
    assert kept == alone(infiller, {"prompt": "The cat", "seed": 3}, 12)


def test_an_error_that_is_not_the_records_ends_the_run(infiller: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PassBatcher, "_run_body", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generate_records(infiller, [{"prompt": "x"}]))


def test_an_interrupted_file_is_continued(infiller: DiffusionLM, tmp_path: Path) -> None:
    records = [*mixed_records(), {"prompt": "x", "max_new_tokens": 0}, {"prompt": "\u00e9", "other": "\ud800"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    *_, last = generate_file(infiller, BulkInput(source), whole, SETTINGS, tokens=512)
    assert (last.results.records, last.results.corrupt, last.total) == (17, 1, 17)
    lines = whole.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert found[15].pop("error") == "record 16: max_new_tokens=0 must be at least 1"
    assert [*found[:15], found[16]] == [*generate_records(infiller, records[:15], SETTINGS), found[16]]
    for count in (4, 7):
        steps: Any = generate_file(infiller, BulkInput(source), output, SETTINGS, tokens=256)
        for _ in range(count):
            next(steps)
        steps.close()
        with output.open("a") as file:
            file.write('{"id": 99, "half')
    *_, last = generate_file(infiller, BulkInput(source), output, SETTINGS)
    assert output.read_bytes() == whole.read_bytes() and last.results.records == 17
    (again,) = generate_file(infiller, BulkInput(source), output, SETTINGS)
    assert again.results.corrupt == 1 and again.tokens == 0


def test_an_output_of_another_run_is_refused(infiller: DiffusionLM, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("The cat\nThe dog\n")

    def generate(settings: BulkSettings = SETTINGS) -> list[Any]:
        return list(generate_file(infiller, BulkInput(source), output, settings))

    generate()
    for settings, lines, message in (
        (BulkSettings(max_new_tokens=3), "The cat\nThe dog\n", "different settings;"),
        (SETTINGS, "The cat\nA dog\n", "different input;"),
        (BulkSettings(), "The cat\n", "different input and settings;"),
    ):
        source.write_text(lines)
        with pytest.raises(ValueError, match=message):
            generate(settings)
    source.write_text("The cat\nThe dog\n")
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", lock, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ValueError, match="another process is writing"):
            generate()
        holder.stdin.write(b"\n")
    (tmp_path / ".out.jsonl.json").unlink()
    with pytest.raises(ValueError, match="was not written by this command"):
        generate()
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl.gz", "folder"])
def test_inputs_of_all_kinds(tmp_path: Path, name: str) -> None:
    """Text files have a prompt in each line. Numbers in tables are text, and empty cells are left out."""
    records = [{"prompt": "The cat", "max_new_tokens": 3}, {"prompt": "The dog", "max_new_tokens": 12}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if name == "folder":
        (tmp_path / name).mkdir()
        for n, line in enumerate(lines.splitlines()):
            (tmp_path / name / f"{n}.jsonl").write_text(line)
    elif name == "a.jsonl.gz":
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    else:
        csv = "prompt,max_new_tokens,stop\nThe cat,3,\nThe dog,,\n"
        content = {"a.txt": "The cat\n\n \nThe dog\r\n", "a.csv": csv, "a.json": json.dumps(records)}
        (tmp_path / name).write_text(content[name], newline="")
    lm, source = tiny_lm(infills=False), BulkInput(tmp_path / name)
    found = list(generate_records(lm, source, SETTINGS))
    assert source.count == len(found) == 2
    assert [record["prompt"] for record in found] == ["The cat", "The dog"]
    assert [record["tokens"] for record in found] == [12 if name == "a.txt" else 3, 12]


def test_bulk_commands(folder: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "The cat"}\n{"prompt": 3}\n{"text": "a [[2]]"}\n')
    words = ["generate", folder, "--input", str(source), "--output", str(output), "--temperature", "1", "--seed", "4"]
    done = run.invoke(app, [*words, "--max-new-tokens", "9"])
    assert done.exit_code == 0, done.output
    assert "saved 1 results" in done.stderr and "2 of 3 records have errors (record 2: the field" in done.stderr
    completion = tiny_lm(infills=False).generate("The cat", 9, temperature=1.0, seed=4).completion
    assert [json.loads(line).get("completion") for line in output.read_text().splitlines()] == [completion, None, None]
    failing = run.invoke(app, ["infill", folder, "--input", str(source), "--output", str(tmp_path / "filled.jsonl")])
    assert failing.exit_code == 1 and "saved 0 results" in failing.stderr
    for more, message in (
        (["--input", str(source)], "give both or neither"),
        (["--input", str(source), "--output", "out.txt"], "ends in .jsonl"),
        (["--input", "missing.jsonl", "--output", "out.jsonl"], "missing.jsonl does not exist"),
        (["x", "--input", str(source), "--output", str(output)], "PROMPT is for a single text"),
        (["-n", "2", "--input", str(source), "--output", str(output)], "-n is for a single text"),
        (["--input", str(source), "--output", str(output), "--batch-tokens", "0"], "--batch-tokens 0"),
    ):
        refused = run.invoke(app, ["generate", folder, *more])
        assert refused.exit_code == 2 and message in refused.stderr, refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_one_line(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("diffusify.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "greenlet", None)
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    done = run.invoke(app, ["generate", folder, *words])
    assert done.exit_code == 2
    assert done.stderr == "error: --input needs `pip install 'diffusify[serve]'` (greenlet is missing)\n"


@pytest.mark.slow
def test_a_killed_run_is_continued(folder: str, tmp_path: Path) -> None:
    """Killed twice in the middle, the command ends with the output of an undisturbed run."""
    source, output, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    records = [{"prompt": f"The cat {i}", "max_new_tokens": LENGTHS[i % 5], "id": i} for i in range(150)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))

    def start(path: Path) -> subprocess.Popen[bytes]:
        words = ["generate", folder, "--input", str(source), "--output", str(path), "--batch-tokens", "400"]
        return subprocess.Popen([sys.executable, "-m", "diffusify", *words, "--temperature", "1"])

    for count in (40, 90):
        with start(output) as process:
            while not output.exists() or output.read_bytes().count(b"\n") < count:
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        assert count <= output.read_bytes().count(b"\n") < 150
    for path in (output, whole):
        with start(path) as process:
            assert process.wait() == 0
    assert output.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == list(range(150))
