"""A masked model of chemical reactions, carried by a package, becomes a generator: it writes products for reactants.

pip install --no-deps rxnfp==0.1.0 && python examples/reaction_model.py DATA.jsonl runs/out 'CCO.CC(=O)O>>[[9]]'
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import diffusify


def carried(folder: str) -> str:
    """The package's BERT and its vocabulary, as a folder that transformers opens."""
    here = next(Path(str(f.locate())).parent for f in metadata.files("rxnfp") or [] if f.match("bert_pretrained/*.bin"))
    network = BertForMaskedLM(BertConfig.from_json_file(here / "config.json"))
    old = torch.load(here / "pytorch_model.bin", weights_only=True)
    network.load_state_dict({k: old.get(k, old.get(k.replace("decoder.bias", "bias"))) for k in network.state_dict()})
    network.save_pretrained(folder)
    words = {word: i for i, word in enumerate((here / "vocab.txt").read_text().split("\n")) if word}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    atoms = r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(atoms), "isolated"), decoders.Fuse()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def main(reactions: str, out: str, question: str, **settings: Any) -> str:
    diffusify.adapt(carried(f"{out}-base"), reactions, out, recipe=diffusify.mlm(), **(settings or {"steps": 600}))
    return diffusify.load(out).infill(question, steps=10).text


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))
