"""Bases that are used as they are: `diffusify.load` and the commands take them without adaptation."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

import diffusify
from diffusify.cli import app

run = CliRunner()


def test_an_autoregressive_base_generates_the_text_of_transformers(causal_base: str) -> None:
    lm, network = diffusify.load(causal_base), cast(Any, AutoModelForCausalLM.from_pretrained(causal_base))
    for prompt in ("The cat", "so it is, and the dog"):
        ids = torch.tensor([lm.tokenizer.add_start(lm.tokenizer.encode(prompt))])
        theirs = network.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        result = lm.generate(prompt, max_new_tokens=12)
        assert result.completion == lm.tokenizer.decode([i for i in theirs.tolist() if i], continues=True)
        assert result.forwards == len(theirs)


def test_a_masked_base_fills_masks_with_its_own_predictions(masked_base: str) -> None:
    lm, network = diffusify.load(masked_base), AutoModelForMaskedLM.from_pretrained(masked_base).eval()
    tokenizer = AutoTokenizer.from_pretrained(masked_base)
    ids = tokenizer(f"the cat {tokenizer.mask_token} the dog", return_tensors="pt")["input_ids"]
    at = ids[0].tolist().index(tokenizer.mask_token_id)
    with torch.no_grad():
        logits = network(ids).logits[0, at, : len(tokenizer)]
    logits[[tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]] = -torch.inf
    ids[0, at] = logits.argmax()
    assert lm.infill("the cat [[1]] the dog").text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_commands_take_a_base(causal_base: str, masked_base: str, tmp_path: Path) -> None:
    options = ["--max-new-tokens", "6", "--preset", "quality"]
    done = run.invoke(app, ["generate", causal_base, "The cat", *options])
    assert done.exit_code == 0 and done.stdout.startswith("The cat"), done.output
    assert f"{causal_base} is not a diffusion model yet, and was used as it is" in done.stderr
    assert f"diffusify adapt {causal_base} --data TEXT" in done.stderr
    done = run.invoke(app, ["infill", masked_base, "the [[2]] dog", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["text"].startswith("the "), done.output
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "The cat"}\n{"prompt": "so it is"}\n')
    done = run.invoke(app, ["generate", causal_base, "--input", str(source), "--output", str(out), *options])
    assert done.exit_code == 0 and len(out.read_text().splitlines()) == 2, done.output
    done = run.invoke(app, ["infill", causal_base, "the [[2]] dog"])
    assert done.exit_code == 2 and "cannot infill" in done.stderr
