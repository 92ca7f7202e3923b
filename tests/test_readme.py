"""What the README claims is what was measured, and what it shows runs."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["result"]


def test_the_numbers_are_those_of_the_results() -> None:
    demo, step = result("demo"), result("train_step")
    words = " ".join(README.split())
    bound, ar = demo["bound_nats_per_token"], demo["ar_loss_nats_per_token"]
    assert f"falls from {bound[0]} to {bound[-1]} nats per token" in words
    assert f"own loss falls from {ar[0]} to {ar[-1]}" in words
    five = next(model for model in result("decoding")["models"] if model["folder"] == "5")
    lossless = next(row for row in five["ways"] if row["way"] == "quality")
    assert f"at {lossless['speedup']} times its rate" in words
    assert f"runs at {step['speedup']['median']} times" in words
    assert f"with {step['ours']['peak_gib']} instead of {step['plain']['peak_gib']} GiB" in words


def test_the_ablation_s_table_is_that_of_the_results() -> None:
    ablation = result("ablation")
    columns = [ablation["tokens"].index(tokens) for tokens in (204800, 819200, 1433600, 2867200)]
    rows = {
        (arm["init"], "yes" if arm["shift"] else "no", "yes" if arm["annealing"] else "no"): [
            f"{arm['bound'][i]:.2f}" for i in columns
        ]
        for arm in ablation["arms"]
    }
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:1] == "|"]
    told = {(row[0], row[1], row[2]): row[3:] for row in cells if row[0] in ("pretrained", "random")}
    assert len(told) == 6 and all(rows[arm] == numbers for arm, numbers in told.items())


def test_the_reactions_table_is_that_of_the_results() -> None:
    reactions = result("reactions")
    for package, name in (("rxnmapper", "ALBERT of `rxnmapper`"), ("rxnfp", "BERT of `rxnfp`")):
        lines = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
        assert len(lines) == 3
        for line, arm in zip(lines, ("as it is", "15% masks", "RDM"), strict=True):
            accuracy, written = reactions[package][arm]["masked_accuracy"], reactions[package][arm]["written"]
            hole, once, often = (written[way] for way in ("hole, 10 steps", "product, 1 steps", "product, 10 steps"))
            numbers = [accuracy[share] for share in ("0.15", "0.5", "1.0")]
            numbers += [hole["valid"], hole["right"], once["right"], often["right"]]
            assert line.strip("| ").split(" | ")[2:] == list(map(str, numbers))


def test_the_concepts_table_is_that_of_the_results() -> None:
    made = result("commongen")
    rows = {"AR, greedy | one a token": made["AR"]}
    rows |= {"block(4), threshold 0.9 | as it needs": made["block(4)"]["threshold 0.9"]}
    rows |= {"block(4) | 16": made["block(4)"]["16 steps"]}
    for said, kind in (("told", "told"), ("given", "oracle")):
        rows |= {f"ar(), {said} length | {n}": made["ar()"][f"{kind} length, {n} steps"] for n in (1, 4, 16, 50)}
    for name, told in rows.items():
        assert f"| {name} | {told['bleu']} | {told['rouge_l']} | {told['concepts_there']} |" in README
    assert "0.16M tokens for each" in README and round(made["tokens"] / 1e6, 2) == 0.16


def test_the_decoding_table_is_that_of_the_results() -> None:
    decoding = result("decoding")
    for model in decoding["models"]:
        ways = {row["way"]: row for row in model["ways"]}
        cells = [f"{model['training_tokens']:,}"]
        cells += [f"{ways[n]['speedup']} ({ways[n]['tokens_per_forward']})" for n in ("quality", "balanced", "fast")]
        cells += [str(ways[n]["perplexity"]) for n in ("left to right", "quality", "balanced", "fast")]
        assert f"| {' | '.join(cells)} |" in README
    equal = decoding["equal_texts"]
    told = f"of {equal['of']} texts of 64 tokens {equal['float32']} are those of greedy left-to-right decoding"
    assert told in " ".join(README.split()) and f"and {equal['bfloat16']} in bfloat16" in " ".join(README.split())


def test_the_caches_numbers_are_those_of_the_results() -> None:
    caches, words = result("caches"), " ".join(README.split())
    times, agree = caches["times_plain"], caches["agreement"]
    assert f"without a cache at {times['no cache']} times" in words
    assert f"in windows of 32 at {times['no cache, window']} times" in words
    assert f"prefix cache at {times['prefix cache']} and with a dual cache at {times['dual cache']} times" in words
    assert f"{100 * agree['prefix cache']:.1f} and {100 * agree['dual cache']:.1f} percent" in words


def test_the_bound_s_rate_is_that_of_the_results() -> None:
    told = result("likelihood")
    assert f"that is {told['times_the_plain_rate']} times the rate of a plain loop" in " ".join(README.split())
    assert told["standard_error"]["ours"] < told["standard_error"]["plain"]


def test_the_finetuning_table_is_that_of_the_results() -> None:
    reasoning = result("reasoning")
    for arm, name in (("AR", "AR"), ("block(4)", "block(4), threshold 0.9")):
        numbers = " | ".join(str(reasoning[arm][key]) for key in ("greedy", "majority_of_3", "hit_at_3"))
        assert f"| {name} | {numbers} |" in README
    assert "the same 0.3M tokens" in README and round(reasoning["tokens"] / 1e6, 1) == 0.3


def test_the_instruction_table_is_that_of_the_results() -> None:
    tuned = result("instructions")
    for arm in ("before", "after"):
        scores = (tuned[arm][shots][key] for shots in ("zero-shot", "2-shot") for key in ("exact_match", "rouge_l"))
        assert f"| {arm} | {' | '.join(map(str, scores))} |" in README
    assert f"{tuned['tests']} prompts of {len(tuned['unseen'])} families" in README and tuned["tokens"] == 204800


def test_python_in_the_readme_says_words_that_exist() -> None:
    import diffusify

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "diffusify":
                assert getattr(diffusify, node.attr)


def test_every_file_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_server_s_numbers_are_those_of_the_results() -> None:
    told, words = result("serving"), " ".join(README.split())
    load, memory = told["load"], told["memory"]["mib_after_each_quarter"]
    assert load["errors"] == 0 and told["vanished"] == {"clients": 16, "passes_until_free": 1}
    assert f"writes {load['times_serial']} times the tokens/s" in words
    assert f"the slowest waits {load['slowest_over_median']} times the median" in words
    assert f"from {memory[0]:,} to {memory[-1]:,} MiB" in words
