"""Bulk generation with two replicas on a local Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusify.models.saving import save_denoiser
from diffusify.serving.bulk.bulk_records import BulkSettings
from diffusify.serving.bulk.bulk_run import generate_records
from tests.serving.models import tiny_lm

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'diffusify[cluster]'")
pytestmark = pytest.mark.slow


def test_two_replicas_write_what_one_process_writes(tmp_path: Path) -> None:
    folder, lm = tmp_path / "block", tiny_lm(infills=False)
    save_denoiser(folder, lm.denoiser, lm.tokenizer.tokenizer)
    records = [{"prompt": f"The cat {i}", "max_new_tokens": i % 7 + 1, "seed": i, "temperature": 1} for i in range(40)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("no record\n" + "".join(json.dumps(record) + "\n" for record in records))
    script = Path(__file__).parents[2] / "deploy" / "ray_bulk.py"
    command = [sys.executable, str(script), str(folder), str(source), str(output)]
    command += ["--replicas", "2", "--cpus", "0.5", "--batch", "8"]
    subprocess.run(command, check=True, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    found = [json.loads(line) for file in output.iterdir() for line in file.read_text().splitlines()]
    (bad,) = [record for record in found if "error" in record]
    assert bad["error"].startswith("no record is not JSON")
    good = sorted((record for record in found if "error" not in record), key=lambda record: record["seed"])
    assert good == list(generate_records(lm, records, BulkSettings()))
