"""The numbers of `make demo`: NELBO and AR loss before and after five minutes, and decoding rates.

    make demo && python benchmarks/demo.py runs/demo

Reads the finished run; the samples are generated again to time them.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from machine import save

from diffusify.demo import samples

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    points = [entry for entry in run["log"] if "eval_bound" in entry]
    result = {
        "minutes": settings["budget"]["minutes"],
        "tokens": points[-1]["step"] * run["tokens_per_step"],
        "bound_nats_per_token": [round(point["eval_bound"], 2) for point in points],
        "bound_standard_error": round(points[-1]["eval_bound_se"], 2),
        "ar_loss_nats_per_token": [round(point["eval_ar_nll"], 2) for point in points],
        "decoding": [asdict(row) for row in samples(folder)[1]],
    }
    print(json.dumps(result, indent=2))
    print("wrote", save("demo", "make demo && python benchmarks/demo.py runs/demo", settings["seed"], result))
