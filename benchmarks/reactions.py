"""Two masked language models of chemical reactions become generators by reparameterized diffusion (RDM).

    pip install --no-deps rxnmapper==0.4.3 rxnfp==0.1.0 && pip install rdkit
    python benchmarks/reactions.py

The ALBERT in `rxnmapper` and the BERT in `rxnfp`, each as released, after training at its own 15% of masks (the paper's
ablation), and after as much diffusion training. The reactions are built by rule from common fragments. The tests use
reactions whose pairs of fragments were not trained on: masked accuracy at every share of open tokens, and infilling of
a span of 40% of the tokens or of the whole product (with given length): how often all molecules are valid (RDKit), and
how often the text is exact.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path

import torch
from machine import save
from rdkit import Chem, RDLogger
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import diffusify
from diffusify.canvas import Canvas
from diffusify.models.loading import load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import mlm
from diffusify.sampling.diffusion_lm import DiffusionLM

SMILES = r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
SHARES = (0.15, 0.3, 0.5, 0.7, 0.9, 1.0)
MODELS = {
    "rxnmapper": (AlbertForMaskedLM, AlbertConfig, "albert_heads_8_uspto_all_1310k"),
    "rxnfp": (BertForMaskedLM, BertConfig, "bert_pretrained"),
}

# Groups to be attached by their last atom (left) or by their first (right).
LEFT = [
    "C", "CC", "CCC", "CC(C)", "CC(C)C", "CCCCC", "C1CCC1", "C1CCCCC1", "c1ccccc1", "Cc1ccc", "COc1ccc", "Fc1ccc",
    "Clc1ccc", "O=[N+]([O-])c1ccc", "N#Cc1ccc", "FC(F)(F)c1ccc", "c1ccc2ccccc2c1", "c1ccncc1", "c1ccoc1", "c1ccsc1",
    "c1cnccn1", "COCC", "C=CC", "c1ccc(cc1)C",
]  # fmt: skip
RING = {group for group in LEFT if group.endswith("1ccc")}  # to be closed by cc1 behind the attachment
RIGHT = [
    "C", "CC", "CCC", "C(C)C", "CCCC", "CC(C)C", "C1CC1", "C1CCCC1", "C1CCCCC1", "c1ccccc1", "Cc1ccccc1", "CCc1ccccc1",
    "Cc1ccc(F)cc1", "c1ccc(OC)cc1", "c1ccc(C)cc1", "c1ccc(Cl)cc1", "CCOC", "CCN1CCOCC1", "Cc1ccco1", "Cc1ccncc1",
    "c1cccnc1", "CC(=O)OC", "CCO", "c1ccc(C#N)cc1",
]  # fmt: skip
REAGENTS = [
    "CN(C)C=O", "C1CCOC1", "ClCCl", "CCN(CC)CC", "O=C([O-])[O-].[K+].[K+]", "CC#N", "CCO", "O", "Cl", "[Na+].[OH-]",
    "CN(C)C=O.O=C([O-])[O-].[K+].[K+]", "C1COCCO1", "CCN(CC)CC.ClCCl",
]  # fmt: skip
RULES = {
    "amide": ("{l}C(=O)O{e}", "N{r}", "{l}C(=O)N{r}{e}"),
    "chloride": ("{l}C(=O)Cl{e}", "N{r}", "{l}C(=O)N{r}{e}"),
    "ester": ("{l}C(=O)O{e}", "O{r}", "{l}C(=O)O{r}{e}"),
    "ether": ("{l}O{e}", "Br{r}", "{l}O{r}{e}"),
    "amination": ("{l}C=O{e}", "N{r}", "{l}CN{r}{e}"),
    "sulfonamide": ("{l}S(=O)(=O)Cl{e}", "N{r}", "{l}S(=O)(=O)N{r}{e}"),
    "urea": ("{l}N=C=O{e}", "N{r}", "{l}NC(=O)N{r}{e}"),
}


def built(left: str, right: str, rule: str, rng: random.Random) -> str | None:
    """One reaction in canonical SMILES with reagents; None where a rule gives an invalid molecule."""
    sides = []
    for part in RULES[rule]:
        body = part.replace("{r}", right)
        if left in RING:  # the tail of the attachment becomes a branch of the ring
            tail = body.split("{l}")[-1].replace("{e}", "") if "{l}" in body else ""
            body = f"{left}({tail})cc1" if "{l}" in body else body.replace("{e}", "")
        else:
            body = body.replace("{l}", left).replace("{e}", "")
        molecule = Chem.MolFromSmiles(body)
        if molecule is None:
            return None
        sides.append(Chem.MolToSmiles(molecule))
    inputs = [sides[0], sides[1], rng.choice(REAGENTS)]
    return ".".join(sorted(inputs)) + ">>" + sides[2]


def reactions(seed: int) -> tuple[list[str], list[str]]:
    """Training reactions, and reactions with pairs of fragments that no training reaction has."""
    rng = random.Random(seed)
    pairs = list(product(LEFT, RIGHT))
    rng.shuffle(pairs)
    held = set(pairs[: len(pairs) // 10])
    train, test = [], []
    for left, right in pairs:
        for rule in RULES:
            for _ in range(3):
                if reaction := built(left, right, rule, rng):
                    (test if (left, right) in held else train).append(reaction)
    rng.shuffle(test)
    return list(dict.fromkeys(train)), list(dict.fromkeys(test))


def valid(reaction: str) -> bool:
    """Whether there are two sides, and all molecules on both are valid."""
    sides = reaction.split(">>")
    return len(sides) == 2 and all(side and Chem.MolFromSmiles(side) is not None for side in sides)


def export_package(package: str, folder: Path) -> str:
    """A package's network and vocabulary as a transformers folder."""
    network_class, config_class, name = MODELS[package]
    files = [Path(str(f.locate())) for f in metadata.files(package) or [] if f.parent.name == name]
    source = next(f for f in files if f.name == "config.json").parent
    network = network_class(config_class.from_json_file(source / "config.json"))
    weights = torch.load(source / "pytorch_model.bin", weights_only=True, map_location="cpu")
    ours = network.state_dict()
    network.load_state_dict({k: weights.get(k, weights.get(k.replace("decoder.bias", "bias"))) for k in ours})
    network.save_pretrained(folder)
    words = (source / "vocab.txt").read_text().split("\n")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words) if word}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def accuracy(lm: DiffusionLM, test: list[str], seed: int) -> dict[str, float]:
    """Masked accuracy (percent) where a share of each reaction is open."""
    out = {}
    for share in SHARES:
        rng, right, total = torch.Generator().manual_seed(seed), 0, 0
        for start in range(0, len(test), 32):
            rows = lm.tokenizer.documents(test[start : start + 32])
            canvas = Canvas.from_tokens(rows, noise=lm.config.mask_token_id, pad=lm.tokenizer.pad_token_id)  # pyright: ignore
            inside = canvas.real & (canvas.position_ids > 0) & (canvas.tokens != lm.tokenizer.end_token_id)
            open = inside & (torch.rand(canvas.tokens.shape, generator=rng) < share)
            noisy = Canvas(torch.where(open, lm.config.mask_token_id, canvas.tokens), open, inside, canvas.document)
            guess = lm.denoiser(noisy, positions=open).logits.argmax(-1)
            right, total = right + int((guess == canvas.tokens[open]).sum()), total + len(guess)
        out[str(share)] = round(100 * right / total, 1)
    return out


def infill_tasks(lm: DiffusionLM, test: list[str], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(kind, text with a masked span, whole text): 40% of the tokens somewhere, and the whole product."""
    for text in test:
        ids = lm.tokenizer.encode(text)
        size = max(1, round(0.4 * len(ids)))
        at = rng.randrange(len(ids) - size)
        yield "hole", lm.tokenizer.decode(ids[:at]) + f"[[{size}]]" + lm.tokenizer.decode(ids[at + size :]), text
        inputs, product_text = text.split(">>")
        yield "product", f"{inputs}>>[[{len(lm.tokenizer.encode(product_text))}]]", text


def generate(lm: DiffusionLM, test: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Percent of valid and of exact texts, in one step and in ten."""
    tasks = list(infill_tasks(lm, test, random.Random(seed)))
    out: dict[str, dict[str, float]] = {}
    for kind in ("hole", "product"):
        mine = [(text, whole) for task_kind, text, whole in tasks if task_kind == kind]
        for steps in (1, 10):
            results = [
                result.text
                for start in range(0, len(mine), 32)
                for result in lm.infill([text for text, _ in mine[start : start + 32]], steps=steps, seed=seed)
            ]
            n_valid = sum(valid(text) for text in results)
            n_exact = sum(text == whole for text, (_, whole) in zip(results, mine, strict=True))
            out[f"{kind}, {steps} steps"] = {
                "valid": round(100 * n_valid / len(mine), 1), "right": round(100 * n_exact / len(mine), 1)
            }  # fmt: skip
    return out


def measure(lm: DiffusionLM, test: list[str], seed: int) -> dict:
    return {"masked_accuracy": accuracy(lm, test, seed), "written": generate(lm, test, seed)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--tests", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    RDLogger.DisableLog("rdApp.*")
    train, test = reactions(chosen.seed)
    test = test[: chosen.tests]
    result: dict = {"train_reactions": len(train), "test_reactions": len(test), "steps": chosen.steps}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in train))
        for package in MODELS:
            base = export_package(package, Path(scratch) / package)
            arms: dict[str, Recipe | None] = {"as it is": None, "15% masks": mlm(mask_ratio=0.15), "RDM": mlm()}
            result[package] = {}
            for arm, recipe in arms.items():
                if recipe is None:
                    lm = DiffusionLM(*make_denoiser(load_base(base), mlm()))
                    lm.denoiser.eval()
                else:
                    out = diffusify.adapt(
                        base, str(data), Path(scratch) / f"{package}-{arm[:3]}", recipe=recipe, steps=chosen.steps,
                        per_device_train_batch_size=8, learning_rate=5e-4, seed=chosen.seed, bf16=False,
                    )  # fmt: skip
                    lm = diffusify.load(out)
                result[package][arm] = measure(lm, test, chosen.seed)
                print(package, arm, json.dumps(result[package][arm]), flush=True)
    print("wrote", save("reactions", "python benchmarks/reactions.py", chosen.seed, result))


if __name__ == "__main__":
    main()
